"""What all remote runners share: the way there, running calls, and how a runner ends.

A remote runner is a claim on a model that another process serves. It dies when that
process cannot be reached any more: the first broken call asks for its health, and when
there is none, all calls fail with `RunnerDied` as they do for a process of our own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.call import Call, ErrorReader, EventParser, Framing
from ollama_distributed.adapters.engines.fetch import fetch, fetch_json
from ollama_distributed.adapters.engines.framing import Lines
from ollama_distributed.adapters.engines.http import Route
from ollama_distributed.adapters.engines.intake import Intake
from ollama_distributed.adapters.engines.kept import Kept
from ollama_distributed.adapters.engines.remote.settings import Remote
from ollama_distributed.base.errors import (
    EngineError,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import Message, Think, Tool
from ollama_distributed.base.tokens import EngineSink
from ollama_distributed.serving.ports import EngineInfo, LoadPlan, RunnerMetrics

QUICK_S = 30.0
"""Tokens, templates: no work of the model."""
HEALTH_S = 2.0
SLOW_HEALTH_S = 30.0
"""Of a server whose health route is not known to answer beside its work."""


class RemoteRunner:
    """Base of the runners of one remote server."""

    health_path: str
    health_s = HEALTH_S
    renders = True
    """As far as is known; the server is asked."""

    def __init__(
        self,
        remote: Remote,
        model: str,
        plan: LoadPlan,
        info: EngineInfo,
        *,
        read_error: ErrorReader,
        deadline_s: float,
        on_gone: Callable[[RemoteRunner], None],
        kept: Kept | None = None,
        reads: Intake | None = None,
    ) -> None:
        """`model`: its name over there. `kept`: connections that it may use again. `reads`: the
        streams, from their second token on."""
        self.remote = remote
        self.model = model
        self._plan = plan
        self._info = info
        self._read_error = read_error
        self._deadline_s = deadline_s
        self._on_gone = on_gone
        self._kept = kept
        self._reads = reads
        self._routes: dict[str, Route] = {}
        self._calls: set[Call] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._exits: list[Callable[[OllamaDistributedError | None], None]] = []
        self._gone = False
        self._death: RunnerDied | None = None

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def plan(self) -> LoadPlan:
        return self._plan

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def memory_bytes(self) -> int:
        """Of this node's: none. The other server accounts for its own."""
        return 0

    def on_exit(self, callback: Callable[[OllamaDistributedError | None], None]) -> None:
        if self._gone:
            callback(self._death)
        else:
            self._exits.append(callback)

    async def healthy(self) -> bool:
        if self._gone:
            return False
        try:
            answer = await fetch(
                self.remote.address,
                "GET",
                self.remote.prefix + self.health_path,
                headers=self.remote.headers,
                deadline_s=self.health_s,
            )
        except OllamaDistributedError:
            return False
        return answer.status == 200

    async def template_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> tuple[int, ...] | None:
        """Nothing, where a server renders text or does not show what it renders."""

    async def metrics(self) -> RunnerMetrics:
        """Of this node's calls; the server's own figures where it has them."""
        busy = len(self._calls)
        slots = self._plan.slots
        return RunnerMetrics(slots=slots, slots_busy=min(busy, slots), queued=max(busy - slots, 0))

    async def unload(self, grace_s: float = 2.0) -> None:  # noqa: ARG002 - nothing of ours has to end
        """Let go of the model; running calls end. Idempotent."""
        if not self._gone:
            await self._let_go()
        self._end(None)

    async def _let_go(self) -> None:
        """Tell the server, where it can unload."""

    # ── calls ───────────────────────────────────────────────────────────────────────

    def _stream(
        self,
        path: str,
        body: Mapping[str, Any],
        sink: EngineSink,
        parser: EventParser,
        framing: Callable[[], Framing],
        *,
        joins: bool = False,
    ) -> Call:
        """`joins`: tokens that came together may be told together."""
        call = self._call(sink, framing, joins=joins)
        if self._gone:
            self._later(call, self._unavailable())
        else:
            self._send(call, path, body, parser)
        return call

    def _stream_after(
        self,
        prepare: Awaitable[tuple[str, Mapping[str, Any]]],
        sink: EngineSink,
        parser: EventParser,
        framing: Callable[[], Framing],
    ) -> Call:
        """As `_stream`, where path and body have to be asked for first."""
        call = self._call(sink, framing)

        async def steps() -> None:
            path, body = await prepare
            self._send(call, path, body, parser)

        call.prepare(steps)
        return call

    def _send(self, call: Call, path: str, body: Mapping[str, Any], parser: EventParser) -> None:
        route = self._routes.get(path)
        if route is None:
            remote = self.remote
            route = self._routes[path] = Route(
                remote.address, "POST", remote.prefix + path, remote.headers, kept=self._kept
            )
        call.send(route, body, parser)

    def _background(self, steps: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(steps, name=name)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _refuse(self, sink: EngineSink, error: OllamaDistributedError) -> Call:
        """A call that cannot be made ends with the next turn of the loop."""
        call = self._call(sink, Lines)
        self._later(call, error)
        return call

    def _call(self, sink: EngineSink, framing: Callable[[], Framing], *, joins: bool = False) -> Call:
        call = Call(
            sink,
            self._calls.discard,
            self._lost,
            read_error=self._read_error,
            framing=framing,
            intake=self._reads,
            joins=joins,
        )
        self._calls.add(call)
        return call

    def _later(self, call: Call, error: OllamaDistributedError) -> None:
        asyncio.get_running_loop().call_soon(call.fail, error)

    async def _ask(self, method: str, path: str, body: Any = None, *, deadline_s: float = QUICK_S) -> Any:
        """One question with a whole answer.

        Raises:
            OllamaDistributedError: the server's own error, or `RunnerDied`.
        """
        if self._gone:
            raise self._unavailable()
        try:
            status, value = await fetch_json(
                self.remote.address,
                method,
                self.remote.prefix + path,
                headers=self.remote.headers,
                body=body,
                deadline_s=deadline_s,
                kept=self._kept,
            )
        except (RunnerDied, Unavailable) as exc:
            raise await self._why(exc) from exc
        if status >= 400:
            raise self._read_error(status, msgspec.json.encode(value))
        if not isinstance(value, dict | list):
            raise EngineError(f"{self.remote.address} answered {path} with something unexpected")
        return value

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _unavailable(self) -> OllamaDistributedError:
        return self._death or Unavailable(f"{self.model} is unloaded")

    def _lost(self, call: Call, error: OllamaDistributedError) -> None:
        async def tell() -> None:
            call.fail(await self._why(error))

        self._background(tell(), "ask a remote engine's health")

    async def _why(self, error: OllamaDistributedError) -> OllamaDistributedError:
        if not self._gone and not await self.healthy():
            self._end(RunnerDied(f"{self.remote.address} is gone: {error.message}"))
        return self._unavailable() if self._gone else error

    def kill(self, reason: str) -> None:
        self._end(RunnerDied(f"{self.remote.address} was given up: {reason}"))

    def _end(self, error: RunnerDied | None) -> None:
        if self._gone:
            return
        self._gone, self._death = True, error
        for call in list(self._calls):
            call.fail(self._unavailable())
        if self._kept is not None:
            self._kept.close()
        self._on_gone(self)
        for callback in self._exits:
            callback(error)


def unsupported(server: str, what: str) -> Unsupported:
    return Unsupported(f"{server} cannot {what}")
