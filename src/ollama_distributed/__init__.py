"""Ollama Distributed: many machines, one LLM endpoint.

`from ollama_distributed import Client, GenerateRequest` is the SDK. Its names are loaded on
first use, so that importing the package (which the node's own processes do too) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollama_distributed._version import __version__

if TYPE_CHECKING:
    from ollama_distributed.client import *  # noqa: F403  # its names are this package's

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    # Sub-packages must stay out of here: `client` itself is looked up while it is being imported.
    if not name.startswith("_"):
        client = import_module("ollama_distributed.client")
        if name in client.__all__:
            return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *import_module("ollama_distributed.client").__all__])
