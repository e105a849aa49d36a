"""Every setting of a node: meaning, unit, and why the default is what it is.

Read once, here: defaults < YAML file < environment < flags. Parts are handed down in
small pieces; nothing else of ours reads the environment. `config/node.yaml.example` and
`docs/settings.md` are generated from these fields (`make settings`).

Environment: each field as `OLLAMA_DISTRIBUTED_<FIELD>`; what Ollama reads, `ollama_environment.py`
reads too.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.routing import Policy
from ollama_distributed.node.audit_settings import AuditKept, AuditPartMib
from ollama_distributed.node.batch_settings import BatchDisk, BatchFile, BatchKeep
from ollama_distributed.node.disk_settings import DiskLowWater, DiskQuota, ScrubEvery, ScrubRate
from ollama_distributed.node.durations import Duration
from ollama_distributed.node.engine_settings import EngineSandbox, EngineSettings
from ollama_distributed.node.label_settings import NodeLabels
from ollama_distributed.node.limit_settings import AnswerTimeout, NodeMemoryMib
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.node.ollama_environment import DEFAULT_PORT, OLLAMA_PORT, OllamaEnvironment
from ollama_distributed.node.polite.settings import PoliteBattery, PoliteCpu, PoliteHours, PoliteOwner
from ollama_distributed.node.queue_settings import MaxQueue, QueuePerKey, QueuePerModel, QueuePerTeam
from ollama_distributed.node.registry_settings import RegistrySettings
from ollama_distributed.node.settings_errors import problems
from ollama_distributed.node.usage_settings import (
    Currency,
    HoursKept,
    KwhPrice,
    PowerWatts,
    Prices,
    UsageKept,
)

PREFIX = "OLLAMA_DISTRIBUTED_"

CLUSTER_PORT, NATS_PORT, ROUTES_PORT = 7443, 7422, 7423

LIVE: dict[str, Any] = {"live": True}
"""On a field that the cluster's config may set (`config set`): applied while the node runs."""


def default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "ollama-distributed"


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ollama-distributed"


class Settings(BaseSettings):
    """Settings of one node."""

    model_config = SettingsConfigDict(
        extra="forbid", validate_default=True, env_prefix=PREFIX, env_ignore_empty=True, enable_decoding=False
    )

    name: str = Field(
        default_factory=lambda: socket.gethostname().split(".")[0] or "node",
        description="Name of this node that people see. Default: the host's name.",
    )
    listen: list[str] = Field(
        default_factory=lambda: [f"127.0.0.1:{DEFAULT_PORT}", f"127.0.0.1:{OLLAMA_PORT}"],
        description="Addresses HOST:PORT of the API; all serve the same. Default: our port and Ollama's, so "
        "that Ollama's clients find the node; if ours is taken a free one is used, if Ollama's is taken it "
        "is left out, and the log says so. OLLAMA_HOST replaces the second one. Addresses that other "
        "machines reach (e.g. 0.0.0.0:8443) speak TLS and ask everyone for a key.",
    )
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file with the certificate of the API on addresses that other machines reach; read "
        "again when it is replaced. Unset: the node's own, signed by the cluster's CA (`ca` in admin.json).",
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the key of `tls_certificate`.")
    cluster_listen: str = Field(
        default="0.0.0.0",  # noqa: S104  nothing there answers without a node certificate or a token
        description="HOST[:PORT] of the listeners for other machines of the cluster. They open when the "
        "first join token is made or when this node joins, never before. PORT is that of the join and of "
        f"forwarded requests (default {CLUSTER_PORT}; coordination takes {NATS_PORT} and {ROUTES_PORT}). A "
        "default port that is taken moves to a free one. Default: all interfaces, since nothing answers "
        "there without a node certificate or a token.",
    )
    advertise: list[str] = Field(
        default_factory=list,
        description="Hosts (addresses or names) under which other machines reach this one, best first. "
        "Default: the address of `cluster_listen`, else those of this machine's interfaces.",
    )
    labels: NodeLabels = {}
    mdns: bool = Field(
        default=True,
        description="Announce the cluster on the local network once its listeners are open, so that `join` "
        "can name it (mDNS). Nothing secret is announced.",
    )
    nats_server: Path | None = Field(
        default=None,
        description="A nats-server binary to use for coordination. Unset: the one of the package.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder of this node's state (admin.json, keys). One running node per folder.",
    )
    models_dir: Path | None = Field(
        default=None,
        description="Model store in Ollama's own layout; may be an existing ~/.ollama/models. "
        "Default: DATA_DIR/models.",
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="What can be made again: engines that `engine build` compiled, results of self-tests.",
    )

    keep_alive: Duration = Field(
        default=300.0,
        description="How long an idle model stays loaded, seconds or e.g. 5m; negative: for ever; 0: not at "
        "all. 5m as in Ollama.",
        json_schema_extra=LIVE,
    )
    num_parallel: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Slots per loaded model: requests that run at once (continuous batching). Memory grows "
        "with slots x context; fewer are taken when memory is short. 4 keeps a small machine busy.",
        json_schema_extra=LIVE,
    )
    max_loaded_models: int = Field(
        default=0,
        ge=0,
        description="Most models loaded at once; 0: 3, as Ollama on a CPU.",
        json_schema_extra=LIVE,
    )
    max_queue: MaxQueue = 512
    queue_per_model: QueuePerModel = 0
    queue_per_team: QueuePerTeam = 0
    queue_per_key: QueuePerKey = 0
    answer_timeout: AnswerTimeout = 3600.0
    context_length: int = Field(
        default=0,
        ge=0,
        description="Context of one slot in tokens when neither request nor Modelfile say; 0: 4096. Never "
        "more than the model was trained for.",
        json_schema_extra=LIVE,
    )
    preload: list[str] = Field(
        default_factory=list,
        description="Models to load when the node has started, as far as there is memory for them; they stay "
        "until a request says otherwise. What is not here is copied from a node that has it, else pulled. A "
        "failure is logged, tried again for a while, and stops nothing. Ollama has no variable for this.",
    )
    routing_policy: Policy = Field(
        default="prefix",
        description="How the node that answers is chosen among those that hold a model. `prefix`: the one "
        "with the shortest time until the first token, which counts what its cache holds of the prompt. "
        "`round-robin` and `least-connections` are for comparison.",
        json_schema_extra=LIVE,
    )
    load_timeout: Duration = Field(
        default=300.0,
        gt=0,
        description="A load that makes no progress for so long failed, seconds.",
    )
    stream_pace: Duration = Field(
        default=0.02,
        ge=0,
        le=1,
        description="The tokens of running answers are read from llama.cpp at most so often, and pass on "
        "together; the first one, the last one and one after a pause wait for nothing. Where so many answers "
        "run that reading takes long, up to twice as seldom. 0: each by itself, which costs the cores where "
        "llama.cpp computes a wake-up of 0.1 ms a token.",
    )
    kv_cache_type: Literal["f16", "q8_0", "q4_0"] = Field(
        default="f16",
        description="Precision of the KV cache; q8_0 halves its memory at a small loss.",
        json_schema_extra=LIVE,
    )
    flash_attention: bool | None = Field(
        default=None,
        description="Force flash attention on or off; unset: the engine decides.",
        json_schema_extra=LIVE,
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads shared by all runners; 0: the physical cores. More than cores is slower.",
    )
    memory_limit_mib: int = Field(
        default=0,
        ge=0,
        description="Memory for loaded models, MiB; 0: what is free, less a reserve.",
        json_schema_extra=LIVE,
    )
    node_memory_mib: NodeMemoryMib = 0

    llama_server: Path | None = Field(
        default=None,
        description="A llama-server binary to use; must pass a self-test. Unset: one made by `engine build`, "
        "else one on PATH, else the wheel.",
    )
    engine: Literal["auto", "wheel", "binary"] = Field(
        default="auto", description="Which llama.cpp to run; `auto` takes the fastest that passes its test."
    )
    engine_sandbox: EngineSandbox = "auto"
    engines: list[EngineSettings] = Field(
        default_factory=list, description="More engines on this machine; their models are listed too."
    )

    registries: list[RegistrySettings] = Field(
        default_factory=list,
        description="Registries that models may come from and go to, beside Ollama's own and hf.co; no name "
        "in a request can add one. Each has `host` (as in model names, e.g. registry.example:5000) and may "
        "have `insecure` (plain http), `private` (it lies in a private network or on this machine), "
        "`username` and `password`, `auth_hosts` (others that may give tokens for it), `ca` (a PEM file), "
        "`ollama_key` (sign token requests as Ollama does). In the environment: YAML.",
    )
    registry_key: Path | None = Field(
        default=None,
        description="SSH key (ed25519) that signs token requests to Ollama's registry and hf.co; may be an "
        "existing ~/.ollama/id_ed25519. Default: DATA_DIR/registry_key, made at first need.",
    )
    pull_parts: int = Field(
        default=8,
        ge=1,
        le=64,
        description="Ranges of one file that a pull fetches at once. Most registries limit each connection, "
        "and few give more to more than 8.",
    )
    pull_rate_mib: float = Field(
        default=0.0,
        ge=0,
        description="Most that all pulls of a node together fetch, MiB/s; 0: no limit.",
        json_schema_extra=LIVE,
    )

    disk_quota: DiskQuota = ""
    disk_low_water: DiskLowWater = ""
    scrub_every: ScrubEvery = 30 * 86_400.0
    scrub_rate_mib: ScrubRate = 8.0

    batch_file_mib: BatchFile = 200.0
    batch_disk_mib: BatchDisk = 10_240.0
    batch_keep: BatchKeep = 30 * 86_400.0

    share_rate_mib: float = Field(
        default=0.0,
        ge=0,
        description="Most that a node sends of models to other nodes, MiB/s; 0: no limit.",
        json_schema_extra=LIVE,
    )
    share_rate_busy_mib: float = Field(
        default=64.0,
        ge=0,
        description="The same, and most that it takes from them, while it answers people; 0: no limit.",
        json_schema_extra=LIVE,
    )

    placement_copies: int = Field(
        default=3,
        ge=0,
        le=10_000,
        description="Nodes that are to have a model that nobody gave an order for (`model replicas`), where "
        "disks and memory have room: 3, so that it outlives a node and answers where it is asked. 0 or 1: it "
        "stays where it was put.",
        json_schema_extra=LIVE,
    )
    placement_grace: Duration = Field(
        default=300.0,
        ge=0,
        description="A node that is offline is waited for so long before its models are copied elsewhere, "
        "seconds: a reboot takes minutes, and so does a copy.",
        json_schema_extra=LIVE,
    )

    polite_hours: PoliteHours = ""
    polite_owner: PoliteOwner = 0.0
    polite_battery: PoliteBattery = False
    polite_cpu: PoliteCpu = 0.0

    require_key: bool = Field(
        default=False,
        description="Ask for a key even from this machine (else loopback has the role `local`).",
    )
    oidc: OidcSettings | None = Field(
        default=None,
        description="An OpenID Connect provider that signs people in, beside passwords: `issuer`, "
        "`client_id`, `client_secret`, `scopes`, `hosts` (more hosts with its endpoints), `private` (it lies "
        "in a private network), `ca` (a PEM file), `name_claim`, `groups_claim`, `roles` and `teams` (of "
        "groups), `default_role`. Alike on all servers of the cluster (docs/sign-in.md). In the environment: "
        "YAML.",
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="More names that a Host header may carry, beside loopback (guards against rebinding).",
        json_schema_extra=LIVE,
    )
    allowed_origins: list[str] = Field(
        default_factory=list,
        description="More browser origins, beside those of this machine; never `*`.",
        json_schema_extra=LIVE,
    )
    drain_timeout: Duration = Field(
        default=30.0,
        ge=0,
        description="On stop, and when a node drains, running answers may take so long to end, seconds; "
        "then another node goes on with them.",
        json_schema_extra=LIVE,
    )

    prices: Prices = {}
    currency: Currency = ""
    kwh_price: KwhPrice = 0.0
    power_watts: PowerWatts = 0.0
    usage_hours_kept: HoursKept = 31 * 86400.0
    usage_kept: UsageKept = 400 * 86400.0
    audit_kept: AuditKept = 400 * 86400.0
    audit_part_mib: AuditPartMib = 16.0

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least severity that is logged.",
        json_schema_extra=LIVE,
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: readable on a terminal, JSON lines elsewhere."
    )
    debug: bool = Field(
        default=False,
        description="Debug logs, asyncio's debug mode, and a debugpy listener if DEBUGPY_LISTEN=HOST:PORT.",
    )

    @field_validator("listen", "advertise", "allowed_hosts", "allowed_origins", "preload", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )

    @field_validator("allowed_origins")
    @classmethod
    def _no_wildcard(cls, value: list[str]) -> list[str]:
        if "*" in value:
            raise ValueError("`*` would open this node to every web page; name the origins")
        return value

    @field_validator(
        "data_dir",
        "models_dir",
        "cache_dir",
        "llama_server",
        "nats_server",
        "tls_certificate",
        "tls_key",
        "registry_key",
    )
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        """Children run in folders of their own."""
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _certificate_has_key(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self

    @field_validator("flash_attention", mode="before")
    @classmethod
    def _auto_is_unset(cls, value: object) -> object:
        return None if value in ("", "auto") else value

    @property
    def store_dir(self) -> Path:
        return self.models_dir or self.data_dir / "models"

    @field_validator("engines", "registries", "oidc", mode="before")
    @classmethod
    def _yaml_text(cls, value: object) -> object:
        try:
            return yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.MarkedYAMLError as failure:  # not its text, which may hold a password
            column = failure.problem_mark.column + 1 if failure.problem_mark else 0
            raise ValueError(f"it is no YAML: {failure.problem} (column {column})") from failure

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        yaml_file = YamlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, OllamaEnvironment(settings_cls), yaml_file


def read_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Defaults < YAML file `config` < environment < `flags` (those that are not None).

    Raises:
        Invalid: names the setting and what is wrong.
    """
    if config is not None and not config.is_file():
        raise Invalid(f"there is no settings file {config}")

    class FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return FromFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as failure:
        lines = problems(failure, Settings.model_fields)
        raise Invalid("the settings are not valid: " + "; ".join(lines)) from failure
    except (yaml.YAMLError, TypeError, ValueError, OSError) as failure:
        raise Invalid(
            f"the settings file {config} must hold `name: value` lines in YAML: {failure}"
        ) from failure
