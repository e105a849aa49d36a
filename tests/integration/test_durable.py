"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ollama_distributed.adapters.durable import replace_file

pytestmark = pytest.mark.integration


def test_it_is_private_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"an older and longer one")
    path.chmod(0o644)
    left = tmp_path / ".record.new"
    left.write_bytes(b"of a crash")
    left.chmod(0o666)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["record"]


def test_what_was_there_stays_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    replace_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["record"]


def test_threads_that_replace_one_file_write_all_of_it_each(tmp_path: Path) -> None:
    path, contents = tmp_path / "record", [bytes([n]) * 4096 for n in range(8)]
    threads = [threading.Thread(target=replace_file, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert [one.name for one in tmp_path.iterdir()] == ["record"]


def test_a_link_that_somebody_put_in_its_way_is_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "record", tmp_path / "other"
    other.write_bytes(b"theirs")
    path.symlink_to(other)
    (tmp_path / ".record.new").symlink_to(other)
    replace_file(path, b"new")
    assert other.read_bytes() == b"theirs"
    assert not path.is_symlink()
