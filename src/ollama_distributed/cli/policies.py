"""`policy`: what a key, a role or a team may do less."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar, Unpack, get_type_hints

import typer

from ollama_distributed.cli import access_view, output, tables
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.completion import policy_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ollama_distributed.base.policies import Policy

PANEL = "Access"
NONE = "none"
"""Typed in place of a number: no limit."""

Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=policy_names, help="From `policy list`.")]
Number = str | None


class Fields(TypedDict):
    """The options that `policy create` and `policy set` have in common; None: not given."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="GLOB", help="Only models that fit, 'llama3*' for one; may be repeated."
        ),
    ]
    route: Annotated[
        list[str] | None,
        typer.Option(
            "--route", metavar="GLOB", help="Only paths that fit, '/v1/*' for one; may be repeated."
        ),
    ]
    read_only: Annotated[
        bool | None, typer.Option("--read-only/--read-write", help="No inference, no changes: reading only.")
    ]
    max_context: Annotated[
        Number, typer.Option(metavar="TOKENS", help="Of prompt and answer together; more is refused.")
    ]
    max_output: Annotated[
        Number, typer.Option(metavar="TOKENS", help="Of one answer; who asks for more is refused.")
    ]
    priority: Annotated[
        str | None,
        typer.Option(
            "--priority", metavar="interactive|normal|batch", help="The highest class of its requests."
        ),
    ]
    node_label: Annotated[
        list[str] | None,
        typer.Option(
            "--node-label",
            metavar="NAME=VALUE",
            help="Only nodes with this label see its data; may be repeated.",
        ),
    ]
    cache_group: Annotated[
        str | None,
        typer.Option(
            "--cache-group",
            metavar="NAME",
            help="Shares prompt caches with all whose policy names this group; none: within the team only.",
        ),
    ]
    requests_per_minute: Annotated[
        Number,
        typer.Option(
            "--requests-per-minute", metavar="N", help="More are refused (429) until their turn comes."
        ),
    ]
    tokens_per_minute: Annotated[
        Number,
        typer.Option(
            "--tokens-per-minute", metavar="N", help="Of prompts and answers; more are refused (429)."
        ),
    ]
    requests_per_month: Annotated[
        Number,
        typer.Option(
            "--requests-per-month", metavar="N", help="More are refused (429) until the month is over."
        ),
    ]
    tokens_per_month: Annotated[
        Number,
        typer.Option(
            "--tokens-per-month", metavar="N", help="Of prompts and answers; more are refused (429)."
        ),
    ]
    budget_per_month: Annotated[
        Number,
        typer.Option(
            "--budget-per-month",
            metavar="MONEY",
            help="By the setting `prices`; what costs more is refused (402).",
        ),
    ]
    concurrency: Annotated[Number, typer.Option(metavar="N", help="Requests that run or wait at once.")]
    shared_by: Annotated[
        str | None,
        typer.Option(
            metavar="key|team", help="Whether each key has the rates for itself, or a team together."
        ),
    ]
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", metavar="ROLE", help="Holds for keys of this role without a policy of their own."
        ),
    ]
    team: Annotated[
        list[str] | None,
        typer.Option(
            "--team", metavar="TEAM", help="Holds for this team, where neither key nor role has one."
        ),
    ]
    comment: Annotated[str | None, typer.Option("--comment", "-m", help="What it is for.")]


CommandT = TypeVar("CommandT", bound="Callable[..., None]")


def _takes_fields(command: CommandT) -> CommandT:
    """Typer reads options off a signature, which must not end in `**typed`: here it says all `Fields`."""
    named = inspect.signature(command, eval_str=True).parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in get_type_hints(Fields, include_extras=True).items()
    ]
    every = [*(one for one in named if one.kind is not inspect.Parameter.VAR_KEYWORD), *options]
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # PEP 362: any callable may
    command.__annotations__ = {one.name: one.annotation for one in every}
    return command


def register(app: typer.Typer) -> None:
    policy = make_group("Policies: which models, how much, how urgent, on which nodes.")
    policy.command("create", cls=Command)(create_policy)
    policy.command("list", cls=Command)(list_policies)
    policy.command("ls", cls=Command, hidden=True)(list_policies)
    policy.command("show", cls=Command)(show_policy)
    policy.command("set", cls=Command)(set_policy)
    policy.command("delete", cls=Command)(delete_policy)
    policy.command("explain", cls=Command)(explain)
    app.add_typer(policy, name="policy", rich_help_panel=PANEL)


@_takes_fields
def create_policy(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a-z, 0-9, _ and -.")],
    **typed: Unpack[Fields],
) -> None:
    """Make a policy. It takes away from what a role may do; what is not said has no limit.

    \b
    Examples:
      ollama-distributed policy create small --model 'smollm*' --model 'llama3.2:1b' --max-output 512
      ollama-distributed policy create trial --role user --tokens-per-minute 10000 --priority batch
      ollama-distributed policy create eu-only --team red --node-label zone=eu
      ollama-distributed policy create shop --team web --team search --cache-group shop
    """
    said = _said(typed)
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


@_takes_fields
def set_policy(
    ctx: typer.Context,
    name: Name,
    **typed: Unpack[Fields],
) -> None:
    """Change a policy: what is given only. `none` takes a number's limit away.

    \b
    Examples:
      ollama-distributed policy set small --max-output 1024
      ollama-distributed policy set small --tokens-per-minute none --model '*'
    """
    import msgspec

    said = _said(typed)
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        before = client.policies.get(name)
        if "limits" in said:
            changed = {
                field: getattr(said["limits"], field)
                for field, value in _given_limits(typed).items()
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


def _given_limits(typed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: typed[name] for name in _LIMITS}


def _said(typed: Mapping[str, Any]) -> dict[str, Any]:
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
    if typed["cache_group"] is not None:
        said["cache_group"] = "" if typed["cache_group"] == NONE else typed["cache_group"]
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


def _show(session: Session, policy: Policy) -> None:
    if session.output != "table":
        output.write(output.structured(policy, session.output))
    else:
        output.write(access_view.policy_text(policy, tables.look()))
