"""The inference routes of all dialects: which request begins which exchange (`core.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from ollama_distributed.access.roles import INFERENCE
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import MethodNotAllowed
from ollama_distributed.base.inference import Inference
from ollama_distributed.gateway.body import Bodies
from ollama_distributed.gateway.core import Exchange
from ollama_distributed.gateway.dialects.contract import HotRoute
from ollama_distributed.gateway.entry import Entrance
from ollama_distributed.gateway.gate import Gate, Head
from ollama_distributed.gateway.jsonguard import JsonGuard
from ollama_distributed.gateway.means import Means, Spawn
from ollama_distributed.gateway.metering import Metering
from ollama_distributed.gateway.out import Out
from ollama_distributed.gateway.queueing import Shed
from ollama_distributed.gateway.rights import resource_of
from ollama_distributed.gateway.summary import Observer
from ollama_distributed.gateway.workers import Offload


class HotPath:
    """The inference routes of all dialects over one `Inference`."""

    def __init__(
        self,
        *,
        routes: Iterable[HotRoute],
        inference: Inference,
        gate: Gate,
        clock: Clock,
        observe: Observer,
        spawn: Spawn,
        offload: Offload,
        node: str = "",
        shed: Shed | None = None,
        meter: Metering | None = None,
    ) -> None:
        self.means = Means(
            inference=inference,
            entrance=Entrance(inference, meter),
            gate=gate,
            clock=clock,
            observe=observe,
            spawn=spawn,
            offload=offload,
            guard=JsonGuard(gate.limits),
            bodies=Bodies(gate.limits.bodies_bytes),
            node=node,
            shed=shed,
        )
        self._routes: dict[str, dict[str, HotRoute]] = {}
        for route in routes:
            if resource_of(route.method, route.path) != INFERENCE.resource:
                raise LookupError(f"{route.path} is no route of inference; see gateway/rights.py")
            methods = self._routes.setdefault(route.path, {})
            if route.method in methods:
                raise ValueError(f"two hot routes for {route.method} {route.path}")
            methods[route.method] = route

    def serves(self, path: str) -> bool:
        return path in self._routes

    def routes(self) -> list[HotRoute]:
        return [route for methods in self._routes.values() for route in methods.values()]

    def open(self, head: Head, out: Out) -> Exchange:
        """Begin an exchange on a path that is served. It may be over already: see `ended`."""
        methods = self._routes[head.path]
        route = methods.get(head.method)
        if route is not None:
            return Exchange(self.means, route, head, out)
        exchange = Exchange(self.means, next(iter(methods.values())), head, out)
        allowed = ", ".join(methods)
        exchange.fail(
            MethodNotAllowed(f"{head.method} is not allowed here; use {allowed}"),
            close=True,
            extra=[(b"allow", allowed.encode())],
        )
        return exchange
