"""Where the API is reached, as its settings say: addresses that others are told, sites that may ask."""

from __future__ import annotations

from collections.abc import Sequence

from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.node.cluster import addresses
from ollama_distributed.node.listeners import Address, parse_address
from ollama_distributed.node.settings import Settings


def _hosts(settings: Settings) -> tuple[str, ...]:
    """Under which other machines reach this one."""
    return addresses.advertised(settings.advertise, addresses.parse_listen(settings.cluster_listen))


def urls_of(listeners: Sequence[Address], settings: Settings) -> list[str]:
    """Of the API, as others may be told: no wildcard address."""
    found: list[str] = []
    for listener in listeners:
        everywhere = addresses.ListenOn(listener.host, listener.port).everywhere
        hosts = _hosts(settings) if everywhere else (listener.host,)
        found += [
            f"{'https' if listener.secure else 'http'}://{Address(host, listener.port)}" for host in hosts
        ]
    return found


def sites_of(settings: Settings) -> SitePolicy:
    """The names that a Host header may carry, and the browser origins that may ask."""
    names = [*settings.allowed_hosts]
    if any(parse_address(text).secure for text in settings.listen):
        names += _hosts(settings)
    return SitePolicy(hosts=names, origins=settings.allowed_origins)
