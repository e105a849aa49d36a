"""The ASGI app of a node: the hot path for inference, FastAPI for the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.clock import Clock, SystemClock
from ollama_distributed.base.errors import Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.inference import Inference
from ollama_distributed.gateway import openapi
from ollama_distributed.gateway.asgi import Receive, Scope, Send, serve_hot
from ollama_distributed.gateway.auditing import Auditing, refused_entry
from ollama_distributed.gateway.batch_port import BatchLane
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdPath, handler, on_http_exception
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.disk_port import Disks
from ollama_distributed.gateway.events.channels import channels_of
from ollama_distributed.gateway.events.service import Events
from ollama_distributed.gateway.gate import Gate, Head, request_id
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.gateway.people_port import People
from ollama_distributed.gateway.placement_port import Places
from ollama_distributed.gateway.ports import (
    Bundles,
    Catalog,
    Moves,
    Preloaded,
    Residents,
    Transfers,
    VersionInfo,
)
from ollama_distributed.gateway.queue_port import Queues
from ollama_distributed.gateway.queueing import Shed, Turn
from ollama_distributed.gateway.rights import right_of
from ollama_distributed.gateway.route_port import Routes, told
from ollama_distributed.gateway.routes.access import access_routes
from ollama_distributed.gateway.routes.audit import audit_routes
from ollama_distributed.gateway.routes.batches import batch_routes
from ollama_distributed.gateway.routes.bundles import bundle_routes
from ollama_distributed.gateway.routes.cluster import cluster_routes
from ollama_distributed.gateway.routes.config import config_routes
from ollama_distributed.gateway.routes.disk import disk_routes
from ollama_distributed.gateway.routes.events import event_routes
from ollama_distributed.gateway.routes.node import ApiDocument, node_routes
from ollama_distributed.gateway.routes.nodes import nodes_routes
from ollama_distributed.gateway.routes.ollama import ollama_routes
from ollama_distributed.gateway.routes.openai import openai_routes
from ollama_distributed.gateway.routes.pages import page_routes
from ollama_distributed.gateway.routes.places import places_routes
from ollama_distributed.gateway.routes.queue import queue_routes
from ollama_distributed.gateway.routes.route import route_routes
from ollama_distributed.gateway.routes.seed import seed_routes
from ollama_distributed.gateway.routes.sign_in import sign_in_routes
from ollama_distributed.gateway.routes.table import ColdRoute, Node
from ollama_distributed.gateway.routes.transfers import transfer_routes
from ollama_distributed.gateway.routes.usage import usage_routes
from ollama_distributed.gateway.routes.users import users_routes
from ollama_distributed.gateway.summary import Observer, Summary
from ollama_distributed.gateway.tasks import Tasks
from ollama_distributed.gateway.usage_port import UsageDesk
from ollama_distributed.gateway.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Gateway:
    """ASGI; `hot` is what the fast protocol calls without ASGI in between."""

    def __init__(
        self,
        hot: HotPath,
        cold: ColdPath,
        routes: list[ColdRoute],
        tasks: Tasks,
        gate: Gate,
        events: Events,
        overload: Overload,
    ) -> None:
        self.hot = hot
        self.overload = overload
        self._events = events
        self._gate = gate
        self.cold_routes = routes
        self._cold = cold
        self._tasks = tasks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self.hot.serves(scope["path"]) and not _is_preflight(scope):
                await serve_hot(self.hot, scope, receive, send)
            else:
                await self._cold(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await self._events(scope, receive, send)

    def use(self, policy: SitePolicy) -> None:
        """Other host names and origins from now on."""
        self._gate.use(policy)

    async def close(self) -> None:
        """End the tasks that still wait for an answer. The server calls it at shutdown."""
        await self._tasks.close()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )


def create_app(
    *,
    inference: Inference,
    catalog: Catalog,
    residents: Residents,
    authenticator: Authenticator,
    version: VersionInfo,
    policy: SitePolicy | None = None,
    limits: Limits | None = None,
    clock: Clock | None = None,
    ready: Callable[[], bool] = lambda: True,
    cluster: Cluster | None = None,
    transfers: Transfers | None = None,
    moves: Moves | None = None,
    places: Places | None = None,
    bundles: Bundles | None = None,
    disks: Disks | None = None,
    batches: BatchLane | None = None,
    preloaded: Callable[[], Mapping[str, Preloaded]] = dict,
    queues: Queues | None = None,
    access: AccessDesk | None = None,
    audit: Auditing | None = None,
    people: People | None = None,
    routing: Routes | None = None,
    tell: Observer = lambda _: None,
    usage: UsageDesk | None = None,
    overload: Overload | None = None,
) -> Gateway:
    """The app. `policy`: names and origins beside loopback; `ready`: whether requests are taken;
    `cluster`: what the routes of the cluster work on (None: there are none); `transfers`: what
    moves models from and to registries; `moves`: and between nodes; `places`: where models fit and
    are wanted; `bundles`: models in one file; `disks`: what they are on; `batches`: what
    nobody waits for;
    `preloaded`: those that were to be loaded at the start; `tell`: writes the log's line of a request;
    `routing`: what chooses the nodes; `people`: users and sign-in; `overload`: what is given up while the
    node's memory is short (None: nothing)."""
    clock = clock or SystemClock()
    overload = overload or Overload()
    metrics = GatewayMetrics()
    tasks = Tasks()
    gate = Gate(authenticator, policy or SitePolicy(), limits or Limits())

    keep: Observer = told(routing, version.name) if routing is not None else lambda _: None

    def observe(summary: Summary) -> None:
        metrics.observe(summary)
        tell(summary)
        keep(summary)

    def observe_inference(summary: Summary) -> None:
        observe(summary)
        if usage is not None and summary.role:
            usage.count(summary)

    offload = Workers()
    hot = HotPath(
        routes=HOT_ROUTES,
        inference=inference,
        gate=gate,
        clock=clock,
        observe=observe_inference,
        spawn=tasks,
        offload=offload,
        node=version.name,
        shed=_shedding(overload, queues),
        meter=usage,
    )
    node = Node(
        catalog=catalog,
        residents=residents,
        version=version,
        metrics=metrics,
        wall=clock.time,
        ready=ready,
        cluster_status=(lambda: cluster.status().status) if cluster is not None else None,
        transfers=transfers,
        moves=moves,
        disks=disks,
        places=places,
        preloaded=preloaded,
        queues=queues,
        usage=usage,
        overload=overload,
    )

    def document() -> dict[str, Any]:
        return openapi.document(HOT_ROUTES, routes, version=version.version)

    channels = channels_of(queues, cluster, moves, wall=clock.time)
    routes = [
        *node_routes(node, ApiDocument(document, offload)),
        *event_routes(channels),
        *page_routes(people),
        *(transfer_routes(moves) if moves is not None else ()),
        *(bundle_routes(bundles) if bundles is not None else ()),
        *(places_routes(places) if places is not None else ()),
        *(disk_routes(disks, cluster) if disks is not None else ()),
        *(queue_routes(queues, cluster) if queues is not None else ()),
        *seed_routes(node),
        *ollama_routes(node),
        *openai_routes(node),
        *(batch_routes(batches) if batches is not None else ()),
        *(audit_routes(audit) if audit is not None else ()),
        *(usage_routes(usage, clock.time) if usage is not None else ()),
    ]
    if access is not None:
        routes += access_routes(access)
    if people is not None:
        routes += [*sign_in_routes(people), *users_routes(people)]
    if routing is not None:
        routes += route_routes(routing)
    if cluster is not None:
        routes += [*cluster_routes(cluster), *nodes_routes(cluster), *config_routes(cluster, ready)]
    if audit is not None:
        gate.refused = functools.partial(_record_refused, audit)
    cold = ColdPath(
        _fastapi(routes, version), gate=gate, clock=clock, observe=observe, offload=offload, audit=audit
    )
    events = Events(channels, gate=gate, clock=clock, observe=observe, tasks=tasks)
    return Gateway(hot, cold, routes, tasks, gate, events, overload)


def _shedding(overload: Overload, queues: Queues | None) -> Shed:
    def shed(identity: Identity, turn: Turn) -> None:
        if overload.refusing:
            raise overload.refuse()
        if queues is not None:
            queues.shed(identity, turn)

    return shed


def _record_refused(audit: Auditing, head: Head) -> None:
    audit.refused(refused_entry(head, request_id(head.headers), Unauthenticated.code))


def _fastapi(routes: list[ColdRoute], version: VersionInfo) -> FastAPI:
    # Its own pages load scripts from elsewhere: ours are in routes/node.py.
    app = FastAPI(
        title="Ollama Distributed", version=version.version, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.router.redirect_slashes = False
    app.add_exception_handler(HTTPException, on_http_exception)
    for route in routes:
        app.add_api_route(
            route.path,
            handler(
                right_of(route.method, route.path, route.verb),
                route.run,
                takes_json=route.body is not None,
            ),
            methods=[route.method],
            summary=route.summary,
            tags=[route.tag],
            response_model=None,
            include_in_schema=False,
        )
    return app
