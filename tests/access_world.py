"""Keys and policies in memory, and one request through the app without a client in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.policies import Policy
from ollama_distributed.gateway.app import Gateway
from ollama_distributed.state.access import AccessChange, KeyEntry
from ollama_distributed.state.changes import Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply


class MemoryBook:
    """An `access.desk.Book` that makes changes as the leader does; `told` hears of each."""

    def __init__(self, now: float = 100.0) -> None:
        self.state = ClusterState()
        self.now = now
        self.told: list[Any] = []

    def keys(self) -> Mapping[KeyId, KeyEntry]:
        return self.state.keys

    def policies(self) -> Mapping[str, Policy]:
        return self.state.policies

    async def change(self, change: AccessChange, *, actor: str) -> None:
        proposal = Proposal(id=f"c{self.state.revision}", change=change, actor=actor, at=self.now)
        for write in plan_change(self.state, proposal):
            self.state = apply(self.state, write.key, write.value, self.state.revision + 1)
        for tell in self.told:
            tell()


async def call(
    app: Gateway, method: str, path: str, *, key: str = "", peer: str = "127.0.0.1", body: bytes = b"{}"
) -> int:
    """The status of one request."""
    return (await answered(app, method, path, key=key, peer=peer, body=body))[0]


async def answered(
    app: Gateway, method: str, path: str, *, key: str = "", peer: str = "127.0.0.1", body: bytes = b"{}"
) -> tuple[int, bytes]:
    bearer = {"authorization": f"Bearer {key}"} if key else {}
    status, _, data = await exchanged(app, method, path, bearer, peer=peer, body=body)
    return status, data


async def exchanged(
    app: Gateway,
    method: str,
    path: str,
    headers: Mapping[str, str],
    *,
    peer: str = "127.0.0.1",
    scheme: str = "http",
    body: bytes = b"{}",
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body. `headers`: beside (or in place of) this Host and JSON; "" leaves one out."""
    sent_headers = {"host": "127.0.0.1:8080", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": scheme,
        "headers": [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in sent_headers.items()
            if value
        ],
        "client": (peer, 5),
        "server": ("127.0.0.1", 8080),
        "state": {},
    }
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    told = {name.decode().lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return int(sent[0]["status"]), told, b"".join(message.get("body", b"") for message in sent[1:])
