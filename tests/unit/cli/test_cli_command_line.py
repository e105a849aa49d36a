"""A secret on a command line: gone from the list of processes once the command has it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from ollama_distributed.cli import command_line

SECRET = "odj_server.ab12cd34.0123456789abcdef"
JOIN = """
import sys
from ollama_distributed.cli.command_line import token_of
print(token_of(sys.argv[2]), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the arguments are in /proc there only")
def test_a_token_is_not_among_the_processes_while_the_command_runs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", JOIN, "join", SECRET, "--name", "n1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == SECRET + "\n", "the command has it"
        seen = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        _, told = process.communicate()
    assert SECRET not in " ".join(seen)
    assert seen[-4:] == ["*" * len(SECRET), "--name", "n1", ""]
    assert told == ""


def test_where_it_cannot_be_hidden_one_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command_line, "_STAT", tmp_path / "none")
    assert command_line.token_of(SECRET) == SECRET
    assert "join -" in capsys.readouterr().err


def test_a_token_comes_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f" {SECRET}\nmore\n"))
    assert command_line.token_of("-") == SECRET
