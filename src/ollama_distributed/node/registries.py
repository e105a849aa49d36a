"""How this node reaches registries: from its settings to what `/api/pull` and `/api/push` work on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from ollama_distributed._version import __version__
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.egress.client import EgressClient
from ollama_distributed.adapters.registry.service import Registries
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.base.transfers import TransferFigures
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.distribution.downloads import Downloads, Transfer
from ollama_distributed.distribution.looking import Looking
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.ports import Status
from ollama_distributed.distribution.pulls import Pulls
from ollama_distributed.distribution.tally import Speed, Tally
from ollama_distributed.node.registry_settings import RegistrySettings
from ollama_distributed.node.settings import Settings

MIB = 1024 * 1024
KEY_FILE = "registry_key"


class Traffic:
    """What this node counts of models on their way."""

    def __init__(self, clock: Clock) -> None:
        self.tally = Tally()
        self.received = self.sent = 0
        """Bytes, from and to registries."""
        self._receiving, self._sending = Speed(clock), Speed(clock)

    def sends(self, count: int) -> None:
        self.sent += count

    def figures(self) -> TransferFigures:
        return TransferFigures(
            received_bytes=self.received,
            sent_bytes=self.sent,
            received_per_s=self._receiving.per_s(self.received),
            sent_per_s=self._sending.per_s(self.sent),
            running=dict(self.tally.running),
            ended=dict(self.tally.ended),
        )


class RegistryTransfers:
    """Implements `gateway.ports.Transfers`."""

    def __init__(
        self, pulls: Pulls, downloads: Downloads, looking: Looking, pace: Pace, traffic: Traffic
    ) -> None:
        self.pulls = pulls
        self.looking = looking
        self.traffic = traffic
        self.downloads = downloads
        self._pace = pace

    def pull(self, name: str) -> AsyncGenerator[Status]:
        return self.pulls.pull(name)

    def push(self, name: str) -> AsyncGenerator[Status]:
        return self.pulls.push(name)

    def download(self, name: str) -> Transfer:
        return self.downloads.start(name)

    def figures(self) -> TransferFigures:
        return self.traffic.figures()

    def limit(self, settings: Settings) -> None:
        """How fast, from now on."""
        self._pace.limit(settings.pull_rate_mib * MIB)


@asynccontextmanager
async def registry_transfers(
    settings: Settings, node: NodeId, store: BlobStore, catalog: Catalog, clock: Clock
) -> AsyncIterator[RegistryTransfers]:
    """Ready to pull and push; what runs at the end is cancelled, and what was fetched stays."""
    sites = Sites([_site(registry) for registry in settings.registries])
    pace = Pace(clock, settings.pull_rate_mib * MIB)
    traffic = Traffic(clock)

    async def take(count: int) -> None:
        traffic.received += count
        await pace.take(count)

    signer = RequestSigner(settings.registry_key or settings.data_dir / KEY_FILE)
    agent = f"ollama-distributed/{__version__}"
    async with EgressClient(sites.for_egress(), user_agent=agent) as egress:
        registries = Registries(
            egress, sites, signer, clock, streams=lambda: settings.pull_parts, take=take, sent=traffic.sends
        )
        async with (
            Pulls(registries, store, catalog, tally=traffic.tally) as pulls,
            Downloads(
                pulls.pull, pulls.check, clock, make_id=lambda: f"{node}.{random_id()}", node=node
            ) as downloads,
        ):
            yield RegistryTransfers(pulls, downloads, Looking(registries), pace, traffic)


def _site(registry: RegistrySettings) -> RegistrySite:
    return RegistrySite(
        host=registry.host,
        insecure=registry.insecure,
        private=registry.private,
        auth_hosts=tuple(registry.auth_hosts),
        username=registry.username,
        password=registry.password.get_secret_value(),
        signed=registry.ollama_key,
        ca=None if registry.ca is None else str(registry.ca.expanduser().absolute()),
    )
