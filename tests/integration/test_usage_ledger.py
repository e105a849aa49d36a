"""The ledger on a real disk: what was written is there after any end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ollama_distributed.adapters.ledger.files import Batch, LedgerFiles, Summed
from ollama_distributed.base.usage import Row, RowKey, Sums

KEY = RowKey(0, "k", "t", "m", "a")


def batch(number: int, requests: int = 1, *, closed: bool = False) -> Batch:
    return Batch(number=number, at=float(number), rows=(Row(KEY, Sums(requests=requests)),), closed=closed)


def requests_of(files: LedgerFiles) -> int:
    opened = files.open(99.0)
    rows = [*opened.summed.rows, *(row for one in opened.batches for row in one.rows)]
    return sum(row.sums.requests for row in rows)


def test_every_cut_of_the_last_line_leaves_the_lines_before(tmp_path: Path) -> None:
    files = LedgerFiles(tmp_path, "n")
    files.open(0.0)
    files.append(batch(1))
    path = tmp_path / "1.log"
    one = path.stat().st_size
    files.append(batch(2))
    files.close()
    whole = path.read_bytes()
    for length in range(one, len(whole)):
        path.write_bytes(whole[:length])
        (tmp_path / "2.log").unlink(missing_ok=True)
        again = LedgerFiles(tmp_path, "n")
        opened = again.open(99.0)
        again.close()
        assert [one.number for one in opened.batches] == [1]
        assert [doubt.until for doubt in opened.doubts] == [99.0]
        assert path.stat().st_size == one, "the rest is cut off"


def test_an_end_in_order_leaves_no_doubt(tmp_path: Path) -> None:
    files = LedgerFiles(tmp_path, "n")
    ledger = files.open(0.0).ledger
    files.append(batch(1))
    files.append(batch(2, closed=True))
    files.close()
    again = LedgerFiles(tmp_path, "n")
    opened = again.open(99.0)
    again.close()
    assert opened.doubts == ()
    assert opened.ledger == ledger


def test_a_sum_takes_the_place_of_the_lines(tmp_path: Path) -> None:
    files = LedgerFiles(tmp_path, "n")
    files.open(0.0)
    files.append(batch(1, 5))
    log = (tmp_path / "1.log").read_bytes()
    files.sum_up(Summed(batch=1, rows=(Row(KEY, Sums(requests=5)),)))
    files.append(batch(2, 2))
    files.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.sum", "2.log", "ledger.json"]
    assert requests_of(LedgerFiles(tmp_path, "n")) == 7
    (tmp_path / "1.log").write_bytes(log)  # it ended between the rename and the removal
    assert requests_of(LedgerFiles(tmp_path, "n")) == 7


def test_another_nodes_folder_is_another_ledger(tmp_path: Path) -> None:
    first = LedgerFiles(tmp_path, "n").open(0.0).ledger
    assert LedgerFiles(tmp_path, "other").open(0.0).ledger != first


WRITER = """
import sys
from pathlib import Path
from tests.integration.test_usage_ledger import LedgerFiles, batch
files = LedgerFiles(Path(sys.argv[1]), "n")
files.open(0.0)
for number in range(1, 100000):
    files.append(batch(number))
    print(number, flush=True)
"""


def test_what_was_said_to_be_written_outlives_a_kill(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert writer.stdout is not None
    with writer:
        said = 0
        while said < 20:
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().splitlines()
        said = int(lines[-2]) if len(lines) > 1 else said  # the last one may be half a line
    assert requests_of(LedgerFiles(tmp_path, "n")) >= said
