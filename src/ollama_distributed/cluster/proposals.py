"""Changes on their way to the leader, and at the leader.

A proposal has an id of its own, and applying it creates the id's key in the same batch: sent
again, after any failure and to any later leader, it applies once. The leader takes proposals
one by one and plans each on a state that has all of its own writes; the fence and the
revisions in the batch decide, not what it believes.

A mere node proposes under its own name (`cmd.<leader>.propose.<node>`), which the bus lets
nobody else use, and the leader refuses it what only servers do: removing nodes and changing
voters. `actor` is the proposer's word.
"""

from __future__ import annotations

from typing import TypeAlias, assert_never, get_args

import anyio
import msgspec
import structlog

from ollama_distributed.base.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Internal,
    Invalid,
    NotFound,
    OllamaDistributedError,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.leadership.service import Leadership
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Message, Write, check_key
from ollama_distributed.state import keys
from ollama_distributed.state.access import AccessChange
from ollama_distributed.state.changes import Proposal, RemoveNode, SetVoters, plan_change
from ollama_distributed.state.codec import decode, encode

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

APPLIED = "change.applied"
FAILED = "change.failed"
FORBIDDEN = "change.forbidden"

MAX_WAITING = 64
"""Proposals at one leader; more would not be done inside their deadline anyway."""
MAX_PROPOSAL_BYTES = 256 * 1024
MAX_TRIES = 16
"""Conflicts with writes that are not the leader's own (a node's advert) are rare and short."""
ONLY_SERVERS = (RemoveNode, SetVoters, *get_args(AccessChange))
"""A removal for good, who votes, and who may do what: a mere node that was broken into must not get
so far."""
IN_DOUBT = "the change may have been made; look before you repeat it"
LEADER_S = 1.7
"""What the leader has for a proposal: it answers before the asker's deadline."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    revision: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    code: str
    message: str
    revision: int | None = None


class NotLeader(msgspec.Struct, frozen=True, tag="not_leader"):
    leader: NodeId | None


Answer: TypeAlias = Done | Refused | NotLeader

_answers = msgspec.json.Decoder[Answer](Answer)
_ERRORS: dict[str, type[OllamaDistributedError]] = {
    kind.code: kind
    for kind in (Conflict, NotFound, Invalid, Forbidden, Unavailable, DeadlineExceeded, QueueFull, Internal)
}


def proposals_to(leader: NodeId, node: NodeId | None = None) -> str:
    """Where a server proposes, or the mere `node`."""
    return f"cmd.{leader}.propose" + (f".{node}" if node is not None else "")


class _Attempt(msgspec.Struct):
    proposal: Proposal
    in_doubt: bool = False
    """A write is on its way."""


class Applier:
    """The leader's side."""

    def __init__(self, leadership: Leadership, mirror: Mirror) -> None:
        self._leadership = leadership
        self._mirror = mirror
        self._turn = anyio.Lock()
        self._waiting = 0
        self._written = 0

    async def apply(self, proposal: Proposal) -> int:
        """The revision at which the proposal applied, now or before.

        Raises:
            NotFound, Conflict, Invalid: it cannot apply.
            Unavailable, QueueFull: it did not apply.
            DeadlineExceeded: it may have applied.
        """
        check_key(keys.change(proposal.id))
        if self._waiting >= MAX_WAITING:
            raise QueueFull("too many changes at once")
        self._waiting += 1
        attempt = _Attempt(proposal)
        try:
            with anyio.move_on_after(LEADER_S):
                async with self._turn:
                    return await self._apply(attempt)
        finally:
            self._waiting -= 1
        if attempt.in_doubt:
            raise DeadlineExceeded(IN_DOUBT)
        raise Unavailable("the leader has not caught up with the cluster's state; try again")

    async def _apply(self, attempt: _Attempt) -> int:
        proposal = attempt.proposal
        for _ in range(MAX_TRIES):
            fence = self._leadership.fence()
            if fence is None:
                break
            # What earlier leaders wrote, and this one, must be in what the plan is made on.
            state = await self._mirror.reach(max(fence.revision, self._written))
            if proposal.id in state.applied:
                return state.revision_of(keys.change(proposal.id))
            planned = plan_change(state, proposal)
            attempt.in_doubt = True
            try:
                revisions = await self._leadership.write([Write(w.key, w.value, w.revision) for w in planned])
            except Conflict as exc:
                # Somebody wrote meanwhile, or this mirror lags: see that first.
                attempt.in_doubt = False
                await self._mirror.reach(max(state.revision + 1, exc.revision or 0))
                continue
            self._written = revisions[-1]
            log.info(APPLIED, kind=type(proposal.change).__name__, proposal=proposal.id, actor=proposal.actor)
            return revisions[-1]
        raise Unavailable("this node no longer leads; try again")

    async def answer(self, message: Message) -> bytes:
        """For `Coordination.serve`: always an answer, never an exception."""
        try:
            if len(message.data) > MAX_PROPOSAL_BYTES:
                raise Invalid("the change is too large")
            proposal = decode(message.data, Proposal)
            _check_allowed(proposal, message.subject)
            if not self._leadership.leads:
                return encode(NotLeader(self._leadership.leader))
            return encode(Done(await self.apply(proposal)))
        except Conflict as exc:
            return encode(Refused(code=exc.code, message=exc.message, revision=exc.revision))
        except OllamaDistributedError as exc:
            return encode(
                Refused(code=exc.code if exc.code in _ERRORS else Internal.code, message=exc.message)
            )
        except Exception:  # a task's root: the asker is told, the log knows
            log.exception(FAILED)
            return encode(Refused(code=Internal.code, message="the leader failed; its log says why"))


def _check_allowed(proposal: Proposal, subject: str) -> None:
    """
    Raises:
        Forbidden: a mere node may not propose this.
    """
    proposer = subject.split(".")[3:]
    if proposer and isinstance(proposal.change, ONLY_SERVERS):
        log.warning(FORBIDDEN, kind=type(proposal.change).__name__, node=proposer[0])
        raise Forbidden("only a server of the cluster may remove nodes, change voters, keys or policies")


def result(data: bytes) -> int | NotLeader:
    """The revision that the leader answered with.

    Raises:
        OllamaDistributedError: the leader's refusal.
    """
    try:
        answer = _answers.decode(data)
    except msgspec.DecodeError as exc:
        raise DeadlineExceeded(IN_DOUBT) from exc
    match answer:
        case Done(revision):
            return revision
        case NotLeader():
            return answer
        case Refused(code=Conflict.code):
            raise Conflict(answer.message, revision=answer.revision)
        case Refused():
            raise _ERRORS.get(answer.code, Internal)(answer.message)
        case _:
            assert_never(answer)
