"""Rerank: best first, as Cohere and Jina clients read it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import RerankResult, Usage
from ollama_distributed.gateway.dialects.contract import RequestContext, Rerank
from ollama_distributed.gateway.dialects.rerank import ROUTES, parse_rerank

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.5)


def parse(**fields: Any) -> Rerank:
    body = {"model": "m", "query": "q", "documents": ["a", {"text": "b"}, "c"]} | fields
    return parse_rerank(json.dumps(body).encode(), CONTEXT)


def test_request() -> None:
    request = parse(rank_fields=["text"], options={"num_ctx": 64}).request
    assert (request.query, request.documents, request.options.num_ctx) == ("q", ("a", "b", "c"), 64)


def test_answer() -> None:
    result = RerankResult(scores=(0.1, 0.9, 0.5), usage=Usage(prompt_tokens=6))
    answer = json.loads(parse(top_n=2, return_documents=True).encode(result))
    assert answer == {
        "id": "rerank-r1",
        "object": "list",
        "model": "m",
        "results": [
            {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
            {"index": 2, "relevance_score": 0.5, "document": {"text": "c"}},
        ],
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


@settings(deadline=None)  # a busy machine is not a defect
@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=10),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_ranking(scores: list[float], top_n: int | None) -> None:
    call = parse(documents=["x"] * len(scores), top_n=top_n)
    results = json.loads(call.encode(RerankResult(scores=tuple(scores))))["results"]
    assert len(results) == min(top_n or len(scores), len(scores))
    keys = [(-row["relevance_score"], row["index"]) for row in results]
    assert keys == sorted((-score, index) for index, score in enumerate(scores))[: len(results)]
    assert all("document" not in row for row in results)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": [1]}, "documents[0]"),
        ({"documents": [{"title": "x"}]}, "documents[0]"),
        ({"documents": ["x"] * 10_001}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"model": None}, "model"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_routes() -> None:
    assert [route.path for route in ROUTES] == ["/v1/rerank", "/v2/rerank", "/rerank"]
