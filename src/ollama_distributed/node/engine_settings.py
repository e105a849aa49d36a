"""The settings of engines: llama.cpp's sandbox, and which are there beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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


EngineSandbox = Annotated[
    Literal["auto", "on", "off"],
    Field(
        description="What llama.cpp's processes may do: read the model and the libraries, serve on their own "
        "socket, compute; no other file, no network, no new process (Landlock and seccomp, Linux). `auto`: "
        "as much of it as this kernel gives and llama.cpp works with here; the log says what. `on`: all of "
        "it, or nothing is loaded. `off`: for a GPU's driver that wants more.",
    ),
]
