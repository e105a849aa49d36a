"""What a node is made of, from its settings: the app over everything below it.

The order matters both ways. Up: engines, store, catalogue, serving, the cluster, the app. Down, when
the doors are closed and running answers had their time: cut what still runs, unload, close.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import structlog

from ollama_distributed._version import __version__
from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.people import People
from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.peers.usage import UsageExchange, open_usage_door
from ollama_distributed.adapters.peers.written import open_written
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.gateway.app import Gateway, create_app
from ollama_distributed.gateway.inside import Inside
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.ports import VersionInfo
from ollama_distributed.node import data_dir, doors, logs
from ollama_distributed.node.alerts import OwnAlerts
from ollama_distributed.node.audit import AuditCare
from ollama_distributed.node.batches import batch_care, owners
from ollama_distributed.node.cluster.audit import TrustAudit
from ollama_distributed.node.cluster.book import ClusterBook, KeyUses
from ollama_distributed.node.cluster.keeper import Keeper
from ollama_distributed.node.cluster.keys import SharedKeys
from ollama_distributed.node.cluster.wiring import in_cluster
from ollama_distributed.node.disk import disk_care, read_uses
from ollama_distributed.node.draining import Draining
from ollama_distributed.node.engines import Engines, make_engines
from ollama_distributed.node.logs import threshold
from ollama_distributed.node.memory import MemoryWatch
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.people.wiring import people_of
from ollama_distributed.node.placing import NodeMover, Placing
from ollama_distributed.node.polite.settings import policy_of
from ollama_distributed.node.preload import Preload
from ollama_distributed.node.queue import NodeQueue, bounds_of
from ollama_distributed.node.reach import sites_of
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


@contextlib.asynccontextmanager
async def assembled(
    settings: Settings,
    node: NodeId,
    urls: Sequence[str],
    authenticator: Authenticator,
    limits: Limits,
    stop: doors.Stop,
) -> AsyncIterator[tuple[Gateway, Keeper, Preload, OwnAlerts]]:
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
        in_background(closing, "catalog refresh", catalog.run)
        uses = read_uses(settings.data_dir, clock)
        waiting: Admission[Ticket] = Admission(clock, bounds_of(settings))
        serving = Serving(
            catalog,
            engines.all,
            LocalMachine(),
            clock,
            _serving_settings(settings),
            used=uses.served,
            queue=waiting,
        )
        # The HTTP server has let answers end by then: what still runs has had its time.
        closing.push_async_callback(serving.close, 0.0)

        def apply(live: Settings) -> None:
            """Settings that the cluster set, while the node runs."""
            serving.configure(_serving_settings(live))
            waiting.configure(bounds_of(live))
            answers.use(live.answer_timeout)
            memory.use(live.node_memory_mib)
            here.source.use(live.routing_policy)
            app.use(sites_of(live))
            threshold.use("debug" if live.debug else live.log_level)
            stop.drain_within(drain_s(live))
            freeing.patience_s = live.drain_timeout
            transfers.limit(live)
            uplink.use(live)
            placing.use(live)
            disk.use(live)
            usage.use(live)
            here.polite.use(policy_of(live))

        memory = MemoryWatch(settings.node_memory_mib)
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
                overload=memory.overload,
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
        here.alerts.know(disk.own, preload.rows)
        door = here.keeper.parts.door
        answers = Answers(
            here.source,
            clock,
            generated=door.answered.find,
            paced=here.source.paced,
            longest_s=settings.answer_timeout,
        )
        open_written(door, answers)
        memory.kept = (answers.forget, door.answered.forget)
        in_background(closing, "own memory", memory.run)
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
        in_background(closing, "drain", freeing.run)
        in_background(closing, "stalled answers", answers.watch)
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
            overload=memory.overload,
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
        yield app, here.keeper, preload, here.alerts


def _nobody_to_tell() -> None:
    """Before the node is in its cluster: it tells all that it has when it gets there."""


def drain_s(settings: Settings) -> int:
    """Of the HTTP servers, which count whole seconds."""
    return max(1, round(settings.drain_timeout))


def _serving_settings(settings: Settings) -> ServingSettings:
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
