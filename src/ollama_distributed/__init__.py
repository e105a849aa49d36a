"""Ollama Distributed: many machines, one LLM endpoint."""

from ollama_distributed._version import __version__

__all__ = ["__version__"]
