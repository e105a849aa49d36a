"""Settings of a remote engine, and what they say about the way there."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from ollama_distributed.adapters.engines.http import Address, TcpAddress, UnixAddress
from ollama_distributed.adapters.engines.intake import PACE_S
from ollama_distributed.base.errors import Invalid
from ollama_distributed.models.names import ModelName
from ollama_distributed.models.spec import Capability

Kind = Literal["auto", "vllm", "sglang", "llama-server", "openai"]


class RemoteSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """Of this engine among the node's."""
    url: str
    """`http://127.0.0.1:8000`, `https://…`, or `unix:/path/to.sock`; a path is put before each route."""
    api_key: str = ""
    kind: Kind = "auto"
    """Which server speaks `/v1` there; found out by its answers."""
    capabilities: Mapping[str, tuple[Capability, ...]] = {}
    """Model name -> what it can do, where the server does not say and the guess is wrong."""
    deadline_s: float = 600.0
    """For a whole answer that is not streamed: embeddings, scores, a load."""
    pace_s: float = PACE_S
    """Tokens that come faster are read, and sent on, together; 0: each by itself."""
    unload: bool = True
    """Ollama: whether a model that the node unloads is unloaded there."""


class Remote(msgspec.Struct, frozen=True):
    """Where the server is, and how to be let in."""

    address: Address
    prefix: str
    """Before each route, without a slash at its end."""
    headers: dict[str, str]

    @property
    def encrypted(self) -> bool:
        return isinstance(self.address, TcpAddress) and self.address.tls is not None


def read_settings(settings: Mapping[str, Any]) -> RemoteSettings:
    """Raises `Invalid`."""
    try:
        read = msgspec.convert(dict(settings), RemoteSettings)
    except msgspec.ValidationError as exc:
        raise Invalid(f"settings of the engine {settings.get('name', '')!r}: {exc}") from exc
    remote_of(read)
    return read


def remote_of(settings: RemoteSettings) -> Remote:
    """Raises `Invalid` for a URL that is none."""
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    if settings.url.startswith("unix:"):
        return Remote(UnixAddress(settings.url.removeprefix("unix:")), "", headers)
    try:
        url = urlsplit(settings.url)
        port = url.port
    except ValueError as exc:
        raise Invalid(f"the engine {settings.name!r} has an URL that is none: {settings.url!r}") from exc
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username:
        raise Invalid(f"the engine {settings.name!r} needs an URL like http://127.0.0.1:8000")
    tls = ssl.create_default_context() if url.scheme == "https" else None
    # People give the address with or without the API's own /v1.
    prefix = url.path.rstrip("/").removesuffix("/v1")
    return Remote(TcpAddress(url.hostname, port or (443 if tls else 80), tls), prefix, headers)


def local_name(remote_name: str) -> ModelName:
    """A name of ours for a model over there, e.g. `org/Model-7B` or `/models/x.gguf`."""
    for candidate in (remote_name, remote_name.rstrip("/").rpartition("/")[2]):
        try:
            return ModelName.parse(candidate)
        except Invalid:
            continue
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in remote_name)
    return ModelName.parse(plain.strip("-._")[:80] or "model")
