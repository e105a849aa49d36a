"""One node: built from its settings, run until told to stop.

The order matters both ways. Up: lock the folder, bind the sockets (a taken port is said
before anything is loaded), engines, store, catalogue, serving, the app. Down: accept no
more, let running answers end until the drain deadline, unload, close.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import structlog

from ollama_distributed._version import __version__
from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.people import People
from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.peers.usage import UsageExchange, open_usage_door
from ollama_distributed.adapters.peers.written import open_written
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.cluster.identity.tokens import parse_token
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.app import Gateway, create_app
from ollama_distributed.gateway.inside import Inside
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.ports import VersionInfo
from ollama_distributed.node import data_dir, doors, logs
from ollama_distributed.node.api_tls import CertificateFiles
from ollama_distributed.node.audit import AuditCare
from ollama_distributed.node.batches import batch_care, owners
from ollama_distributed.node.cluster import identity as identities
from ollama_distributed.node.cluster.audit import TrustAudit
from ollama_distributed.node.cluster.book import ClusterBook, KeyUses
from ollama_distributed.node.cluster.keeper import Keeper, join_first
from ollama_distributed.node.cluster.keys import SharedKeys
from ollama_distributed.node.cluster.seat import SeatFile
from ollama_distributed.node.cluster.wiring import in_cluster
from ollama_distributed.node.disk import disk_care, read_uses
from ollama_distributed.node.draining import Draining
from ollama_distributed.node.engines import Engines, make_engines
from ollama_distributed.node.garbage import settle
from ollama_distributed.node.listeners import bind_all, bound
from ollama_distributed.node.logs import threshold
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.people.wiring import people_of
from ollama_distributed.node.placing import NodeMover, Placing
from ollama_distributed.node.polite.settings import policy_of
from ollama_distributed.node.preload import Preload
from ollama_distributed.node.queue import NodeQueue, bounds_of
from ollama_distributed.node.reach import sites_of, urls_of
from ollama_distributed.node.registries import registry_transfers
from ollama_distributed.node.settings import Settings
from ollama_distributed.node.swarm import Uplink, model_moves
from ollama_distributed.node.together import work_together
from ollama_distributed.node.usage import usage_of
from ollama_distributed.serving.machine import LocalMachine
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.residents import Ticket
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.streams.service import Answers

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

OLLAMA_API = "0.32.15"
"""The Ollama version whose API is spoken (`/api/version`); clients compare it with what they need."""
DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_LOADED_MODELS = 3
MIB = 1024 * 1024


async def run_node(
    settings: Settings, announce: Callable[[str], None], *, token: str | None = None, if_alone: bool = False
) -> None:
    """Run a node until SIGINT or SIGTERM. `announce` gets the one `ready` line. `token`: join
    a cluster with it before anything else; `if_alone`: unless it is in one with others already.

    Raises:
        Conflict: the data folder or a chosen port is in use.
        Invalid, LoadFailed, Unavailable: the node cannot run as configured; says why.
    """
    stop = doors.Stop()
    with stop.on_signals(), data_dir.locked(settings.data_dir), contextlib.ExitStack() as sockets:
        now = SystemClock().time()
        node = data_dir.node_id(settings.data_dir, now)
        if token is not None and not (if_alone and await asyncio.to_thread(_among_others, settings)):
            await join_first(settings.data_dir, node, parse_token(token), mdns=settings.mdns)
        listeners = bind_all(settings.listen, chosen="listen" in settings.model_fields_set)
        for listener in listeners:
            sockets.callback(listener.close)
        urls = urls_of([bound(listener) for listener in listeners], settings)
        url = min(urls, key=lambda text: text.startswith("https:"))
        keys = data_dir.keys(settings.data_dir, url, now, settings.name)
        # A public name means a proxy or other machines: nobody is at this one for sure.
        require_key = settings.require_key or bool(settings.allowed_hosts)
        authenticator = Authenticator(keys, require_key=require_key, wall=SystemClock.time)
        limits = Limits()

        def started() -> None:
            log.info("node.listening", urls=urls)
            if url.startswith("https:") and settings.tls_certificate is None:
                data_dir.trust(settings.data_dir, IdentityFiles(settings.data_dir).authorities.read_text())
            announce(f"ready {url} node={node}")
            settle()
            keeper.begin()
            preload.begin()

        async with _built(settings, node, urls, authenticator, limits, stop) as (app, keeper, preload):
            if any(text.startswith("https:") for text in urls):
                keeper.begin()  # the API's certificate comes with the node's identity
            await doors.serve(
                app,
                listeners,
                limits=limits,
                drain_s=_drain_s(settings),
                certificate=_certificate(settings),
                stop=stop,
                on_started=started,
            )


@contextlib.asynccontextmanager
async def _built(
    settings: Settings,
    node: NodeId,
    urls: Sequence[str],
    authenticator: Authenticator,
    limits: Limits,
    stop: doors.Stop,
) -> AsyncIterator[tuple[Gateway, Keeper, Preload]]:
    """The app over everything below it; on exit, drained and closed."""
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as closing:
        runners = closing.enter_context(data_dir.runtime(settings.data_dir))
        engines = await make_engines(settings, runners, authenticator.one_tenant)
        for engine in engines.all:
            closing.push_async_callback(engine.close)
        store = BlobStore(settings.store_dir)
        closing.callback(store.close)
        catalog = Catalog(store, remotes=engines.remotes, clock=clock, on_change=lambda: models_changed())
        models_changed: Callable[[], None] = _nobody_to_tell
        await catalog.start()
        refreshing = asyncio.create_task(catalog.run(), name="catalog refresh")
        closing.push_async_callback(end, [refreshing])
        uses = read_uses(settings.data_dir, clock)
        waiting: Admission[Ticket] = Admission(clock, bounds_of(settings))
        serving = Serving(
            catalog,
            engines.all,
            LocalMachine(),
            clock,
            serving_settings(settings),
            used=uses.served,
            queue=waiting,
        )
        # The HTTP server has let answers end by then: what still runs has had its time.
        closing.push_async_callback(serving.close, 0.0)

        def apply(live: Settings) -> None:
            """Settings that the cluster set, while the node runs."""
            serving.configure(serving_settings(live))
            waiting.configure(bounds_of(live))
            here.source.use(live.routing_policy)
            app.use(sites_of(live))
            threshold.use("debug" if live.debug else live.log_level)
            stop.drain_within(_drain_s(live))
            freeing.patience_s = live.drain_timeout
            transfers.limit(live)
            uplink.use(live)
            placing.use(live)
            disk.use(live)
            usage.use(live)
            here.polite.use(policy_of(live))

        placing = Placing(settings)
        recording = AuditCare(settings, node, clock)
        people = SharedPeople(settings.data_dir, People(wall=clock.time))
        authenticator.know(people.people)
        key_uses = KeyUses(settings.data_dir, authenticator.used, clock.time)
        transfers = await closing.enter_async_context(
            registry_transfers(settings, node, store, catalog, clock)
        )
        here = await closing.enter_async_context(
            in_cluster(
                settings,
                node,
                clock=clock,
                catalog=catalog,
                serving=serving,
                engines=[engine.info for engine in engines.all],
                api=urls,
                apply=apply,
                keys=SharedKeys(settings.data_dir, node, authenticator.own, authenticator.share, key_uses),
                people=people,
                placing=placing,
                audit=TrustAudit(recording.chain),
                missed=uses.miss,
                told=authenticator.told,
                outside=transfers.looking,
            )
        )
        models_changed = here.keeper.changed

        async def evict(model: str, of: str, /, *, last_copy: bool) -> EvictAnswer:
            return await disk.everywhere.evict(model, of, last_copy=last_copy)

        uplink = Uplink(settings, lambda: any(model.slots_busy for model in serving.loaded()))
        moves = await closing.enter_async_context(
            model_moves(
                node,
                store=store,
                catalog=catalog,
                pool=here.keeper.parts.pool,
                door=here.keeper.parts.door,
                state=lambda: here.keeper.state,
                resolve=here.catalog.resolve,
                fetches=transfers.pulls.fetches,
                downloads=transfers.downloads,
                download=transfers.download,
                delete=here.catalog.delete,
                evict=evict,
                tally=transfers.traffic.tally,
                leaving=uplink.leaving,
                coming=uplink.coming,
                clock=clock,
                served=uses.used,
            )
        )
        work_together(
            transfers,
            moves,
            here.catalog,
            node,
            store=store,
            library=catalog,
            pool=here.keeper.parts.pool,
            door=here.keeper.parts.door,
            state=lambda: here.keeper.state,
            clock=clock,
        )
        disk = await closing.enter_async_context(
            disk_care(
                settings,
                node,
                store=store,
                catalog=catalog,
                serving=serving,
                uses=uses,
                shelves=moves.shelves,
                copies=moves.manager.moves,
                pool=here.keeper.parts.pool,
                door=here.keeper.parts.door,
                state=lambda: here.keeper.state,
                clock=clock,
            )
        )
        placing.mover = NodeMover(
            models=catalog,
            runs=serving,
            copies=moves.manager.moves,
            drop=disk.own.evictions.drop,
            room=disk.own.room_bytes,
            state=lambda: here.keeper.state,
            hardware=here.keeper.parts.hardware,
            speeds=serving.speeds.rows,
            has_gpu=any(engine.info.devices for engine in engines.all),
            clock=clock,
        )
        preload = await closing.enter_async_context(
            Preload(
                settings.preload,
                resolve=catalog.resolve,
                load=serving.preload,
                copies=moves.manager.moves,
                downloads=transfers.downloads,
                state=lambda: here.keeper.state,
                settled=lambda: node in here.keeper.state.nodes,
                clock=clock,
            )
        )
        door = here.keeper.parts.door
        answers = Answers(here.source, clock, generated=door.answered.find, paced=here.source.paced)
        open_written(door, answers)
        stop.leave = answers.leave
        freeing = Draining(
            node,
            answers=answers,
            door=door,
            runs=serving,
            state=lambda: here.keeper.state,
            draining=here.view.draining,
            resting=lambda: here.polite.rest is not None and here.view.draining(),
            patience_s=settings.drain_timeout,
            clock=clock,
        )
        closing.push_async_callback(end, [asyncio.create_task(freeing.run(), name="drain")])
        closing.push_async_callback(end, [asyncio.create_task(answers.watch(), name="stalled answers")])
        audit = await closing.enter_async_context(
            recording.among(
                pool=here.keeper.parts.pool, door=here.keeper.parts.door, state=lambda: here.keeper.state
            )
        )
        batches = await closing.enter_async_context(
            batch_care(
                settings,
                node,
                pool=here.keeper.parts.pool,
                door=door,
                state=lambda: here.keeper.state,
                loaded=here.residents.loaded,
                known=owners(authenticator),
                clock=clock,
            )
        )
        usage = await closing.enter_async_context(
            usage_of(
                settings,
                node,
                UsageExchange(here.keeper.parts.pool),
                state=lambda: here.keeper.state,
                clock=clock,
                busy=lambda: any(model.slots_busy for model in serving.loaded()),
                parameters=catalog.parameters,
            )
        )
        open_usage_door(door, usage)
        app = create_app(
            inference=answers,
            catalog=here.catalog,
            residents=here.residents,
            authenticator=authenticator,
            version=_version(node, settings.name, engines),
            policy=sites_of(settings),
            limits=limits,
            clock=clock,
            ready=lambda: not stop.wanted,
            cluster=here.service,
            transfers=transfers,
            moves=moves.manager,
            places=here.desk,
            bundles=moves.bundles,
            disks=disk.everywhere,
            batches=batches.everywhere,
            audit=audit,
            preloaded=preload.rows,
            queues=NodeQueue(
                node,
                settings.name,
                waiting,
                serving,
                pool=here.keeper.parts.pool,
                door=door,
                state=lambda: here.keeper.state,
            ),
            routing=here.source,
            access=AccessDesk(
                ClusterBook(here.keeper), authenticator, clock.time, node=node, last_used=key_uses.last
            ),
            people=await closing.enter_async_context(
                people_of(settings, node, people, authenticator, here.keeper, clock)
            ),
            tell=logs.requests,
            usage=usage,
        )
        closing.push_async_callback(app.close)
        batches.begin(Inside(app.hot))
        closing.push_async_callback(batches.close)
        await closing.enter_async_context(here.keeper)
        for engine in engines.all:
            info = engine.info
            log.info(
                "node.engine",
                name=info.name,
                variant=info.variant,
                version=info.version,
                instruction_set=info.instruction_set,
                devices=info.devices,
                sandbox=info.sandbox,
            )
        closing.callback(answers.cut)
        yield app, here.keeper, preload


def _nobody_to_tell() -> None:
    """Before the node is in its cluster: it tells all that it has when it gets there."""


def _certificate(settings: Settings) -> CertificateFiles:
    """Of the API where other machines reach it."""
    if settings.tls_certificate is not None and settings.tls_key is not None:
        return CertificateFiles(settings.tls_certificate, settings.tls_key)
    own = IdentityFiles(settings.data_dir)
    return CertificateFiles(own.certificate, own.key)


def _among_others(settings: Settings) -> bool:
    current = identities.restore(settings.data_dir)
    return current is not None and SeatFile(settings.data_dir).read(current.cluster).members > 1


def _drain_s(settings: Settings) -> int:
    return max(1, round(settings.drain_timeout))


def serving_settings(settings: Settings) -> ServingSettings:
    return ServingSettings(
        rules=Rules(
            context_tokens=settings.context_length or DEFAULT_CONTEXT_TOKENS,
            slots=settings.num_parallel,
            kv_type=settings.kv_cache_type,
            flash_attention=settings.flash_attention,
        ),
        keep_alive_s=settings.keep_alive,
        max_loaded_models=settings.max_loaded_models or DEFAULT_LOADED_MODELS,
        max_queue=settings.max_queue,
        load_timeout_s=settings.load_timeout,
        memory_limit_bytes=settings.memory_limit_mib * MIB,
        threads=settings.threads,
    )


def _version(node: NodeId, name: str, engines: Engines) -> VersionInfo:
    infos = tuple(engine.info for engine in engines.all)
    return VersionInfo(version=__version__, ollama=OLLAMA_API, node=node, name=name, engines=infos)
