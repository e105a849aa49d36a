"""One hot path over a `ScriptedInference`, and an `Out` that remembers."""

from __future__ import annotations

import json
from typing import Any

from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.inference import Delta, Finished, Opened, Usage
from ollama_distributed.gateway.core import HotPath
from ollama_distributed.gateway.dialects import ollama, seed
from ollama_distributed.gateway.gate import Gate, Head
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy

HOST = {"host": "127.0.0.1:8080"}
WALL = 1_700_000_000.25
STAMP = "2023-11-14T22:13:20.250000Z"
USAGE = Usage(
    prompt_tokens=7, completion_tokens=2, total_s=0.5, load_s=0.25, prompt_s=0.125, completion_s=0.0625
)
HELLO = (Opened(prompt_tokens=7), Delta(text="Hel"), Delta(text="lo"), Finished(reason="stop", usage=USAGE))


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return WALL


class Recorder:
    """An `Out`: refuses a second end, as a socket would."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.streamed = False

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert self.status == 0, "two heads"
        self.status = status
        self.headers = {name.decode(): value.decode() for name, value in headers}

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self._begin(status, headers)
        self.body = body
        self.ended = True

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._begin(status, headers)
        self.streamed = True

    def write(self, data: bytes) -> None:
        assert self.streamed
        assert not self.ended
        self.body += data

    def end(self) -> None:
        assert not self.ended, "two ends"
        self.ended = True

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        assert self.body.endswith(b"\n")
        return [json.loads(line) for line in self.body.splitlines()]


class Bench:
    """Opens exchanges and keeps their summaries."""

    def __init__(
        self,
        inference: Any,
        *,
        limits: Limits | None = None,
        require_key: bool = False,
        keys: tuple[Any, ...] = (),
        policy: SitePolicy | None = None,
        routes: Any = (*ollama.ROUTES, *seed.ROUTES),
    ) -> None:
        self.inference = inference
        self.summaries: list[Any] = []
        self.tasks: list[Any] = []
        self.clock = Clock()
        self.path = HotPath(
            routes=routes,
            inference=inference,
            gate=Gate(
                Authenticator(keys, require_key=require_key, wall=self.clock.time),
                policy or SitePolicy(),
                limits or Limits(),
            ),
            clock=self.clock,
            observe=self.summaries.append,
            spawn=self.spawn,
        )

    def spawn(self, coroutine: Any) -> Any:
        """Runs it to its end at once: a fake answers without waiting."""
        try:
            coroutine.send(None)
        except StopIteration:
            return lambda: None
        raise AssertionError("the fake waited")

    def open(
        self, path: str, *, method: str = "POST", peer: str | None = "127.0.0.1", **headers: str
    ) -> tuple[Any, Recorder]:
        out = Recorder()
        fields = {**HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.path.open(Head(method, path, fields, 1, peer), out), out

    def post(self, path: str, body: Any, **headers: str) -> Recorder:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        exchange, out = self.open(path, **headers)
        exchange.receive(data)
        exchange.body_complete()
        return out
