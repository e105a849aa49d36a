"""A machine's seat among the coordination servers: in memory, changed by one owner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ollama_distributed.adapters.coordination.nats import seat as seats
from ollama_distributed.adapters.coordination.nats.seat import Formation, Place, Seat
from ollama_distributed.adapters.coordination.nats.voter import LocalVoter
from ollama_distributed.base.ids import NodeId

FORMATION = Formation(id="f", cluster="c", places=(Place(node=NodeId("a"), url="tls://a:1", route="a:2"),))


def voter(folder: Path) -> LocalVoter:
    server: Any = SimpleNamespace(folder=folder, name="a", change=lambda **_: None)
    return LocalVoter(server, advertise="a")


def test_it_is_read_once_and_kept_as_it_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seats.save(tmp_path, Seat(alone=True, port=7))
    one = voter(tmp_path)
    assert one.seat == Seat(alone=True, port=7)
    monkeypatch.setattr(seats, "load", lambda _: pytest.fail("it is known"))
    assert one.seat.alone
    one.sit(formation=FORMATION)
    assert one.seat == Seat(formation=FORMATION, port=7)
    monkeypatch.undo()
    assert seats.load(tmp_path) == one.seat == voter(tmp_path).seat


def test_one_that_could_not_be_written_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = voter(tmp_path)
    one.sit(alone=True)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(seats, "save", full)
    with pytest.raises(OSError, match="no space"):
        one.sit(formation=FORMATION)
    assert one.seat.alone
