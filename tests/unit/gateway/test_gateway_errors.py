import msgspec
import pytest

from ollama_distributed.base import errors as e
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.errors import (
    OLLAMA_STATUS,
    STATUS,
    as_ours,
    error_headers,
    render_ollama,
    render_seed,
    status_of,
)


def tree(root=e.OllamaDistributedError):
    yield root
    for below in root.__subclasses__():
        yield from tree(below)


OURS = [kind for kind in tree() if kind.__module__ == e.__name__]


@pytest.mark.parametrize("kind", OURS)
def test_every_error_has_a_status_of_its_own(kind):
    assert kind in STATUS
    assert kind in OLLAMA_STATUS
    assert 400 <= STATUS[kind] <= 599


def test_codes_are_unique():
    codes = [kind.code for kind in OURS if kind is not e.Internal]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", OURS)
def test_every_error_renders_in_both_shapes(kind):
    error = kind("what happened")
    seed = render_seed(error, RequestId("r1"))
    assert msgspec.json.decode(seed.body) == {
        "error": {
            "code": kind.code,
            "message": "what happened",
            "retryable": kind.retryable,
            "request_id": "r1",
        }
    }
    ollama = render_ollama(error, RequestId("r1"))
    assert list(msgspec.json.decode(ollama.body)) == ["error"]
    assert isinstance(msgspec.json.decode(ollama.body)["error"], str)


def test_a_new_subclass_gets_its_parents_status():
    class Fresh(e.ModelNotFound):
        code = "fresh"

    assert status_of(Fresh()) == 404


def test_queue_full_by_dialect():
    error = e.QueueFull("later", retry_after_s=2.2)
    assert render_seed(error, RequestId("r")).status == 429
    ollama = render_ollama(error, RequestId("r"))
    assert ollama.status == 503
    assert b"server busy, please try again.  maximum pending requests exceeded" in ollama.body
    assert 3 <= int(dict(ollama.headers)["retry-after"]) <= 12


def test_a_full_queue_spreads_who_comes_back():
    waits = {int(dict(error_headers(e.QueueFull("full"), f"r{n}"))["retry-after"]) for n in range(300)}
    assert waits == set(range(1, 11))


def test_headers_say_what_helps():
    never = {"x-should-retry": "false"}
    assert dict(error_headers(e.Unauthenticated("x"), "r")) == {"www-authenticate": "Bearer"} | never
    assert "retry-after" in dict(error_headers(e.Unavailable("x"), "r"))
    assert dict(error_headers(e.NotFound("x"), "r")) == never
    assert error_headers(e.RunnerDied("x"), "r") == ()


def test_a_foreign_exception_leaks_nothing():
    hidden = as_ours(ValueError("secret /path 0xdeadbeef"))
    assert isinstance(hidden, e.Internal)
    assert "secret" not in hidden.message
    own = e.NotFound("x")
    assert as_ours(own) is own
