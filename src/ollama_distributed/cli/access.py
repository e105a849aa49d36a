"""`key`, `policy`, `whoami`: who may do what."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_distributed.cli import access_view, humanize, output, tables
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.access import NewKey
    from ollama_distributed.base.policies import Policy

PANEL = "Access"
KEY_ROLES = ("admin", "operator", "user", "viewer", "plugin")
NONE = "none"
"""Typed in place of a number: no limit."""

KeyId = Annotated[str, typer.Argument(metavar="ID", help="From `key list`; never the key itself.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="From `policy list`.")]
Number = str | None
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="GLOB", help="Only models that fit, 'llama3*' for one; may be repeated."),
]
Routes = Annotated[
    list[str] | None,
    typer.Option("--route", metavar="GLOB", help="Only paths that fit, '/v1/*' for one; may be repeated."),
]
ReadOnly = Annotated[
    bool | None, typer.Option("--read-only/--read-write", help="No inference, no changes: reading only.")
]
MaxContext = Annotated[
    Number, typer.Option(metavar="TOKENS", help="Of prompt and answer together; more is refused.")
]
MaxOutput = Annotated[
    Number, typer.Option(metavar="TOKENS", help="Of one answer; who asks for more is refused.")
]
PriorityOf = Annotated[
    str | None,
    typer.Option("--priority", metavar="interactive|normal|batch", help="The highest class of its requests."),
]
NodeLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--node-label", metavar="NAME=VALUE", help="Only nodes with this label see its data; may be repeated."
    ),
]
PerMinute = Annotated[Number, typer.Option("--requests-per-minute", metavar="N")]
TokensPerMinute = Annotated[Number, typer.Option("--tokens-per-minute", metavar="N")]
PerMonth = Annotated[Number, typer.Option("--requests-per-month", metavar="N")]
TokensPerMonth = Annotated[Number, typer.Option("--tokens-per-month", metavar="N")]
Budget = Annotated[Number, typer.Option("--budget-per-month", metavar="MONEY")]
Concurrency = Annotated[Number, typer.Option(metavar="N", help="Requests that run or wait at once.")]
SharedBy = Annotated[
    str | None,
    typer.Option(metavar="key|team", help="Whether each key has the rates for itself, or a team together."),
]
ForRoles = Annotated[
    list[str] | None,
    typer.Option("--role", metavar="ROLE", help="Holds for keys of this role without a policy of their own."),
]
ForTeams = Annotated[
    list[str] | None,
    typer.Option("--team", metavar="TEAM", help="Holds for this team, where neither key nor role has one."),
]
Comment = Annotated[str | None, typer.Option("--comment", "-m", help="What it is for.")]


def register(app: typer.Typer) -> None:
    key = make_group("API keys: one for each program or person, with a role and a policy.")
    key.command("create", cls=Command)(create_key)
    key.command("list", cls=Command)(list_keys)
    key.command("ls", cls=Command, hidden=True)(list_keys)
    key.command("show", cls=Command)(show_key)
    key.command("rotate", cls=Command)(rotate_key)
    key.command("revoke", cls=Command)(revoke_key)
    app.add_typer(key, name="key", rich_help_panel=PANEL)
    policy = make_group("Policies: which models, how much, how urgent, on which nodes.")
    policy.command("create", cls=Command)(create_policy)
    policy.command("list", cls=Command)(list_policies)
    policy.command("ls", cls=Command, hidden=True)(list_policies)
    policy.command("show", cls=Command)(show_policy)
    policy.command("set", cls=Command)(set_policy)
    policy.command("delete", cls=Command)(delete_policy)
    policy.command("explain", cls=Command)(explain)
    app.add_typer(policy, name="policy", rich_help_panel=PANEL)
    app.command(cls=Command, rich_help_panel=PANEL)(whoami)


# ── keys ────────────────────────────────────────────────────────────────────────────


def create_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="For people: which program uses it.")] = "",
    role: Annotated[str, typer.Option(metavar="|".join(KEY_ROLES), help="What it may do at most.")] = "user",
    team: Annotated[str, typer.Option(help="Whose it is; teams share nothing.")] = "default",
    policy: Annotated[str, typer.Option(metavar="NAME", help="What it may do less; see: policy list.")] = "",
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it is good: 2h, 30d. Default: until revoked.")
    ] = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    \b
    Examples:
      ollama-distributed key create ci --ttl 30d
      ollama-distributed key create dashboard --role viewer
      ollama-distributed key create shop --team red --policy small-models
      KEY=$(ollama-distributed key create ci)
    """
    if role not in KEY_ROLES:
        raise typer.BadParameter(f"choose one of {', '.join(KEY_ROLES)}", param_hint="--role")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.keys.create(
            name=name,
            role=role,  # type: ignore[arg-type]  # one of KEY_ROLES
            team=team,
            policy=policy,
            ttl_s=None if ttl is None else _seconds(ttl, "--ttl"),
        )
    _tell(session, made, "kept nowhere: copy it now. Use it as OLLAMA_API_KEY or 'Authorization: Bearer …'")


def list_keys(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are good no more.")] = False,
) -> None:
    """List the keys that are good, without their secrets: role, team, policy, when used last.

    \b
    Examples:
      ollama-distributed key list
      ollama-distributed key list --all --output json
    """
    session: Session = ctx.obj
    with session.client() as client:
        rows = [row for row in client.keys.list() if everything or row.status == "valid"]
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(access_view.keys_text(rows, time.time(), tables.look()))


def show_key(ctx: typer.Context, id: KeyId) -> None:  # noqa: A002  # it is what people type
    """Show all about a key but its secret.

    \b
    Examples:
      ollama-distributed key show k3x9a2bc
    """
    session: Session = ctx.obj
    with session.client() as client:
        row = client.keys.get(id)
    if session.output != "table":
        output.write(output.structured(row, session.output))
    else:
        output.write(access_view.key_text(row, time.time(), tables.look()))


def rotate_key(
    ctx: typer.Context,
    id: KeyId,  # noqa: A002  # it is what people type
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="The old secret stays good so long; 0: void at once.")
    ] = "1d",
) -> None:
    """Give a key a new secret and print it. The old one stays good for a day, unless told otherwise.

    \b
    Examples:
      ollama-distributed key rotate k3x9a2bc
      ollama-distributed key rotate k3x9a2bc --overlap 0
    """
    overlap_s = 0.0 if overlap == "0" else _seconds(overlap, "--overlap")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.keys.rotate(id, overlap_s=overlap_s)
    until = f"the old secret is good for {overlap} more" if overlap_s else "the old secret is void"
    _tell(session, made, until)


def revoke_key(
    ctx: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="From `key list`.")],
    yes: Yes = False,
) -> None:
    """Revoke keys for ever: void on every node within seconds.

    \b
    Examples:
      ollama-distributed key revoke k3x9a2bc --yes
    """
    session: Session = ctx.obj
    rows = []
    with session.client(retries=0) as client:
        for id_ in ids:
            row = client.keys.get(id_)
            named = f" ({row.name})" if row.name else ""
            confirm(f"Revoke the key {row.id}{named} for ever?", yes=yes)
            rows.append(client.keys.revoke(row.id))
            output.note(f"revoked {clean_line(row.id + named)}")
    if session.output != "table":
        output.write(output.structured(rows, session.output))


def whoami(ctx: typer.Context) -> None:
    """Show who you are to the server, and what that may do.

    \b
    Examples:
      ollama-distributed whoami
      ollama-distributed whoami --api-key odk_… --output json
    """
    session: Session = ctx.obj
    with session.client() as client:
        who = client.keys.whoami()
    if session.output != "table":
        output.write(output.structured(who, session.output))
    else:
        output.write(access_view.whoami_text(who, time.time(), tables.look()))


def _tell(session: Session, made: NewKey, note: str) -> None:
    if session.output != "table":
        output.write(output.structured(made, session.output))
        return
    output.write(made.key + "\n")
    output.note(
        f"key {clean_line(made.row.id)}, role {made.row.role}, team {clean_line(made.row.team)}; {note}"
    )


# ── policies ────────────────────────────────────────────────────────────────────────


def create_policy(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a-z, 0-9, _ and -.")],
    model: Models = None,
    route: Routes = None,
    read_only: ReadOnly = None,
    max_context: MaxContext = None,
    max_output: MaxOutput = None,
    priority: PriorityOf = None,
    node_label: NodeLabels = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_month: PerMonth = None,
    tokens_per_month: TokensPerMonth = None,
    budget_per_month: Budget = None,
    concurrency: Concurrency = None,
    shared_by: SharedBy = None,
    role: ForRoles = None,
    team: ForTeams = None,
    comment: Comment = None,
) -> None:
    """Make a policy. It takes away from what a role may do; what is not said has no limit.

    \b
    Examples:
      ollama-distributed policy create small --model 'smollm*' --model 'llama3.2:1b' --max-output 512
      ollama-distributed policy create trial --role user --tokens-per-minute 10000 --priority batch
      ollama-distributed policy create eu-only --team red --node-label zone=eu
    """
    said = _said(locals())
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.policies.create(name, **said)
    _show(session, made)


def list_policies(ctx: typer.Context) -> None:
    """List the policies.

    \b
    Examples:
      ollama-distributed policy list
    """
    session: Session = ctx.obj
    with session.client() as client:
        rows = client.policies.list()
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(access_view.policies_text(rows, tables.look()))


def show_policy(ctx: typer.Context, name: Name) -> None:
    """Show a policy.

    \b
    Examples:
      ollama-distributed policy show small
    """
    session: Session = ctx.obj
    with session.client() as client:
        policy = client.policies.get(name)
    _show(session, policy)


def set_policy(
    ctx: typer.Context,
    name: Name,
    model: Models = None,
    route: Routes = None,
    read_only: ReadOnly = None,
    max_context: MaxContext = None,
    max_output: MaxOutput = None,
    priority: PriorityOf = None,
    node_label: NodeLabels = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_month: PerMonth = None,
    tokens_per_month: TokensPerMonth = None,
    budget_per_month: Budget = None,
    concurrency: Concurrency = None,
    shared_by: SharedBy = None,
    role: ForRoles = None,
    team: ForTeams = None,
    comment: Comment = None,
) -> None:
    """Change a policy: what is given only. `none` takes a number's limit away.

    \b
    Examples:
      ollama-distributed policy set small --max-output 1024
      ollama-distributed policy set small --tokens-per-minute none --model '*'
    """
    import msgspec

    said = _said(locals())
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        before = client.policies.get(name)
        if "limits" in said:
            changed = {
                field: getattr(said["limits"], field)
                for field, value in _given_limits(locals()).items()
                if value is not None
            }
            said["limits"] = msgspec.structs.replace(before.limits, **changed)
        after = client.policies.set(msgspec.structs.replace(before, **said))
    _show(session, after)


def delete_policy(ctx: typer.Context, name: Name, yes: Yes = False) -> None:
    """Delete a policy. Refused while a key names it.

    \b
    Examples:
      ollama-distributed policy delete small
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        policy = client.policies.get(name)
        holds = [*(f"role {one}" for one in policy.roles), *(f"team {one}" for one in policy.teams)]
        held = f" It holds for {', '.join(holds)}, who then have no limits." if holds else ""
        confirm(f"Delete the policy {name}?{held}", yes=yes)
        client.policies.delete(name)
    output.note(f"deleted {clean_line(name)}")


def explain(
    ctx: typer.Context,
    key: Annotated[str, typer.Option(metavar="ID", help="Of this key.")] = "",
    role: Annotated[str, typer.Option(help="Of somebody with this role,")] = "user",
    team: Annotated[str, typer.Option(help="in this team.")] = "default",
    model: Annotated[str, typer.Option(metavar="MODEL", help="May it use this model?")] = "",
    route: Annotated[str, typer.Option(metavar="PATH", help="May it call this route?")] = "",
    method: Annotated[str, typer.Option(help="With this method.")] = "POST",
) -> None:
    """Say which policy holds for a key, or a role and team, and what it allows. Exit 1: it is refused.

    \b
    Examples:
      ollama-distributed policy explain --key k3x9a2bc --model llama3
      ollama-distributed policy explain --role user --team red --route /v1/chat/completions
    """
    session: Session = ctx.obj
    with session.client() as client:
        said = client.policies.explain(
            key=key,
            role=role,  # type: ignore[arg-type]  # the server says which there are
            team=team,
            model=model,
            path=route,
            method=method,
        )
    if session.output != "table":
        output.write(output.structured(said, session.output))
    else:
        output.write(access_view.explanation_text(said, tables.look()))
    if not said.allowed:
        raise typer.Exit(1)


# ── what was typed ──────────────────────────────────────────────────────────────────

_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "requests_per_month",
    "tokens_per_month",
    "budget_per_month",
    "concurrency",
    "shared_by",
)


def _given_limits(typed: dict[str, Any]) -> dict[str, Any]:
    return {name: typed[name] for name in _LIMITS}


def _said(typed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a policy that were given."""
    from ollama_distributed.base.policies import Limits

    said: dict[str, Any] = {}
    for field, option in (("models", "model"), ("routes", "route"), ("roles", "role"), ("teams", "team")):
        if typed[option] is not None:
            said[field] = tuple(one for one in typed[option] if one != NONE)
    for field in ("read_only", "priority", "comment"):
        if typed[field] is not None:
            said[field] = typed[field]
    for field in ("max_context", "max_output"):
        if typed[field] is not None:
            said[field] = _number(typed[field], field, int)
    if typed["node_label"] is not None:
        said["nodes"] = dict(_label(text) for text in typed["node_label"] if text != NONE)
    limits: dict[str, Any] = {}
    for field, value in _given_limits(typed).items():
        if value is not None:
            kind = float if field == "budget_per_month" else int
            limits[field] = value if field == "shared_by" else _number(value, field, kind)
    if limits:
        said["limits"] = Limits(**limits)
    return said


def _number(text: str, field: str, kind: type[int] | type[float]) -> float | int | None:
    if text == NONE:
        return None
    try:
        return kind(text)
    except ValueError as exc:
        option = "--" + field.replace("_", "-")
        raise typer.BadParameter(f"{text!r} is no number; or write none", param_hint=option) from exc


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE", param_hint="--node-label")
    return name, value


def _seconds(text: str, option: str) -> float:
    try:
        return humanize.length_s(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=option) from exc


def _show(session: Session, policy: Policy) -> None:
    if session.output != "table":
        output.write(output.structured(policy, session.output))
    else:
        output.write(access_view.policy_text(policy, tables.look()))
