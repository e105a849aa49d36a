"""The command line as a whole: global options before or after the command, errors into words."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from ollama_distributed.cli.help import GLOBAL_PANEL, PlainCommand
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Output, Session

if TYPE_CHECKING:
    from ollama_distributed.client.errors import ClientError

LAST_PANEL = "More"
_HELP_COLUMNS = 120
"""Longer ones are wrapped by the formatter; only the first sentence is shown in any case."""
FAILED = 1

HINTS: Mapping[str, str] = {
    "model_not_found": "See what is there:  ollama-distributed list\n"
    "Bring one:          ollama-distributed pull NAME, or import FILE.gguf --name NAME",
    "unauthenticated": "Sign in:  ollama-distributed login\n"
    "Or give a key with --api-key or OLLAMA_API_KEY. On the node's own machine it is in\n"
    "DATA_DIR/admin.json: run this as the node's user, with the same --data-dir.",
    "forbidden": "Who you are to the server:  ollama-distributed whoami\n"
    "The admin's key is in DATA_DIR/admin.json on the node's machine.",
    "foreign_host": "Reach the server by an address or name that it knows, for example 127.0.0.1.",
    "queue_full": "The server has all the work that it can hold; try again in a moment.",
    "no_capacity": "Free memory with:  ollama-distributed stop MODEL   (see: ollama-distributed ps)",
    "quarantined": "The model crashed too often; the server's log says more.",
    "bad_answer": "Another program listens there; check --host and OLLAMA_HOST.",
    "unavailable": "While servers join or start this passes in seconds: try again. How the cluster is:\n"
    "  ollama-distributed cluster status",
    "timed_out": "The server works on something long, or hangs; `ollama-distributed ps` tells.",
}

_TRUST = (
    "Where the cluster's own CA signed it, save `ca` of a node's admin.json to a file and sign in with it:\n"
    "  ollama-distributed login --ca FILE\n"
    "Or, with a key, set SSL_CERT_FILE=FILE."
)
_SPEAKS_TLS = "Where other machines reach a node it speaks TLS: try https:// before its address."
_CLOCKS = "Look at the clocks of this machine and of the server's."


class Command(PlainCommand):
    """Lets `list --output json` and `--output json list` mean the same.

    A command has the root's global options too; values given there go into the command line's
    `Session`.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        *own, help_option = super().get_params(ctx)
        known = {option for param in own for option in param.opts}
        shared = [
            _late(param, known)
            for param in ctx.find_root().command.params
            if getattr(param, "rich_help_panel", None) == GLOBAL_PANEL and not known.issuperset(param.opts)
        ]
        return [_light(param) for param in (*own, *shared, help_option)]


class Group(TyperGroup):
    """The program's commands. Errors of the SDK end here, as one message and exit code 1."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [_light(param) for param in super().get_params(ctx)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands in groups, one help line each."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = super().get_command(ctx, name)
            if command is not None and not command.hidden:
                help_line = command.get_short_help_str(_HELP_COLUMNS)
                panel = getattr(command, "rich_help_panel", "")
                panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append(
                    (name, help_line)
                )
        # Groups come after commands, whatever the order in which they are registered.
        for panel, rows in sorted(panels.items(), key=lambda item: item[0] == LAST_PANEL):
            with formatter.section(panel):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        from ollama_distributed.base.errors import OllamaDistributedError
        from ollama_distributed.client.errors import ClientError

        try:
            return super().invoke(ctx)
        except ClientError as error:
            _tell(error, ctx.obj)
        except OllamaDistributedError as error:  # of the pure rooms: a Modelfile, a name
            _print_error(error.message, "")
        except Problem as error:
            _print_error(str(error), "")
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            _print_error(f"{error.filename or 'the system'}: {error.strerror or error}", "")
        raise typer.Exit(FAILED)


class _PlainText:
    """Stands in for typer's conversion of a value, which imports pydantic (0.15 s) even for None.

    Text stays text; anything else goes to typer's own.
    """

    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        if param.type_descriptor.annotation in (str, list[str]):
            return value
        return self._usual(param.type_descriptor).coerce(value, param=param, ctx=ctx)


def _light(param: Any) -> Any:
    try:
        from typer._coercion import build_runtime_param
    except ImportError:  # an older typer, without pydantic
        return param
    if getattr(param, "_runtime_param", None) is None:
        param._runtime_param = _PlainText(build_runtime_param)
    return param


def _late(param: Any, known: Collection[str]) -> Any:
    """`known`: options that mean something else after this command."""
    late = copy.copy(param)
    late.opts = [option for option in param.opts if option not in known]
    late.expose_value = False
    late.envvar = None  # the root has read it; it must not overrule the root's flag
    late.default = None
    late.callback = _keep
    return late


def _keep(ctx: typer.Context, param: Any, value: Any) -> None:
    if value is None or not isinstance(ctx.obj, Session):
        return
    if param.name == "output":
        value = output_of(value)
    setattr(ctx.obj, param.name, value)


def output_of(text: str) -> Output:
    """`--output`'s value, checked."""
    match text:
        case "table" | "json" | "yaml":
            return text
    raise typer.BadParameter("choose table, json or yaml", param_hint="--output")


def _tell(error: ClientError, session: Any) -> None:
    from ollama_distributed.client.errors import ConnectionFailed

    hint = HINTS.get(error.code, "")
    if error.code == "forbidden" and "may not be asked" in str(error):
        hint = ""  # a registry: no key would help, and the message says what would
    if isinstance(error, ConnectionFailed):
        hint = _connection_hint(str(error), session)
    if "http://" in str(error) and "without sending a response" in str(error):
        hint = _SPEAKS_TLS
    if error.request_id and error.code in ("internal", "engine_error", "runner_died", "load_failed"):
        hint = f"The server's log has more under the request id {error.request_id}."
    _print_error(str(error), hint)


def _connection_hint(said: str, session: Any) -> str:
    if "local issuer" in said or "self-signed" in said:
        return _TRUST
    return _CLOCKS if "not yet valid" in said or "has expired" in said else _start_hint(session)


def _start_hint(session: Any) -> str:
    from ollama_distributed.client.address import is_loopback

    if isinstance(session, Session) and not is_loopback(session.target().url):
        return "Check the address (--host, OLLAMA_HOST) and that the server runs there."
    return "Start it with:  ollama-distributed serve   (another address: --host or OLLAMA_HOST)"


def _print_error(message: str, hint: str) -> None:
    from ollama_distributed.cli import output

    sys.stdout.flush()
    output.error(message, hint)
