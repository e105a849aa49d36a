"""The sans-IO hot path: admission, the one end of an exchange, cancel, backpressure."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway_bench import HELLO, USAGE, Bench

from ollama_distributed.access.keys import make_key
from ollama_distributed.base import errors as e
from ollama_distributed.base.inference import Delta, EmbedResult, Failed, Finished, Moved, Opened, Usage
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.gateway.workers import INLINE_BYTES
from ollama_distributed.testing.inference import ScriptedInference

GEN = {"model": "m", "prompt": "p"}
BODY = json.dumps(GEN).encode()


def held(**extra):
    one = Bench(ScriptedInference(hold=True), **extra)
    exchange, out = one.open("/api/generate")
    exchange.receive(BODY)
    exchange.body_complete()
    return one, exchange, out


# ── one end ─────────────────────────────────────────────────────────────────────────


def test_status_leaves_with_the_first_byte():
    one, _, out = held()
    one.inference.generations[0].emit(Opened(prompt_tokens=3))
    assert out.status == 0
    one.inference.generations[0].emit(Delta(text="a"))
    assert out.status == 200


def test_cancel_at_disconnect_and_silence_after():
    one, exchange, out = held()
    generation = one.inference.generations[0]
    generation.emit(Delta(text="a"))
    exchange.disconnected()
    exchange.disconnected()
    assert generation.cancelled == 1
    before = out.body
    generation.emit(Delta(text="b"), Finished(reason="stop"))
    assert out.body == before
    assert [summary.outcome for summary in one.summaries] == ["cancelled"]
    assert one.summaries[0].status == 499


def test_pause_and_resume_reach_the_generation():
    one, exchange, _ = held()
    exchange.pause()
    assert one.inference.generations[0].paused
    exchange.resume()
    assert not one.inference.generations[0].paused


def test_a_reader_that_is_slow_before_the_answer_begins():
    one = Bench(ScriptedInference(hold=True))
    exchange, _ = one.open("/api/generate")
    exchange.pause()
    exchange.receive(BODY)
    exchange.body_complete()
    assert one.inference.generations[0].paused
    exchange.resume()
    assert not one.inference.generations[0].paused


# ── large bodies ────────────────────────────────────────────────────────────────────

LARGE = json.dumps({**GEN, "system": "x" * INLINE_BYTES}).encode()


class Later(Bench):
    """Its tasks and threads run when the test says so."""

    def spawn(self, coroutine):
        self.tasks.append(coroutine)
        return coroutine.close

    def run(self):
        for task in self.tasks:
            super().spawn(task)


def sent_large(body=LARGE):
    one = Later(ScriptedInference(hold=True))
    exchange, out = one.open("/api/generate")
    exchange.receive(body)
    exchange.body_complete()
    return one, exchange, out


def test_a_large_body_is_read_apart_from_the_loop():
    one, _, out = sent_large()
    assert not one.inference.generations
    one.run()
    one.inference.generations[0].emit(Delta(text="a"), Finished(reason="stop"))
    assert out.ended
    assert one.path.means.bodies.held_bytes == 0


def test_a_client_that_goes_away_while_a_large_body_is_read():
    one, exchange, out = sent_large()
    exchange.disconnected()
    assert one.path.means.bodies.held_bytes == 0
    one.run()
    assert not one.inference.generations
    assert out.status == 0
    assert [summary.outcome for summary in one.summaries] == ["cancelled"]


@pytest.mark.parametrize("body", [LARGE + b"x", LARGE.replace(b'"m"', b"3", 1)])
def test_a_large_body_that_is_refused(body):
    one, _, out = sent_large(body)
    one.run()
    assert out.status == 400
    assert len(one.summaries) == 1


def test_a_slow_reader_while_a_large_body_is_read():
    one, exchange, _ = sent_large()
    exchange.pause()
    one.run()
    assert one.inference.generations[0].paused


class CountingBench(Bench):
    offloaded = 0

    async def offload(self, work):
        self.offloaded += 1
        return work()


@pytest.mark.parametrize(("inputs", "offloaded"), [(2, 0), (40, 1)])
@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
def test_many_vectors_are_written_apart_from_the_loop(path, inputs, offloaded):
    vectors = tuple((float(number),) * 512 for number in range(inputs))
    one = CountingBench(ScriptedInference(embedded=EmbedResult(vectors=vectors)), routes=HOT_ROUTES)
    told = one.post(path, {"model": "m", "input": ["x"] * inputs}).json()
    found = told["embeddings"] if path == "/api/embed" else [row["embedding"] for row in told["data"]]
    assert found == [list(vector) for vector in vectors]
    assert one.offloaded == offloaded


def test_a_byte_a_chunk_takes_no_more_memory_than_the_bytes():
    one = Bench(ScriptedInference(HELLO))
    exchange, out = one.open("/api/generate")
    body = json.dumps({**GEN, "system": "x" * 60_000, "stream": False}).encode()
    tracemalloc.start()
    try:
        for byte in body:
            exchange.receive(bytes((byte,)))
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 2 * len(body)
    exchange.body_complete()
    assert out.json()["response"] == "Hello"


EVENTS = st.lists(
    st.sampled_from(
        [
            Opened(prompt_tokens=1),
            Delta(text="x"),
            Finished(reason="stop", usage=USAGE),
            Failed(e.RunnerDied("gone")),
            "disconnect",
            "pause",
            "resume",
        ]
    ),
    max_size=12,
)


@given(EVENTS)
def test_every_exchange_ends_at_most_once(events):
    """Whatever comes in whatever order: one head, one end, one summary."""
    one, exchange, out = held()
    generation = one.inference.generations[0]
    for event in events:
        match event:
            case "disconnect":
                exchange.disconnected()
            case "pause":
                exchange.pause()
            case "resume":
                exchange.resume()
            case _:
                generation.emit(event)
    last = [event for event in events if isinstance(event, Finished | Failed) or event == "disconnect"]
    assert exchange.ended == bool(last)
    assert len(one.summaries) == bool(last)
    if last and last[0] != "disconnect":
        assert out.ended
    if last and isinstance(last[0], Failed):
        assert generation.cancelled == 1


def test_several_choices_end_together():
    one = Bench(ScriptedInference(hold=True), routes=HOT_ROUTES)
    body = {"model": "m", "messages": [{"role": "user", "content": "p"}], "n": 2, "stream": True}
    exchange, out = one.open("/v1/chat/completions")
    exchange.receive(json.dumps(body).encode())
    exchange.body_complete()
    first, second = one.inference.generations
    first.emit(Delta(text="a"), Finished(reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=2)))
    assert not out.ended
    second.emit(Delta(text="b"), Finished(reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=3)))
    assert out.ended
    assert one.summaries[0].usage.prompt_tokens == 5
    assert one.summaries[0].usage.completion_tokens == 5


def test_one_failed_choice_ends_the_others():
    one = Bench(ScriptedInference(hold=True), routes=HOT_ROUTES)
    body = {"model": "m", "messages": [{"role": "user", "content": "p"}], "n": 2}
    exchange, out = one.open("/v1/chat/completions")
    exchange.receive(json.dumps(body).encode())
    exchange.body_complete()
    first, second = one.inference.generations
    first.emit(Failed(e.QueueFull("full")))
    assert out.status == 429
    assert second.cancelled == 1


def test_a_failure_inside_open_opens_no_more():
    one = Bench(ScriptedInference([Failed(e.QueueFull("full"))]), routes=HOT_ROUTES)
    body = {"model": "m", "messages": [{"role": "user", "content": "p"}], "n": 3}
    out = one.post("/v1/chat/completions", body)
    assert out.status == 429
    assert len(one.inference.generations) == 1


def test_questions_fail_in_their_dialect():
    one = Bench(ScriptedInference(error=e.Unavailable("starting")), routes=HOT_ROUTES)
    out = one.post("/v1/embeddings", {"model": "m", "input": "x"})
    assert out.status == 503
    assert out.headers["retry-after"] == "1"
    assert one.summaries[0].error_code == "unavailable"


# ── an answer that went on elsewhere ────────────────────────────────────────────────

MOVED = (
    Opened(prompt_tokens=7, node="n2"),
    Delta(text="Hel"),
    Moved(node="n3"),
    Delta(text="lo"),
    Finished(reason="stop", usage=USAGE, moves=1),
)
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "p"}], "max_tokens": 9}


def test_lines_say_at_their_end_that_another_node_went_on():
    one = Bench(ScriptedInference(MOVED))
    out = one.post("/api/generate", GEN)
    assert "".join(line["response"] for line in out.lines()) == "Hello"
    assert [line.get("failovers") for line in out.lines()] == [None, None, 1]
    assert "x-ollama-failovers" not in out.headers
    (summary,) = one.summaries
    assert (summary.node, summary.moves) == ("n3", 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_server_sent_events_say_so_in_a_comment(path):
    one = Bench(ScriptedInference(MOVED), routes=HOT_ROUTES)
    out = one.post(path, {**MESSAGES, "stream": True})
    calm = Bench(ScriptedInference([e for e in MOVED if not isinstance(e, Moved)]), routes=HOT_ROUTES)
    without = calm.post(path, {**MESSAGES, "stream": True}, x_request_id=out.headers["x-request-id"])
    assert out.body.replace(b": goes on at n3\n\n", b"") == without.body


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_an_answer_in_one_piece_says_so_in_a_header(path):
    one = Bench(ScriptedInference(MOVED), routes=HOT_ROUTES)
    out = one.post(path, {**MESSAGES, "stream": False})
    assert (out.headers["x-ollama-failovers"], out.headers["x-ollama-node"]) == ("1", "n3")
    assert b"Hello" in out.body


def test_what_nobody_sees_before_its_end_may_begin_again():
    for stream in (True, False):
        for bound in ({}, {"format": "json"}):
            one = Bench(ScriptedInference(HELLO))
            one.post("/api/generate", {**GEN, **bound, "stream": stream})
            (request,) = one.inference.requests
            assert request.whole == (not stream)


def test_a_client_says_what_it_has():
    one = Bench(ScriptedInference(HELLO))
    assert one.post("/api/generate", GEN, x_request_id="r1", x_ollama_resume_at="12").status == 200
    assert one.post("/api/generate", GEN, x_request_id="r1").status == 200
    assert [request.resume_at for request in one.inference.requests] == [12, None]
    for bad in ("-1", "x", "", "9" * 13, "1.5"):
        assert one.post("/api/generate", GEN, x_request_id="r1", x_ollama_resume_at=bad).status == 400
    assert one.post("/api/generate", GEN, x_ollama_resume_at="1").status == 400
    several = Bench(ScriptedInference(HELLO), routes=HOT_ROUTES)
    out = several.post(
        "/v1/chat/completions", {**MESSAGES, "n": 2}, x_request_id="r1", x_ollama_resume_at="1"
    )
    assert out.status == 400


# ── the summary ─────────────────────────────────────────────────────────────────────


def test_the_summary_tells_all_but_the_prompt():
    one = Bench(ScriptedInference(HELLO))
    one.post("/api/generate", {"model": "m", "prompt": "CANARY"})
    (summary,) = one.summaries
    assert (summary.route, summary.status, summary.outcome) == ("/api/generate", 200, "ok")
    assert summary.usage == USAGE
    assert summary.model == "m"
    assert summary.role == "local"
    assert summary.bytes_out > 0
    assert "CANARY" not in repr(summary)


# ── admission ───────────────────────────────────────────────────────────────────────


def test_keys_and_who_may():
    plain, record = make_key("admin", now=0.0)
    one = Bench(ScriptedInference(HELLO), keys=(record,), require_key=True)
    assert one.post("/api/generate", GEN).status == 401
    assert one.post("/api/generate", GEN, authorization=f"Bearer {plain}").status == 200
    assert one.post("/api/generate", GEN, authorization=f"bearer {plain}").status == 200
    assert one.post("/api/generate", GEN, x_api_key=plain).status == 200
    assert one.post("/api/generate", GEN, authorization=f"Bearer {plain}x").status == 401
    assert one.post("/api/generate", GEN, authorization=f"Basic {plain}").status == 401
    assert one.inference.requests[0].identity.role == "admin"
    assert all(plain not in repr(summary) for summary in one.summaries)


@pytest.mark.parametrize(
    ("peer", "host", "status"),
    [
        ("127.0.0.1", "localhost:8080", 200),
        ("127.8.8.8", "127.0.0.1", 200),
        ("::1", "[::1]:8080", 200),
        ("10.0.0.5", "localhost", 401),
        ("127.0.0.1", "node.example", 401),
        (None, "localhost", 401),
    ],
)
def test_local_is_peer_and_host(peer, host, status):
    one = Bench(ScriptedInference(HELLO), policy=SitePolicy(hosts=["node.example"]))
    exchange, out = one.open("/api/generate", peer=peer, host=host)
    exchange.receive(BODY)
    exchange.body_complete()
    assert out.status == status


@pytest.mark.parametrize("sent", [{}, {"authorization": "Bearer unused"}])
def test_who_comes_through_a_proxy_is_told_why_a_key_is_needed(sent):
    one = Bench(ScriptedInference(HELLO))
    assert one.post("/api/generate", GEN, **sent).status == 200
    refused = one.post("/api/generate", GEN, x_forwarded_for="127.0.0.1", **sent)
    assert (refused.status, "through a proxy" in json.loads(refused.body)["error"]) == (401, True)


@pytest.mark.parametrize("given_id", ["a", "req-1.2:3_4", "A" * 64])
def test_a_good_request_id_is_kept(given_id):
    assert (
        Bench(ScriptedInference(HELLO))
        .post("/api/generate", GEN, x_request_id=given_id)
        .headers["x-request-id"]
        == given_id
    )


@pytest.mark.parametrize(("path", "named"), [("/v1/messages", True), ("/v1/chat/completions", False)])
def test_clients_of_anthropics_read_the_id_by_its_own_name(path, named):
    out = Bench(ScriptedInference(HELLO), routes=HOT_ROUTES).post(path, MESSAGES)
    assert out.status == 200
    assert out.headers.get("request-id") == (out.headers["x-request-id"] if named else None)


@pytest.mark.parametrize("given_id", ["", "a b", "a\r\nb", "é", "A" * 65, "-a", "<script>"])
def test_a_bad_request_id_is_replaced(given_id):
    out = Bench(ScriptedInference(HELLO)).post("/api/generate", GEN, x_request_id=given_id)
    assert out.headers["x-request-id"] != given_id
    assert len(out.headers["x-request-id"]) == 16


def test_body_limits_by_route():
    limits = Limits(body_bytes=100, large_body_bytes=1000)
    one = Bench(ScriptedInference(HELLO, embedded=EmbedResult(vectors=())), limits=limits)
    assert one.post("/api/generate", {**GEN, "prompt": "p" * 500}).status == 200
    assert one.post("/api/embed", {"model": "m", "input": "p" * 500}).status == 413
    exchange, out = one.open("/api/embed", content_length="101")
    assert out.status == 413
    assert exchange.ended
    assert out.headers["connection"] == "close"


def test_all_bodies_together_are_bounded():
    one = Bench(ScriptedInference(hold=True), limits=Limits(bodies_bytes=1000))
    exchange, out = one.open("/api/generate")
    exchange.receive(b"x" * 900)
    late, refused = one.open("/api/generate")
    late.receive(b"x" * 200)
    assert refused.status == 503
    assert out.status == 0
    exchange.disconnected()
    assert one.path.means.bodies.held_bytes == 0
    again, fine = one.open("/api/generate")
    again.receive(BODY)
    again.body_complete()
    assert fine.status == 0
    one.inference.generations[0].emit(Finished(reason="stop"))
    assert fine.status == 200
    assert one.path.means.bodies.held_bytes == 0


def test_long_strings_by_route():
    limits = Limits(string_bytes=100, large_string_bytes=1000)
    one = Bench(ScriptedInference(HELLO), limits=limits)
    assert one.post("/api/generate", {**GEN, "prompt": "p" * 500}).status == 200
    assert one.post("/api/generate", {**GEN, "prompt": "p" * 1500}).status == 400
    assert one.post("/api/embed", {"model": "m", "input": "p" * 500}).status == 400


def test_unknown_fields_reach_nothing():
    one = Bench(ScriptedInference(HELLO))
    one.post("/api/generate", {**GEN, "chat_parser": "x", "options": {"slot_save_path": "/etc", "seed": 1}})
    assert "slot_save_path" not in repr(one.inference.requests[0])
    assert "chat_parser" not in repr(one.inference.requests[0])


@pytest.mark.parametrize("route", HOT_ROUTES, ids=lambda route: route.path)
def test_every_hot_route_refuses_strangers_and_empty_bodies(route):
    one = Bench(ScriptedInference(HELLO), routes=HOT_ROUTES)
    _, out = one.open(route.path, peer="10.0.0.1")
    assert out.status == 401
    _, out = one.open(route.path, host="evil.example")
    assert out.status == 403
    assert one.post(route.path, b"").status == 400
    assert one.post(route.path, b"[]").status == 400
    assert one.inference.requests == []


def test_origin_settings_refuse_a_star():
    for entry in ("*", "https://*", "example.com", "https://*.example.com"):
        with pytest.raises(e.Invalid, match="origin"):
            SitePolicy(origins=[entry])
    policy = SitePolicy(origins=["https://app.example", "http://dev.example:*"])
    assert policy.allows_origin("https://app.example", "localhost")
    assert not policy.allows_origin("https://app.example:8443", "localhost")
    assert policy.allows_origin("http://dev.example:3000", "localhost")
    assert not policy.allows_origin("https://dev.example:3000", "localhost")


@given(st.text(max_size=40))
def test_no_host_text_breaks_the_check(host):
    policy = SitePolicy()
    try:
        assert policy.check_host({"host": host}) is True
    except (e.ForeignHost, e.Invalid):
        return
    assert host.lower().rstrip("0123456789").rstrip(":").rstrip(".").strip("[]")
