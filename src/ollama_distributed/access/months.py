"""What a key or team had in this month, and may still have at this gateway.

Of its own ledger a gateway knows all, of the others' what they said last. While that is fresh the
rest of the limit is anybody's; once it is old, each gateway keeps to its part of what was left then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ollama_distributed.access.usage import month_of
from ollama_distributed.base.errors import BudgetSpent, RateLimited
from ollama_distributed.base.policies import Limits
from ollama_distributed.base.usage import Sums

FRESH_S = 30.0
AGAIN_S = 5.0
"""When to come back, where only others could say that there is more."""


class Months(Protocol):
    """What was had in this month."""

    def own(self, at: float, *, key: str, team: str) -> Sums:
        """At this gateway, as far as it is in the ledger or about to be."""
        ...

    async def others(self, at: float, *, key: str, team: str) -> Sums:
        """At all others.

        Raises:
            OllamaDistributedError: one that lives does not answer.
        """
        ...


class Scope(msgspec.Struct, frozen=True):
    """Whose limits they are: one key's, or one team's together."""

    name: str
    key: str
    team: str

    @property
    def kind(self) -> str:
        return "team" if self.team else "key"


def has_month(limits: Limits) -> bool:
    return (limits.requests_per_month, limits.tokens_per_month, limits.budget_per_month) != (None,) * 3


class Month:
    """Of one scope. `reserved`: of requests that have not ended."""

    def __init__(self, scope: Scope, at: float) -> None:
        self.first, self.following = month_of(at)
        self.reserved = Sums()
        self._scope = scope
        self._others = Sums()
        self._own_then = Sums()
        """When the others were asked."""
        self._asked_at: float | None = None

    @property
    def known(self) -> bool:
        """The others were asked once."""
        return self._asked_at is not None

    async def ask(self, months: Months, now: float) -> None:
        own = Sums()
        own.add(months.own(now, key=self._scope.key, team=self._scope.team))
        self._others = await months.others(now, key=self._scope.key, team=self._scope.team)
        self._own_then, self._asked_at = own, now

    def check(
        self, limits: Limits, months: Months, tokens: int, cost: float, now: float, gateways: int
    ) -> None:
        """Whether one more request fits.

        Raises:
            RateLimited, BudgetSpent
        """
        own = months.own(now, key=self._scope.key, team=self._scope.team)
        fresh = self._asked_at is not None and now - self._asked_at <= FRESH_S

        def rest(limit: float, of: Callable[[Sums], float]) -> float:
            others, reserved = of(self._others), of(self.reserved)
            if fresh:
                return limit - others - of(own) - reserved
            then = of(self._own_then)
            return (limit - others - then) / max(gateways, 1) - (of(own) - then) - reserved

        for name, number, of, amount in (
            ("requests", limits.requests_per_month, _requests, 1.0),
            ("tokens", limits.tokens_per_month, _tokens, float(tokens)),
        ):
            if number is not None and (left := rest(number, of)) < max(amount, 1.0):
                raise RateLimited(
                    f"the limit of this {self._scope.kind} is {number} {name} a month; "
                    f"{max(int(left), 0)} are left",
                    retry_after_s=self.following - now if fresh or gateways == 1 else AGAIN_S,
                )
        budget = limits.budget_per_month
        if budget is not None and ((left := rest(budget, _cost)) < cost or left <= 0):
            raise BudgetSpent(
                f"the budget of this {self._scope.kind} for the month is spent, or would be with this "
                f"request; what is left: {max(left, 0.0):.6g} of {budget:.6g}"
            )


def _requests(sums: Sums) -> float:
    return float(sums.requests)


def _tokens(sums: Sums) -> float:
    return float(sums.prompt_tokens + sums.completion_tokens)


def _cost(sums: Sums) -> float:
    return sums.cost
