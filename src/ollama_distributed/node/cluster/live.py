"""The cluster's config on this node: checked as its settings, applied while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.node.settings import Settings, read_live, with_live
from ollama_distributed.state.records import Config

log = structlog.get_logger("cluster.config")

APPLIED = "config.applied"
REFUSED = "config.refused"


def check_config(values: Mapping[str, Any]) -> None:
    """
    Raises:
        Invalid: names the setting and what is wrong.
    """
    read = read_live(values)
    SitePolicy(hosts=read.get("allowed_hosts", ()), origins=read.get("allowed_origins", ()))


class LiveConfig:
    """Applies each version of the cluster's config over the node's own settings."""

    def __init__(self, own: Settings, apply: Callable[[Settings], None]) -> None:
        self._own = own
        self._apply = apply
        self._values: Mapping[str, Any] = {}

    def __call__(self, config: Config) -> None:
        if config.values == self._values:
            return
        try:
            settings = with_live(self._own, config.values)
            self._apply(settings)
        except OllamaDistributedError as refused:
            # A newer version of the program may have set what this one does not know: it goes
            # on with what it has, and says so.
            log.warning(REFUSED, version=config.version, reason=refused.message)
            return
        changed = sorted({*config.values} | {*self._values})
        self._values = config.values
        log.info(APPLIED, version=config.version, names=changed, by=config.by)
