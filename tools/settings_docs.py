"""Writes config/node.yaml.example and docs/settings.md from the fields of `Settings`.

`--check` writes nothing and fails when a file is not what it would write.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from ollama_distributed.node.cluster.live import is_live
from ollama_distributed.node.ollama_environment import OLLAMA_NAMES
from ollama_distributed.node.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
PER_MACHINE = {
    "name": "the host's name",
    "data_dir": "~/.local/share/ollama-distributed",
    "cache_dir": "~/.cache/ollama-distributed",
}
"""Defaults that depend on the machine, as people read them."""


def default_of(name: str) -> Any:
    field = Settings.model_fields[name]
    if name in PER_MACHINE:
        return PER_MACHINE[name]
    if field.default is not PydanticUndefined:
        return field.default
    return field.get_default(call_default_factory=True)


def variables(name: str) -> list[str]:
    ollama = "OLLAMA_HOST" if name == "listen" else OLLAMA_NAMES.get(name)
    return [PREFIX + name.upper(), *([ollama] if ollama else [])]


def example() -> str:
    lines = [
        "# Settings of a node: `ollama-distributed serve --config node.yaml`.",
        "# Generated from the Settings fields by `make settings`; every line shows its default.",
        "# Order: defaults < this file < environment < flags.",
    ]
    for name, field in Settings.model_fields.items():
        lines += ["", *(f"# {line}" for line in textwrap.wrap(field.description or "", 98))]
        value = yaml.safe_dump({name: default_of(name)}, default_flow_style=False, width=200).strip()
        lines += [f"#{line}" for line in value.splitlines()]
    return "\n".join(lines) + "\n"


def page() -> str:
    def row(name: str) -> str:
        names = ", ".join(f"`{variable}`" for variable in variables(name))
        field, live = Settings.model_fields[name], "yes" if is_live(name) else ""
        return f"| `{name}` | {field.description} | `{default_of(name)!r}` | {live} | {names} |"

    head = [
        "# Settings",
        "",
        "Generated from the `Settings` fields by `make settings`; do not edit.",
        "Order: defaults < YAML file (`--config`) < environment < flags.",
        "Durations are seconds or `5m`, `1h30m`.",
        "Where `cluster` says yes, `config set` sets it on all nodes at once, over their own, without a",
        "restart ([several machines](cluster.md#settings-of-the-whole-cluster)).",
        "",
        "| setting | meaning | default | cluster | environment |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *map(row, Settings.model_fields)]) + "\n"


def main() -> int:
    files = {ROOT / "config/node.yaml.example": example(), ROOT / "docs/settings.md": page()}
    if "--check" in sys.argv:
        stale = [
            str(path.relative_to(ROOT))
            for path, text in files.items()
            if not path.exists() or path.read_text() != text
        ]
        if stale:
            print(f"out of date, run `make settings`: {', '.join(stale)}", file=sys.stderr)
        return bool(stale)
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
