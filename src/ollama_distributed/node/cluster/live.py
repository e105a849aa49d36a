"""The cluster's config on this node: checked as its settings, applied while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog
from pydantic import ValidationError

from ollama_distributed.base.errors import Invalid, OllamaDistributedError
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.node.settings import LIVE, Settings
from ollama_distributed.node.settings_errors import unknown_setting, wrong_value
from ollama_distributed.state.records import Config

log = structlog.get_logger("cluster.config")

APPLIED = "config.applied"
REFUSED = "config.refused"


def is_live(name: str) -> bool:
    """Whether the cluster's config may set this field."""
    return name in Settings.model_fields and Settings.model_fields[name].json_schema_extra == LIVE


def read_live(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the cluster's config, checked and converted as a settings file would be.

    Raises:
        Invalid: names the setting and what is wrong.
    """
    scratch = Settings.model_construct()
    for name, value in values.items():
        if name not in Settings.model_fields:
            raise Invalid(unknown_setting(name, [*filter(is_live, Settings.model_fields)]), param=name[:80])
        if not is_live(name):
            raise Invalid(
                f"{name} belongs to each node: set it in the node's own file or flags and restart it. "
                f"The cluster sets {', '.join(filter(is_live, Settings.model_fields))}",
                param=name,
            )
        try:
            Settings.__pydantic_validator__.validate_assignment(scratch, name, value)
        except ValidationError as failure:
            raise Invalid(f"{name}: {wrong_value(failure.errors()[0])}", param=name) from failure
    return {name: getattr(scratch, name) for name in values}


def with_live(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The node's settings with the cluster's config over them."""
    return settings.model_copy(update=read_live(values))


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
