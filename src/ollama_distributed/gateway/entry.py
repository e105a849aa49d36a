"""What a call passes between its body and its work: the policy of who asks, and the limits.

Nearly always known at once; where the model has to count a prompt, or other gateways are asked for
their part of a limit, it takes a while.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.inference import Inference
from ollama_distributed.base.policies import Policy
from ollama_distributed.gateway.bounds import needs_count, within_context, within_policy
from ollama_distributed.gateway.dialects.contract import Call
from ollama_distributed.gateway.metering import Metering, Need, Ticket, limits_of, need_of


class Entry(msgspec.Struct, frozen=True):
    call: Call
    """As it may be made: with the lengths that the policy allows."""
    ticket: Ticket | None = None
    """To be closed when the call has ended. None: there are no limits."""


Entering = Entry | Callable[[], Coroutine[Any, Any, Entry]]
"""What it is, or how it is come by: a call whose client leaves at once leaves nothing begun."""


class Entrance:
    """`meter`: keeps keys and teams within their limits. None: nobody has any."""

    def __init__(self, inference: Inference, meter: Metering | None) -> None:
        self._inference = inference
        self._meter = meter

    def enter(self, call: Call, identity: Identity) -> Entering:
        """
        Raises:
            ModelNotFound, Invalid: the policy says so.
            ContextExceeded: the same, of the whole length; only what is to be awaited raises it.
            RateLimited, BudgetSpent: a limit is reached.
        """
        policy = identity.policy
        if policy is None:  # nor are there limits
            return Entry(call)
        call = within_policy(call, policy)
        if needs_count(call, policy):
            return partial(self._counted, call, policy, identity)
        return self._metered(call, identity)

    async def _counted(self, call: Call, policy: Policy, identity: Identity) -> Entry:
        call = await within_context(call, policy, self._inference)
        entering = self._metered(call, identity)
        return entering if isinstance(entering, Entry) else await entering()

    def _metered(self, call: Call, identity: Identity) -> Entering:
        meter, limits = self._meter, limits_of(identity)
        if meter is None or limits is None:
            return Entry(call)
        need = need_of(call, limits, meter.longest)
        ticket = meter.admit(identity, need)
        return partial(self._borrowed, meter, identity, need) if ticket is None else Entry(need.call, ticket)

    async def _borrowed(self, meter: Metering, identity: Identity, need: Need) -> Entry:
        return Entry(need.call, await meter.borrow(identity, need))
