"""Which registries may be asked, and how each is reached: from the settings, never from a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ollama_distributed.adapters.egress.client import Site
from ollama_distributed.adapters.egress.urls import Url, parse_host
from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.models.names import ModelName


class RegistrySite(msgspec.Struct, frozen=True, kw_only=True):
    """One registry of the settings."""

    host: str
    """`name` or `name:port`, as it stands in model names."""
    insecure: bool = False
    """It speaks plain http."""
    private: bool = False
    """It may lie in a private network or on this machine."""
    auth_hosts: tuple[str, ...] = ()
    """Other hosts (`name` or `name:port`) that may give tokens for it, or store its files where
    these lie in a private network."""
    username: str = ""
    password: str = ""
    signed: bool = False
    """Token requests are signed with the node's key, as Ollama does; only with no `username`."""
    ca: str | None = None
    """File of certificate authorities to trust there."""


BUILT_IN = (
    RegistrySite(host="registry.ollama.ai", auth_hosts=("ollama.com",), signed=True),
    RegistrySite(host="hf.co", auth_hosts=("huggingface.co",), signed=True),
    RegistrySite(host="huggingface.co", signed=True),
)
"""Known without being named; public, TLS only."""


class Sites:
    def __init__(self, named: Sequence[RegistrySite]) -> None:
        """
        Raises:
            Invalid: a host of the settings is none.
        """
        self._sites: dict[tuple[str, int], RegistrySite] = {}
        self._own = tuple(_egress(host, site) for site in named for host in (site.host, *site.auth_hosts))
        for site in (*BUILT_IN, *named):  # a named one replaces a built-in one
            self._sites[_place(site.host, site)] = site

    def for_egress(self) -> Iterable[Site]:
        return self._own

    def of(self, name: ModelName) -> tuple[RegistrySite, Url]:
        """The registry of a name, and the URL of its root.

        Raises:
            Forbidden: it is not among those that may be asked; says what to configure.
        """
        found = self._find(name.host)
        if found is None:
            raise Forbidden(
                f"the registry {name.host} may not be asked; add `{{host: {name.host}}}` to `registries` "
                "in the settings of this node"
            )
        site, (host, port) = found
        match name.scheme.lower():
            case "https":
                pass
            case "http" if site.insecure:
                pass
            case "http":
                raise Forbidden(f"insecure protocol http: {name.host} is not configured as insecure")
            case other:
                raise Forbidden(f"{other} is no way to reach a registry")
        return site, Url("http" if site.insecure else "https", host, port, "/")

    def may_give_tokens(self, site: RegistrySite, realm: Url) -> bool:
        """Whether a realm's host is the registry's own or one that the settings name for it."""
        hosts = {_place(host, site) for host in (site.host, *site.auth_hosts)}
        return (realm.host, realm.port) in hosts

    def _find(self, host: str) -> tuple[RegistrySite, tuple[str, int]] | None:
        for default_port in (443, 80):
            place = parse_host(host, default_port)
            site = self._sites.get(place)
            if site is not None and (default_port == 80) <= site.insecure:
                return site, place
        return None


def _place(host: str, site: RegistrySite) -> tuple[str, int]:
    try:
        return parse_host(host, 80 if site.insecure else 443)
    except Forbidden as exc:
        raise Invalid(f"registries: {exc.message}", param="registries") from exc


def _egress(host: str, site: RegistrySite) -> Site:
    name, port = _place(host, site)
    return Site(host=name, port=port, insecure=site.insecure, private=site.private, ca=site.ca)
