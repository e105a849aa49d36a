"""The part of the settings that names registries."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from ollama_distributed.adapters.egress.urls import parse_host
from ollama_distributed.base.errors import Forbidden


class RegistrySettings(BaseModel):
    """One registry that models may come from and go to."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field(description="`name` or `name:port`, as it stands in model names.")
    insecure: bool = Field(default=False, description="It speaks plain http, without TLS.")
    private: bool = Field(
        default=False,
        description="It may lie in a private network or on this machine; else such are refused.",
    )
    auth_hosts: list[str] = Field(
        default_factory=list,
        description="More hosts that may give tokens for it; and, in a private network, store its files.",
    )
    username: str = Field(default="", description="User of the registry; unset: as anybody.")
    password: SecretStr = Field(default=SecretStr(""), description="Of that user.")
    ollama_key: bool = Field(
        default=False,
        description="Sign token requests with the node's key, as Ollama does (its own registry and hf.co "
        "get that anyway).",
    )
    ca: Path | None = Field(default=None, description="PEM file of the authorities to trust there.")

    @field_validator("host", "auth_hosts")
    @classmethod
    def _are_hosts(cls, value: str | list[str]) -> str | list[str]:
        for host in [value] if isinstance(value, str) else value:
            try:
                parse_host(host, 443)
            except Forbidden as exc:
                raise ValueError(exc.message) from exc
        return value

    @model_validator(mode="after")
    def _password_has_user(self) -> RegistrySettings:
        if self.password.get_secret_value() and not self.username:
            raise ValueError("password needs a username")
        return self
