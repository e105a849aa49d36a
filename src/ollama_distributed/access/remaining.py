"""What is left of limits over all gateways, for the headers of answers.

A gateway knows its own share. What the others have free it asks them in the background: each of them
once a second, about all keys and teams with limits that were used here lately, and never while a request
waits. What nobody told it does not count: the figure may be too small then, and is too large by no
more than what others let in, and what changed hands, since they were asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import anyio
import msgspec
import structlog

from ollama_distributed.access.quotas import MINUTE_S, Account, FreeOf
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.policies import Limits
from ollama_distributed.base.usage import Left

log = structlog.get_logger("access.remaining")

NOT_HEARD = "quota.not_heard"
LOOK_S = 0.2
"""A key that comes to this gateway anew has the others asked so soon."""
HEAR_S = 1.0
USED_S = 600.0
"""Of whom no request came for so long, nobody is asked."""
MOST_ASKED = 200
"""Keys and teams in one question; the others come next."""


class LeftAsk(msgspec.Struct, frozen=True, kw_only=True):
    """What of these limits is free at the gateway that is asked?"""

    minute: int
    scopes: tuple[str, ...]


class LeftTold(msgspec.Struct, frozen=True, kw_only=True):
    minute: int
    """By the clock of who answers; another one than was asked about: nothing is told."""
    free: Mapping[str, FreeOf] = {}
    """By scope; of one that is missing it has its whole part."""


class Peers(Protocol):
    """Other gateways (`adapters.peers.usage.UsageExchange`)."""

    async def left(self, node: NodeId, ask: LeftAsk) -> LeftTold: ...


class Remaining:
    """`accounts` and `known` (limits, and when a request of this gateway's own came last) are the
    meter's, by scope."""

    def __init__(
        self,
        peers: Peers,
        accounts: Mapping[str, Account],
        known: Mapping[str, tuple[Limits, float]],
        wall: Callable[[], float],
    ) -> None:
        self._peers = peers
        self._accounts = accounts
        self._known = known
        self._wall = wall

    def told(self, ask: LeftAsk) -> LeftTold:
        """For another gateway."""
        minute = int(self._wall() // MINUTE_S)
        if ask.minute != minute:
            return LeftTold(minute=minute)
        found = ((scope, self._accounts.get(scope)) for scope in ask.scopes[:MOST_ASKED])
        return LeftTold(
            minute=minute,
            free={
                scope: account.free
                for scope, account in found
                if account is not None and account.minute == minute
            },
        )

    def due(self) -> Sequence[str]:
        """Whose figures are old, the oldest first."""
        now, found = self._wall(), []
        for scope, (_, at) in self._known.items():
            account = self._accounts.get(scope)
            if account is None or not account.has_minute or now - at > USED_S:
                continue
            if now - account.heard_at >= HEAR_S:
                found.append((account.heard_at, scope))
        return [scope for _, scope in sorted(found)[:MOST_ASKED]]

    async def hear(self, scopes: Sequence[str], living: Sequence[NodeId]) -> None:
        """Ask all that live at once. The accounts are as they are now (`Account.at`)."""
        now, moved = self._wall(), {}
        for scope in scopes:
            account = self._accounts[scope]
            account.heard_at, moved[scope] = now, account.moved
            for node in account.holders:
                if node not in living:
                    account.unhear(node)
        async with anyio.create_task_group() as asking:
            for node in living:
                asking.start_soon(self._hear_of, node, moved, int(now // MINUTE_S))

    async def _hear_of(self, node: NodeId, moved: Mapping[str, int], minute: int) -> None:
        try:
            told = await self._peers.left(node, LeftAsk(minute=minute, scopes=tuple(moved)))
        except OllamaDistributedError as failure:
            log.debug(NOT_HEARD, node=node, reason=failure.message)
            told = None
        for scope, before in moved.items():
            account = self._accounts.get(scope)
            if account is None or account.minute != minute:
                continue
            if told is None or told.minute != minute:
                account.unhear(node)
            elif account.moved == before:  # else it may tell of what has changed hands since
                account.hear(node, told.free.get(scope))


def left_of(account: Account, now: float) -> Left:
    requests, tokens = account.shares["requests"], account.shares["tokens"]
    return Left(
        limit_requests=requests.limit,
        requests=requests.left,
        limit_tokens=tokens.limit,
        tokens=tokens.left,
        reset_s=MINUTE_S - now % MINUTE_S,
    )
