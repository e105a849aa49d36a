"""`cluster`: how the cluster is, who leads, join tokens, joining and leaving, voters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import cluster_view, humanize, live, output, places_view, tables
from ollama_distributed.cli.command_line import token_of
from ollama_distributed.cli.completion import node_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command, Group
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import NewToken
    from ollama_distributed.client.sync import SyncClient

PANEL = "Cluster"
JOIN_S = 60.0
"""Joining moves a node to another cluster's coordination; seconds, not more."""
REPLACE_S = 150.0
"""The new voter gets a copy of the state first; the cluster itself gives up after 120 s."""


def make_group(text: str) -> typer.Typer:
    """A command that has commands of its own."""
    return typer.Typer(
        cls=Group,
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def register(app: typer.Typer) -> None:
    group = make_group("The cluster as a whole: status, leader, join tokens, voters.")
    group.command("status", cls=Command)(status)
    group.command("leader", cls=Command)(leader)
    group.command("join", cls=Command)(join)
    group.command("leave", cls=Command)(leave)
    group.command("what-if", cls=Command)(what_if)
    token = make_group("Tokens with which other machines join.")
    token.command("create", cls=Command)(create_token)
    token.command("list", cls=Command)(list_tokens)
    token.command("revoke", cls=Command)(revoke_token)
    group.add_typer(token, name="token")
    voter = make_group("The servers that vote.")
    voter.command("replace", cls=Command)(replace_voter)
    group.add_typer(voter, name="voter")
    app.add_typer(group, name="cluster", rich_help_panel=PANEL)


# ── status and leader ───────────────────────────────────────────────────────────────


def status(ctx: typer.Context, watch: live.Watch = False, every: live.Every = live.EVERY_S) -> None:
    """Show how the cluster is, what somebody should see to, and its nodes.

    \b
    Examples:
      ollama-distributed cluster status
      ollama-distributed cluster status --watch
      ollama-distributed cluster status --output json
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if watch:
            live.watch(session, lambda: _status(client), every)
        else:
            live.show(session, _status(client))


def _status(client: SyncClient) -> live.View:
    answer = client.cluster.status()
    rows = client.nodes.list()
    now = time.time()
    return live.View(
        data=answer,
        text=lambda look: cluster_view.cluster_text(answer, rows, now, look),
        lines=cluster_view.cluster_lines(answer, rows),
    )


def leader(ctx: typer.Context) -> None:
    """Print who leads. Exit code 1 while nobody does.

    \b
    Examples:
      ollama-distributed cluster leader
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        found = client.cluster.leader()
    if session.output != "table":
        output.write(output.structured(found, session.output))
    elif found.leader is not None:
        output.write(cluster_view.leader_cell(found, time.time()).text + "\n")
    if found.leader is None:
        output.error(
            "nobody leads now: changes are refused until most of the voters can reach each other",
            "See which of them are away:  ollama-distributed cluster status",
        )
        raise typer.Exit(1)


# ── joining and leaving ─────────────────────────────────────────────────────────────


def join(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="- reads it from stdin, or asks for it.")],
) -> None:
    """Let the node that runs here join another cluster.

    It must be alone until now. To start a node that joins, use `ollama-distributed join -`.

    \b
    Examples:
      ollama-distributed cluster join - < token.txt
      ollama-distributed cluster join odj_...
    """
    session: Session = ctx.obj
    text = token_of(token)
    with session.client(retries=0, timeout_s=JOIN_S) as client:
        joined = client.cluster.join(text)
    if session.output != "table":
        output.write(output.structured(joined, session.output))
        return
    nodes = sum(joined.nodes.values())
    output.note(f"this node is a member of cluster {clean_line(joined.cluster)} now, of {nodes} nodes")
    output.note("See it with:  ollama-distributed cluster status")


def leave(
    ctx: typer.Context,
    force: Annotated[
        bool, typer.Option("--force", help="Even if the cluster cannot be told or loses a vote.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Take the node that runs here out of its cluster. It keeps its models and is alone again.

    \b
    Examples:
      ollama-distributed cluster leave
      ollama-distributed cluster leave --yes
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=JOIN_S) as client:
        now = client.cluster.status()
        here = client.nodes.get(now.node).name
        others = sum(now.nodes.values()) - 1
        confirm(
            f"Take {here} out of cluster {now.cluster}? The other {others} nodes go on without it.", yes=yes
        )
        client.cluster.leave(force=force)
    output.note(f"{clean_line(here)} left cluster {clean_line(now.cluster)}")


# ── tokens ──────────────────────────────────────────────────────────────────────────


def _roles() -> list[str]:
    return [*cluster_view.ROLES]


def create_token(
    ctx: typer.Context,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="node|server",
            autocompletion=_roles,
            help="What the new machine becomes. Default: server until there are three, then node.",
        ),
    ] = None,
    uses: Annotated[int, typer.Option(min=1, help="How many machines may join with it.")] = 1,
    ttl: Annotated[
        str, typer.Option(metavar="TIME", help="How long it works: 90s, 10m, 2h; at most 1d.")
    ] = "10m",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Name or address that the new machine's certificate may carry; may be repeated.",
        ),
    ] = None,
) -> None:
    """Make a token and print the command to type on the other machine.

    The first token opens this node's cluster ports to the network.

    \b
    Examples:
      ollama-distributed cluster token create
      ollama-distributed cluster token create --role node --uses 20 --ttl 1h
      ollama-distributed cluster token create -o json | jq -r .token |
        ssh other-machine ollama-distributed join -
    """
    if role is not None and role not in cluster_view.ROLES:
        raise typer.BadParameter("choose node or server", param_hint="--role")
    try:
        ttl_s = humanize.length_s(ttl)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--ttl") from exc
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.cluster.create_token(
            role="server" if role == "server" else "node" if role == "node" else None,
            uses=uses,
            ttl_s=ttl_s,
            hosts=allow_host or (),
        )
    if session.output != "table":
        output.write(output.structured(made, session.output))
        return
    _explain(made)


def _explain(made: NewToken) -> None:
    """The command alone on stdout, so that it can be piped; what it means beside it."""
    look = tables.look()
    output.note("On the other machine, type:\n")
    output.write(
        ("  " if look.width else "") + tables.painted(clean_line(made.command), tables.BOLD, look) + "\n"
    )
    left = humanize.age(made.expires_at - time.time() + 0.5)
    until = time.strftime("%H:%M", time.localtime(made.expires_at))
    machines = "one machine" if made.uses == 1 else f"{made.uses} machines"
    output.note(f"\nIt becomes a {made.role}: it {cluster_view.ROLES[made.role]}.")
    output.note(f"Good for {machines}, until {until} (in {left}). Whoever has it can join: keep it secret.")
    output.note(f"Take it back with:  ollama-distributed cluster token revoke {clean_line(made.id)}")


def list_tokens(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that work no more.")] = False,
) -> None:
    """List the join tokens that still work.

    \b
    Examples:
      ollama-distributed cluster token list --all
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        rows = [row for row in client.cluster.tokens() if everything or row.state == "open"]
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(cluster_view.tokens_text(rows, time.time(), tables.look()))


def revoke_token(
    ctx: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="From `cluster token list`.")],
) -> None:
    """Revoke join tokens. Machines that joined with them stay.

    \b
    Examples:
      ollama-distributed cluster token revoke k3x9
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        for token_id in ids:
            if token_id.startswith("odj_"):
                raise Problem(
                    "that is the token itself; its id is in:  ollama-distributed cluster token list"
                )
            client.cluster.revoke_token(token_id)
            output.note(f"revoked '{clean_line(token_id)}'")


# ── what if ─────────────────────────────────────────────────────────────────────────


def what_if(
    ctx: typer.Context,
    lose: Annotated[
        list[str],
        typer.Option("--lose", metavar="NODE", autocompletion=node_names, help="Its name or id; repeatable."),
    ],
) -> None:
    """Say what losing nodes would mean: what moves, what no longer fits, what would be gone.

    \b
    Examples:
      ollama-distributed cluster what-if --lose gpu1
      ollama-distributed cluster what-if --lose gpu1 --lose gpu2 --output json
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        answer = client.cluster.what_if(lose)
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    else:
        output.write(places_view.what_if_text(answer, tables.look()))


# ── voters ──────────────────────────────────────────────────────────────────────────


def replace_voter(
    ctx: typer.Context,
    dead: Annotated[str, typer.Argument(metavar="DEAD", autocompletion=node_names)],
    new: Annotated[
        str | None,
        typer.Argument(metavar="[NEW]", autocompletion=node_names, help="Default: the best living server."),
    ] = None,
    yes: Yes = False,
) -> None:
    """Give the vote of a dead server to a living one.

    Only for one that never comes back: if it only restarts, it takes its place again by itself.

    \b
    Examples:
      ollama-distributed cluster voter replace node3
      ollama-distributed cluster voter replace node3 node4 --yes
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=REPLACE_S) as client:
        gone = client.nodes.get(dead)
        to = new or "a living server"
        confirm(f"Take the vote of {gone.name} ({gone.status}) for ever and give it to {to}?", yes=yes)
        answer = client.cluster.replace_voter(dead, new)
        rows = client.nodes.list()
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    else:
        output.note(f"the voters are {clean_line(cluster_view.voters(answer, rows))} now")
