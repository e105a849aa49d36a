"""What `--help` of a command says: usage, arguments, options, and those that all commands take.

Typer's own marks each argument a second time (`[[PREFIX]]`, `{NODE...}...`) and names Python's types
(`<list[str]>`); here a metavar is what a person would type.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

GLOBAL_PANEL = "Global options"
_REQUIRED = "[required]"
_KINDS: tuple[tuple[type, str], ...] = ((bool, ""), (int, "NUMBER"), (float, "NUMBER"), (str, "TEXT"))
"""Of an option without a metavar of its own; else it is a file."""


class PlainCommand(TyperCommand):
    """A command with such a help."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            name_value(param)
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [_usage(one) for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return [*filter(None, [self.options_metavar]), *arguments]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], GLOBAL_PANEL: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                # What is only required is in the usage already.
                if text := record[1].removesuffix(_REQUIRED).rstrip():
                    sections["Arguments"].append((_usage(param), text))
            else:
                of_all = getattr(param, "rich_help_panel", None) == GLOBAL_PANEL
                sections[GLOBAL_PANEL if of_all else "Options"].append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def name_value(param: Any) -> None:
    """Give an option that takes a value, and has no metavar, one."""
    if param.param_type_name != "option" or param.metavar is not None or param.is_flag:
        return
    annotation = param.type_descriptor.annotation
    kinds = getattr(annotation, "__args__", None) or (annotation,)
    param.metavar = next((name for kind, name in _KINDS if kind in kinds), "PATH")


def _usage(argument: Any) -> str:
    name = argument.display_name_raw.replace("...", "").strip("[]")
    shown = name if argument.required else f"[{name}]"
    return shown + "..." if argument.nargs != 1 else shown
