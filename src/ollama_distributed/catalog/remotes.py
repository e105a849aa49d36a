"""The models that other engines on this machine serve by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import structlog

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.catalog.ports import RemoteModels
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec

log = structlog.get_logger()

TIMEOUT_S = 5.0


class RemoteLists:
    def __init__(self, engines: Sequence[RemoteModels]) -> None:
        self._engines = tuple(engines)
        self._lists: dict[int, list[ModelSpec]] = {}
        self.specs: Mapping[str, ModelSpec] = {}
        """By `name_key`; of two engines with the same name the first."""

    async def refresh(self) -> None:
        """Models of an engine that is away stay: a request for one then says that it is."""
        for index, engine in enumerate(self._engines):
            try:
                with anyio.fail_after(TIMEOUT_S):
                    self._lists[index] = await engine.models()
            except (OllamaDistributedError, TimeoutError) as exc:
                log.warning("catalog.remote_unreachable", engine=index, error=str(exc))
            except Exception:  # of an engine that anybody may have written: the others' models are there
                log.exception("catalog.remote_broke", engine=index)
        merged: dict[str, ModelSpec] = {}
        for specs in self._lists.values():
            for spec in specs:
                merged.setdefault(name_key(spec.name), spec)
        self.specs = merged
