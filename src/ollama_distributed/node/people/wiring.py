"""Puts users and sign-in together on a node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.node.cluster.keeper import Keeper
from ollama_distributed.node.people.desk import Desk
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.people.ports import Provider
from ollama_distributed.node.people.service import PeopleService
from ollama_distributed.node.people.signers import Signers
from ollama_distributed.node.settings import Settings


@asynccontextmanager
async def people_of(
    settings: Settings,
    node: NodeId,
    shared: SharedPeople,
    authenticator: Authenticator,
    keeper: Keeper,
    clock: Clock,
) -> AsyncIterator[PeopleService]:
    """What the gateway's routes of sign-in and users work on. Nothing waits for the cluster."""

    async def coordination() -> Coordination:
        _, link = await keeper.linked()
        return link.coordination

    async with AsyncExitStack() as stack:
        signers = Signers(settings.data_dir, node, shared.people)
        desk = Desk(
            shared, signers, authenticator, clock, coordination, provider=_provider(settings, clock, stack)
        )
        service = PeopleService(
            shared, desk, signers, keeper, pool=keeper.parts.pool, door=keeper.parts.door, clock=clock
        )
        in_background(stack, "people", service.step)
        yield service


def _provider(settings: Settings, clock: Clock, stack: AsyncExitStack) -> Provider | None:
    if settings.oidc is None:
        return None
    # Imported late: most nodes have none.
    from ollama_distributed.node.people.provider import ConfiguredProvider

    provider = ConfiguredProvider(settings.oidc, clock)
    stack.push_async_callback(provider.aclose)
    return provider
