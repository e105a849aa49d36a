"""What an order of places says and how it is followed, over answers that come one after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from ollama_distributed.base.placement import (
    MovedRow,
    PlaceRow,
    PlacesAnswer,
    PlacesList,
    RefusedRow,
    WhatIfAnswer,
)
from ollama_distributed.cli import placing
from ollama_distributed.cli.places_view import what_if_text
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.tables import Look
from ollama_distributed.client.errors import ClientError

A = PlaceRow(node="1", name="n1", copy=True, has=True, note="chosen, on disk")
B = PlaceRow(node="2", name="n2", copy=True, note="chosen, on disk", doing="fetch")
BEGUN = PlacesAnswer(model="m:latest", wanted=True, replicas=2, copies=2, have=1, settled=False, rows=(A, B))
FAILED = msgspec.structs.replace(
    BEGUN, rows=(A, msgspec.structs.replace(B, note="fetch failed once: no answer"))
)
DONE = msgspec.structs.replace(
    BEGUN, have=2, settled=True, rows=(A, msgspec.structs.replace(B, has=True, doing=""))
)
SHORT = msgspec.structs.replace(DONE, rows=(A,), missing=("does not fit",))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


class Client:
    """Answers in turn; what is an error is raised."""

    def __init__(self, *answers: Any, one: PlacesAnswer = DONE) -> None:
        self.models = self
        self._answers = list(answers)
        self._one = one

    def places(self, _model: str) -> PlacesAnswer:
        found = self._answers.pop(0) if self._answers else self._one
        if isinstance(found, Exception):
            raise found
        return found

    def all_places(self) -> PlacesList:
        found = self._answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return PlacesList(models=tuple(found))


def away() -> ClientError:
    error = ClientError("no server answers")
    error.retryable = True
    return error


def test_it_says_what_follows_and_what_comes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Client(away(), FAILED, DONE)
    placing.ordered(Session(), client, BEGUN, wait=True)
    told = capsys.readouterr()
    assert "STATE" in told.out
    assert told.err.splitlines() == [
        "n2 copies it (chosen, on disk)",
        "n2: fetch failed once: no answer",
        "n2 has it",
        "in place",
    ]


def test_nobody_has_to_wait(capsys: pytest.CaptureFixture[str]) -> None:
    nobody: Any = Client()
    placing.ordered(Session(), nobody, BEGUN, wait=False)
    assert capsys.readouterr().err == "n2 copies it (chosen, on disk)\n"
    placing.ordered(Session(output="json"), nobody, BEGUN, wait=False)
    assert json.loads(capsys.readouterr().out)["settled"] is False


def test_data_are_of_the_end_and_what_cannot_be_fails(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Client(SHORT)
    with pytest.raises(Problem, match="not all of it can be: does not fit"):
        placing.ordered(Session(output="json"), client, BEGUN, wait=True)
    assert json.loads(capsys.readouterr().out)["missing"] == ["does not fit"]


def test_a_refusal_ends_it() -> None:
    refused = ClientError("no")
    client: Any = Client(refused)
    with pytest.raises(ClientError):
        placing.ordered(Session(), client, BEGUN, wait=True)


@pytest.mark.parametrize(
    ("last", "one", "said"),
    [([DONE], DONE, "in place"), ([SHORT], SHORT, "on fewer nodes than is wanted: m:latest: does not fit")],
)
def test_a_drain_waits_until_nothing_moves(
    last: Sequence[PlacesAnswer], one: PlacesAnswer, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Client([BEGUN], away(), [BEGUN], last, one=one)
    placing.until_in_place(client)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "on its way: m:latest"
    assert said in told
    assert len(told) <= 3


def test_what_is_nowhere_else_is_a_failure() -> None:
    nowhere = msgspec.structs.replace(SHORT, rows=(msgspec.structs.replace(A, copy=False),))
    client: Any = Client([SHORT], one=nowhere)
    with pytest.raises(Problem, match="m:latest: does not fit"):
        placing.until_in_place(client)


def test_what_if_tells_what_goes_comes_and_is_loaded() -> None:
    answer = WhatIfAnswer(
        lost=("a",),
        moved=(MovedRow(model="m", gone=("a", "c"), new=("b", "c"), loads=("c",)),),
        no_longer=(
            RefusedRow(model="n", copies=1, loaded=2, reasons=("all 2 nodes that may have it have it",)),
        ),
        last_copies=("gone",),
        planned=2,
    )
    lines = [line.split() for line in what_if_text(answer, Look()).splitlines()]
    assert ["m", "a", "b", "c"] in lines
    assert "n lacks 1 copy and 2 loaded copies: all 2 nodes" in what_if_text(answer, Look())
    assert "nothing would move\n" in what_if_text(WhatIfAnswer(lost=("a",), planned=1), Look())
