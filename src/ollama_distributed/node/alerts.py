"""What is wrong with this node itself, of what it knows anyway: told with its heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ollama_distributed.base.alerts import Alert, Level, clipped
from ollama_distributed.base.clock import Clock
from ollama_distributed.distribution.disk import NodeDisk
from ollama_distributed.gateway.overload import Overload, Step
from ollama_distributed.gateway.ports import Preloaded
from ollama_distributed.node.api_tls import ApiTLS
from ollama_distributed.serving.quarantine import Crashed

MOST_REASON = 160
"""Characters of why, as an engine or a registry says it: what to do must fit too."""
CERTIFICATE_ENDS_S = 14 * 86_400.0
"""So long before its end it is told, or in the last third of its life."""
_GIVES_UP = {
    Step.CLOSING: "it closes idle connections",
    Step.REFUSING: "it refuses new requests",
    Step.DROPPING: "it refuses new requests and drops answers that are kept for clients that come back",
}


class OwnAlerts:
    """`name`: of this node."""

    def __init__(
        self, name: str, overload: Overload, quarantined: Callable[[], list[Crashed]], clock: Clock
    ) -> None:
        self._name = name
        self._overload = overload
        self._quarantined = quarantined
        self._clock = clock
        self._disk: NodeDisk | None = None
        self._preloaded: Callable[[], Mapping[str, Preloaded]] = dict
        self._tls: ApiTLS | None = None

    def know(self, disk: NodeDisk, preloaded: Callable[[], Mapping[str, Preloaded]]) -> None:
        """What is there later than this."""
        self._disk, self._preloaded = disk, preloaded

    def know_api(self, tls: ApiTLS) -> None:
        self._tls = tls

    def now(self) -> list[Alert]:
        """Of memory only; the worst first."""
        found = [*self._of_memory(), *self._of_disk(), *self._of_models(), *self._of_certificate()]
        return sorted(found, key=lambda alert: alert.level)  # error, info, warning: there is no info here

    def _of_memory(self) -> list[Alert]:
        if not self._overload.closing:
            return []
        gives_up = _GIVES_UP[self._overload.step]
        text = (
            f"{self._name} is short of memory for its own process: {gives_up}; send fewer requests at a "
            "time, or raise node_memory_mib"
        )
        level: Level = "error" if self._overload.refusing else "warning"
        return [Alert(level=level, code="memory_short", message=text)]

    def _of_disk(self) -> list[Alert]:
        above = self._disk.above if self._disk is not None else None
        if above is None:
            return []
        text = (
            f"the models of {self._name} take more of its disk than the limits allow, and none may "
            f"go{above.why}; delete some, or raise disk_quota or lower disk_low_water; see: "
            f"ollama-distributed node disk {self._name}"
        )
        return [Alert(level="warning", code="disk_full", message=clipped(text), since=above.since)]

    def _of_models(self) -> list[Alert]:
        found: list[Alert] = []
        for held in self._quarantined():
            until = time.strftime("%H:%M UTC", time.gmtime(self._clock.time() + held.left_s))
            text = (
                f"{held.model} crashed too often at {self._name} and is not loaded there until {until} "
                f"({clipped(held.reason, MOST_REASON)}); if it goes on then, see the log of {self._name}"
            )
            found.append(
                Alert(level="error", code="model_quarantined", model=held.model, message=clipped(text))
            )
        for model, row in self._preloaded().items():
            if row.state == "failed":
                text = (
                    f"{model} was to be loaded at the start of {self._name} and is not "
                    f"({clipped(row.error, MOST_REASON)}); pull it, or take it out of the setting preload"
                )
                found.append(
                    Alert(level="warning", code="preload_failed", model=model, message=clipped(text))
                )
        return found

    def _of_certificate(self) -> list[Alert]:
        """A node's own is renewed long before: then something keeps it from being so."""
        if self._tls is None:
            return []
        begins, ends = self._tls.holds
        left_s = ends - self._clock.time()
        if left_s > min(CERTIFICATE_ENDS_S, (ends - begins) / 3):
            return []
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
        over = left_s <= 0
        what = f"ended at {when}, and clients refuse it" if over else f"ends at {when}"
        files = self._tls.files
        todo = (
            "it should have been renewed: see why not with ollama-distributed cluster status"
            if files.renewed
            else f"put a new one into {files.certificate}, which is used within a minute without a restart"
        )
        text = f"the certificate of {self._name}'s API {what}; {todo}"
        level: Level = "error" if over else "warning"
        return [Alert(level=level, code="certificate_ends", message=clipped(text))]
