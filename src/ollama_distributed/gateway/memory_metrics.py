"""`/metrics`: the memory of the node's own process."""

from __future__ import annotations

from ollama_distributed.gateway.overload import MemoryFigures


def memory_lines(prefix: str, figures: MemoryFigures) -> list[str]:
    begun = {f'{{step="{step.name.lower()}"}}': count for step, count in sorted(figures.begun.items())}
    lines: list[str] = []
    for name, kind, text, values in (
        ("own_memory_bytes", "gauge", "Of the node's own process.", {"": figures.used_bytes}),
        ("own_memory_bound_bytes", "gauge", "That it may take.", {"": figures.bound_bytes}),
        ("overload_step", "gauge", "0: nothing is given up.", {"": int(figures.step)}),
        ("overload_begun_total", "counter", "Times that a step began.", begun),
        ("overload_refused_total", "counter", "Requests refused for it.", {"": figures.refused}),
    ):
        lines += [f"# HELP {prefix}_{name} {text}", f"# TYPE {prefix}_{name} {kind}"]
        lines += [f"{prefix}_{name}{labels} {value}" for labels, value in values.items()]
    return lines
