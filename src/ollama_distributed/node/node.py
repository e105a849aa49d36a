"""One node: its folder locked, its sockets bound, built from its settings, run until told to stop.

A taken port is said before anything is loaded. What answers behind the sockets is `assembly`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.cluster.identity.tokens import parse_token
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.node import data_dir, doors
from ollama_distributed.node.api_tls import CertificateFiles
from ollama_distributed.node.assembly import assembled, drain_s
from ollama_distributed.node.cluster import identity as identities
from ollama_distributed.node.cluster.keeper import join_first
from ollama_distributed.node.cluster.seat import SeatFile
from ollama_distributed.node.garbage import settle
from ollama_distributed.node.listeners import allow_files, bind_all, bound
from ollama_distributed.node.reach import urls_of
from ollama_distributed.node.scheduling import run_soon
from ollama_distributed.node.settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


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
        allow_files()
        run_soon()
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

        assembling = assembled(settings, node, urls, authenticator, limits, stop)
        async with assembling as (app, keeper, preload, alerts):
            if any(text.startswith("https:") for text in urls):
                keeper.begin()  # the API's certificate comes with the node's identity
            await doors.serve(
                app,
                listeners,
                limits=limits,
                drain_s=drain_s(settings),
                certificate=_certificate(settings),
                stop=stop,
                on_started=started,
                on_tls=alerts.know_api,
            )


def _certificate(settings: Settings) -> CertificateFiles:
    """Of the API where other machines reach it."""
    if settings.tls_certificate is not None and settings.tls_key is not None:
        return CertificateFiles(settings.tls_certificate, settings.tls_key)
    own = IdentityFiles(settings.data_dir)
    return CertificateFiles(own.certificate, own.key, renewed=True)


def _among_others(settings: Settings) -> bool:
    current = identities.restore(settings.data_dir)
    return current is not None and SeatFile(settings.data_dir).read(current.cluster).members > 1
