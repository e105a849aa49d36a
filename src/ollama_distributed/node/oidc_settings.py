"""The part of the settings that names an OpenID Connect provider."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from ollama_distributed.adapters.egress.urls import parse_url
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.users import UserRole


class OidcSettings(BaseModel):
    """Who signs people in beside passwords. Set it alike on all servers of the cluster."""

    model_config = ConfigDict(extra="forbid")

    issuer: str = Field(description="The provider's issuer URL, exactly as it calls itself.")
    title: str = Field(
        default="", description="What the sign-in page calls it. Unset: the host's name of `issuer`."
    )
    client_id: str = Field(description="Of this cluster at the provider.")
    client_secret: SecretStr = Field(
        default=SecretStr(""), description="Unset: a public client, which PKCE alone protects."
    )
    scopes: list[str] = Field(
        default_factory=lambda: ["openid", "profile", "email"], description="What is asked for."
    )
    hosts: list[str] = Field(
        default_factory=list,
        description="More hosts, as `name` or `name:port`, on which the provider has its endpoints.",
    )
    private: bool = Field(
        default=False,
        description="It may lie in a private network or on this machine, and speak plain http.",
    )
    ca: Path | None = Field(default=None, description="PEM file of the authorities to trust there.")
    public_url: str = Field(
        default="",
        description="Where browsers reach the API, as https://HOST[:PORT], if a proxy ends TLS before it. "
        "Unset: where the browser came.",
    )
    name_claim: str = Field(
        default="preferred_username", description="The claim that becomes the user's name, in lower case."
    )
    groups_claim: str = Field(default="groups", description="The claim with the person's groups.")
    roles: dict[str, UserRole] = Field(
        default_factory=dict,
        description="Role of each group; of several the mightiest counts: admin, operator, user, viewer.",
    )
    teams: dict[str, str] = Field(
        default_factory=dict, description="Team of each group; of several the first one named here counts."
    )
    default_role: UserRole | None = Field(
        default=None, description="Of who is in none of `roles`. Unset: such people may not sign in."
    )

    @field_validator("issuer")
    @classmethod
    def _is_issuer(cls, value: str) -> str:
        try:
            url = parse_url(value.rstrip("/") + "/")
        except Forbidden as refused:
            raise ValueError(refused.message) from refused
        if "?" in url.target or "#" in value:
            raise ValueError("an issuer has neither a query nor a fragment")
        return value

    @field_validator("scopes")
    @classmethod
    def _has_openid(cls, value: list[str]) -> list[str]:
        if "openid" not in value:
            raise ValueError("`openid` must be among the scopes")
        return value
