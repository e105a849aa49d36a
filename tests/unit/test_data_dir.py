"""The node's folder: private, kept, one node at a time."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import msgspec
import pytest

from ollama_distributed.access.keys import parse_key
from ollama_distributed.base.errors import Conflict, Invalid, Unavailable
from ollama_distributed.node import data_dir
from ollama_distributed.node.data_dir import AdminFile, keys, locked, node_id

URL = "http://127.0.0.1:8080"


def admin(folder: Path) -> AdminFile:
    return msgspec.json.decode((folder / "admin.json").read_bytes(), type=AdminFile)


def test_first_start_makes_an_admin_key_that_only_the_owner_reads(tmp_path: Path) -> None:
    (record,) = keys(tmp_path, URL, 0.0)
    secret = parse_key(admin(tmp_path).key)
    assert secret is not None
    assert secret.secret_sha256 == record.secret_sha256
    assert admin(tmp_path).key.split("_")[2] not in (tmp_path / "keys.json").read_text()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_restart_keeps_id_and_key_and_updates_the_url(tmp_path: Path) -> None:
    first_id, first_keys, first_admin = node_id(tmp_path, 0.0), keys(tmp_path, URL, 0.0), admin(tmp_path)
    assert node_id(tmp_path, 9.0) == first_id
    assert keys(tmp_path, URL + "1", 9.0) == first_keys
    assert admin(tmp_path) == msgspec.structs.replace(first_admin, url=URL + "1")


def test_a_removed_admin_file_stays_removed(tmp_path: Path) -> None:
    before = keys(tmp_path, URL, 0.0)
    (tmp_path / "admin.json").unlink()
    assert keys(tmp_path, URL, 0.0) == before
    assert not (tmp_path / "admin.json").exists()


def test_a_damaged_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(Invalid, match=r"keys\.json"):
        keys(tmp_path, URL, 0.0)
    assert (tmp_path / "keys.json").read_text() == "{"


def test_one_node_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "node"
    with locked(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(Conflict, match="another --data-dir"), locked(folder):
            pass
    with locked(folder):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="data folder"), locked(tmp_path / "file" / "x"):
        pass


def test_the_runtime_folder_is_private_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_dir, "MAX_RUNTIME_PATH", 1000)
    left = tmp_path / "run" / "run-abc"
    left.mkdir(parents=True, mode=0o755)
    (left / "r.sock").touch()
    with data_dir.runtime(tmp_path) as folder:
        assert folder == tmp_path / "run"
        assert list(folder.iterdir()) == []
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_a_long_data_folder_has_its_runtime_folder_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    one, other = tmp_path / ("x" * 80), tmp_path / ("y" * 80)
    for long in (one, other):
        long.mkdir()
    with data_dir.runtime(one) as first, data_dir.runtime(other) as second:
        assert first != second
        (first / "run-left-by-a-kill").mkdir()
        with data_dir.runtime(one) as again:
            assert again == first
            assert list(again.iterdir()) == []
        assert second.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_runtime_folder_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_dir, "MAX_RUNTIME_PATH", 1000)
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "run").symlink_to(elsewhere)
    with pytest.raises(Unavailable, match="move it away"), data_dir.runtime(tmp_path):
        pass
    assert (elsewhere / "file").exists()
