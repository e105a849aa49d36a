"""The settings that hold in the whole cluster: versions, each on top of the one before.

A node's own settings are not here; a name that the cluster's config does not have is each
node's own affair. Values are validated before they are proposed, by the schema that `node/`
gives; the leader checks only that a version follows the one it was made from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio
import structlog

from ollama_distributed.base.errors import Conflict, DeadlineExceeded, NotFound
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.state import keys
from ollama_distributed.state.changes import RollbackConfig, SetConfig
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Config

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

APPLY_FAILED = "config.apply_failed"
UNREADABLE = "config.unreadable"

SEEN_S = 1.0
"""How long to wait for a version that somebody saw elsewhere already, or that was just made."""
MAX_RACES = 16
"""Lost to others who set other values in the same moment, without a version asked for."""

Listener = Callable[[Config], None]


class ConfigManager:
    """`validate(values)` raises `Invalid` for values that no node could apply."""

    def __init__(
        self,
        consensus: ConsensusEngine,
        mirror: Mirror,
        *,
        validate: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._consensus = consensus
        self._mirror = mirror
        self._validate = validate
        self._current = mirror.state.config
        self._listeners: list[Listener] = []
        self._news = anyio.Event()
        mirror.on_change(self._look)

    @property
    def current(self) -> Config:
        """The version that holds; version 0 has no values. A version that this node cannot read
        leaves the one before in force."""
        return self._current

    def history(self) -> list[Config]:
        """The versions that are kept, newest first."""
        return self._mirror.state.versions()

    def on_applied(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the config that holds: now, and with each new version, on the
        loop; it must be quick. The result takes it away again."""
        self._listeners.append(listener)
        self._tell(listener)

        def forget() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return forget

    async def watch(self) -> AsyncIterator[Config]:
        """The config now, then every new version in order, as far as they are kept."""
        shown = self.current
        yield shown
        while True:
            while self.current.version == shown.version:
                await self._news.wait()
            between = [c for c in self.history() if shown.version < c.version < self.current.version]
            for config in [*reversed(between), self.current]:
                shown = config
                yield config

    async def put(
        self, values: Mapping[str, Any], *, actor: str = "", version: int | None = None, comment: str = ""
    ) -> Config:
        """The next version: the named values changed, those given as None taken out.

        Raises:
            Invalid: the result is not valid; nothing was changed.
            Conflict: the config does not stand at `version` (`revision`: where it stands).
            Unavailable, DeadlineExceeded: as `ConsensusEngine.propose_change`.
        """
        for _ in range(MAX_RACES):
            base = await self._base(version)
            merged = {**base.values, **values}
            kept = {name: value for name, value in merged.items() if value is not None}
            self._validate(kept)
            change = SetConfig(values=kept, base=base.version, comment=comment)
            made = await self._propose(change, actor, retry=version is None)
            if made is not None:
                return made
        raise Conflict("the config changes all the time; try again", revision=self.current.version)

    async def rollback(self, version: int, *, actor: str = "", comment: str = "") -> Config:
        """A new version with the values of an old one (0: none at all).

        Raises:
            NotFound: the version is not kept.
            Invalid: this version of the program does not take these values any more.
            Conflict, Unavailable, DeadlineExceeded: as `put`.
        """
        for _ in range(MAX_RACES):
            base = await self._base(None)
            old = self._mirror.state.version(version)
            if old is None and version != 0:
                raise NotFound(f"version {version} of the config is not kept")
            self._validate(old.values if old else {})
            said = comment or f"rollback to version {version}"
            change = RollbackConfig(version=version, base=base.version, comment=said)
            made = await self._propose(change, actor, retry=True)
            if made is not None:
                return made
        raise Conflict("the config changes all the time; try again", revision=self.current.version)

    # ── steps ───────────────────────────────────────────────────────────────────────

    async def _base(self, version: int | None) -> Config:
        """The version to build on."""
        if version is not None and version > self._mirror.state.config.version:
            await self._see(version)  # somebody saw it elsewhere already
        base = self._mirror.state.config
        if keys.CONFIG in self._mirror.state.rejected:
            raise Conflict("the config was written by a newer version of the program; upgrade this node")
        if version is not None and version > base.version:
            raise Conflict(
                f"there is no version {version} of the config, as far as this node has heard; it stands at "
                f"{base.version}",
                revision=base.version,
            )
        if version is not None and version < base.version:
            raise Conflict(
                f"the config stands at version {base.version}, not at {version}", revision=base.version
            )
        return base

    async def _propose(self, change: SetConfig | RollbackConfig, actor: str, *, retry: bool) -> Config | None:
        """None: somebody else was faster, and what they made can be seen here now."""
        try:
            await self._consensus.propose_change(change, actor=actor)
        except Conflict as exc:
            if not retry or exc.revision is None:
                raise
            await self._see(exc.revision)
            return None
        await self._see(change.base + 1)
        made = self._mirror.state.version(change.base + 1)
        if made is None:
            raise DeadlineExceeded(f"version {change.base + 1} was made; this node has not seen it yet")
        return made

    async def _see(self, version: int) -> None:
        with anyio.move_on_after(SEEN_S):
            await self._mirror.wait_for(lambda state: state.config.version >= version)

    def _look(self, before: ClusterState, after: ClusterState) -> None:
        if after.config is before.config:
            return
        if keys.CONFIG in after.rejected:
            log.error(UNREADABLE, kept_version=self._current.version, error=after.rejected[keys.CONFIG])
            return
        self._current = after.config
        self._news.set()
        self._news = anyio.Event()
        for listener in tuple(self._listeners):
            self._tell(listener)

    def _tell(self, listener: Listener) -> None:
        try:
            listener(self._current)
        except Exception:  # one part of the node that fails to apply must not stop the others
            log.exception(APPLY_FAILED, version=self._current.version)
