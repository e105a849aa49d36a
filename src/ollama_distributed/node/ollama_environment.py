"""What Ollama's own environment variables mean for a node."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

DEFAULT_PORT = 8080
OLLAMA_PORT = 11434

OLLAMA_NAMES = {
    "models_dir": "OLLAMA_MODELS",
    "keep_alive": "OLLAMA_KEEP_ALIVE",
    "num_parallel": "OLLAMA_NUM_PARALLEL",
    "max_loaded_models": "OLLAMA_MAX_LOADED_MODELS",
    "max_queue": "OLLAMA_MAX_QUEUE",
    "context_length": "OLLAMA_CONTEXT_LENGTH",
    "load_timeout": "OLLAMA_LOAD_TIMEOUT",
    "kv_cache_type": "OLLAMA_KV_CACHE_TYPE",
    "flash_attention": "OLLAMA_FLASH_ATTENTION",
    "allowed_origins": "OLLAMA_ORIGINS",
}
"""Field -> the variable of Ollama that sets it too (ours wins when both are there)."""


class OllamaEnvironment(EnvSettingsSource):
    """The variables that Ollama reads, for the fields that mean the same."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        del field
        if field_name == "listen" and (host := self.env_vars.get("ollama_host")):
            return [f"127.0.0.1:{DEFAULT_PORT}", ollama_host(host)], field_name, False
        variable = OLLAMA_NAMES.get(field_name, "").lower()
        return self.env_vars.get(variable), field_name, False


def ollama_host(text: str) -> str:
    """HOST:PORT from any form that OLLAMA_HOST may have: host, :port, URL, bare IPv6."""
    rest = text.split("://", 1)[-1].split("/", 1)[0]
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        return f"[{host}]:{port.lstrip(':') or OLLAMA_PORT}"
    if rest.count(":") > 1:
        return f"[{rest}]:{OLLAMA_PORT}"
    host, _, port = rest.partition(":")
    return f"{host or '127.0.0.1'}:{port or OLLAMA_PORT}"
