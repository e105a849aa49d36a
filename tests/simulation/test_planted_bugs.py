"""The simulation can fail: bugs planted in the real code, each of which it must find.

A bug needs its occasion: each has a seed that gives it one, and a few more for when the code changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import msgspec
import pytest

from ollama_distributed.adapters.coordination.memory import MemoryCoordination
from ollama_distributed.base.errors import DeadlineExceeded
from ollama_distributed.cluster import proposals
from ollama_distributed.cluster.leadership import plan as leadership_plan
from ollama_distributed.cluster.leadership import service as leadership
from ollama_distributed.cluster.leadership.service import Leadership
from ollama_distributed.cluster.membership import beats
from ollama_distributed.cluster.membership import plan as membership_plan
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Write
from ollama_distributed.cluster.proposals import Applier
from ollama_distributed.state.changes import Proposal
from ollama_distributed.testing.simulation import Failed, Plan, Report, simulate

SEEDS = range(12)
pytestmark = pytest.mark.untraced
Bug = Callable[[], AbstractContextManager[Any]]


def no_fence() -> AbstractContextManager[Any]:
    async def write(self: Leadership, writes: Sequence[Write]) -> tuple[int, ...]:
        return await self._coordination.batch(writes)

    return mock.patch.object(Leadership, "write", write)


def no_new_epoch() -> AbstractContextManager[Any]:
    """Whoever takes the lease goes on with the epoch that there was."""

    def decide(*args: Any, **kwargs: Any) -> Any:
        decision = leadership_plan.decide(*args, **kwargs)
        if isinstance(decision, leadership_plan.Take) and decision.seen.epoch:
            epoch = decision.seen.epoch
            lease = msgspec.structs.replace(decision.lease, epoch=epoch)
            term = msgspec.structs.replace(decision.term, epoch=epoch)
            return msgspec.structs.replace(decision, lease=lease, term=term)
        return decision

    return mock.patch.object(leadership, "decide", decide)


def step_down_forgotten() -> AbstractContextManager[Any]:
    """A leader that cannot renew goes on leading."""

    def leads(standing: leadership_plan.Standing, now: float) -> bool:
        return standing.hold is not None

    def decide(standing: leadership_plan.Standing, now: float, **kwargs: Any) -> Any:
        decision = leadership_plan.decide(standing, now, **kwargs)
        return leadership_plan.Wait(now + 1) if isinstance(decision, leadership_plan.StepDown) else decision

    stack = ExitStack()
    stack.enter_context(mock.patch.object(leadership, "leads", leads))
    stack.enter_context(mock.patch.object(leadership, "decide", decide))
    return stack


def gaps_unnoticed() -> AbstractContextManager[Any]:
    """A watch that missed events goes on without a resync."""

    def on_event(self: MemoryCoordination, event: Any) -> None:
        if self._fanout.synced and event.revision > self._fanout.revision:
            self._fanout.apply(event)

    return mock.patch.object(MemoryCoordination, "on_event", on_event)


def mirror_out_of_order() -> AbstractContextManager[Any]:
    """Every tenth event is applied after the next one."""
    step = Mirror._step
    held: dict[int, tuple[str, bytes | None, int]] = {}

    def swapped(self: Mirror, key: str, value: bytes | None, revision: int) -> None:
        if revision % 10 == 0:
            held[id(self)] = (key, value, revision)
            return
        step(self, key, value, revision)
        if (earlier := held.pop(id(self), None)) is not None:
            step(self, *earlier)

    return mock.patch.object(Mirror, "_step", swapped)


def acknowledged_in_doubt() -> AbstractContextManager[Any]:
    """No answer of the engine is taken for a yes."""
    apply = Applier.apply

    async def hopeful(self: Applier, proposal: Proposal) -> int:
        try:
            return await apply(self, proposal)
        except DeadlineExceeded:
            return self._mirror.state.revision + 1

    return mock.patch.object(Applier, "apply", hopeful)


def lost_update() -> AbstractContextManager[Any]:
    """The leader plans on what its mirror happens to show, and does not compare."""

    async def at_once(self: Mirror, revision: int) -> Any:
        return self.state

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Mirror, "reach", at_once))
    stack.enter_context(mock.patch.object(proposals, "Write", lambda key, value, _: Write(key, value)))
    return stack


def no_damping() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(mock.patch.object(membership_plan, "SPACING_S", 0.0))
    stack.enter_context(mock.patch.object(membership_plan, "hold_s", return_value=0.5))
    return stack


def restarts_unheard() -> AbstractContextManager[Any]:
    """Beats of a node's next life count for nothing."""
    hear = beats.hear

    def stubborn(before: beats.Heard | None, beat: beats.Beat, at: float) -> beats.Heard:
        return before if before is not None and beat.boot != before.boot else hear(before, beat, at)

    return mock.patch.object(beats, "hear", stubborn)


BUGS: dict[str, tuple[Bug, str, int]] = {
    "no fence": (no_fence, "without a fence", 0),
    "a lease without a new epoch": (no_new_epoch, "epoch", 0),
    "a forgotten step-down": (step_down_forgotten, "began to lead while|nodes lead", 0),
    "a watch that does not notice a gap": (gaps_unnoticed, "showed .* after|shows another", 0),
    "a mirror that applies out of order": (mirror_out_of_order, "went back", 0),
    "an acknowledgement on no answer": (acknowledged_in_doubt, "was told", 1),
    "a lost update": (lost_update, "was not what was made|made twice|not linearizable", 8),
    "flapping that is not damped": (no_damping, "flaps and changed again", 0),
    "a restart that is not noticed": (restarts_unheard, "is up as", 1),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    bug, finding, likely = BUGS[name]
    report = next((report for seed in (likely, *SEEDS) if (report := _run(bug, seed)).broken), None)
    assert report is not None, "no seed found it"
    with pytest.raises(Failed, match=finding) as failure:
        raise Failed(report)
    assert f"--seed {report.seed} --nodes 8 --log" in str(failure.value)
    # The command replays it to the very same end.
    assert _run(bug, report.seed).digest == report.digest


def test_without_a_bug_the_same_seeds_pass() -> None:
    for seed in {likely for _, _, likely in BUGS.values()}:
        assert not simulate(Plan(seed=seed, nodes=8)).broken


def _run(bug: Bug, seed: int) -> Report:
    with bug():
        return simulate(Plan(seed=seed, nodes=8))
