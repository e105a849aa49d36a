"""The part of the settings that names engines beside llama.cpp."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class EngineSettings(BaseModel):
    """One more engine beside llama.cpp: a server that runs already, or the echo fake."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name shown by `ps`; part of no model name.")
    kind: str = Field(
        description="`openai` (vLLM, SGLang, llama-server, any /v1 server), `ollama`, or the name of an "
        "entry point in `ollama_distributed.engines`, e.g. `echo`."
    )
    url: str = Field(
        default="", description="Base URL, e.g. http://127.0.0.1:8000; for `openai` and `ollama`."
    )
    api_key: SecretStr = Field(default=SecretStr(""), description="Bearer key that the server wants.")
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of the engine itself.")
