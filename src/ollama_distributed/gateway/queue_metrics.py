"""`/metrics`: the queue's part."""

from __future__ import annotations

from collections.abc import Mapping

from ollama_distributed.base.queue import Histogram, QueueFigures


def queue_lines(prefix: str, figures: QueueFigures) -> list[str]:
    lines = _labelled(f"{prefix}_queue_waiting", "gauge", "Requests that wait.", "class", figures.waiting)
    text = "Requests that waited for a slot and got one."
    lines += _labelled(f"{prefix}_queue_granted_total", "counter", text, "class", figures.granted)
    text = "Requests that were refused, or left without a slot."
    lines += _labelled(f"{prefix}_queue_refused_total", "counter", text, "reason", figures.refused)
    if figures.waited is not None:
        lines += _histogram(f"{prefix}_queue_wait_seconds", "Until they had a slot.", figures.waited)
    if figures.eta_error is not None:
        text = "The wait less what was told; below zero: it was shorter."
        lines += _histogram(f"{prefix}_queue_eta_error_seconds", text, figures.eta_error)
    return lines


def _labelled(name: str, kind: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    head = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return head + [f'{name}{{{label}="{key}"}} {count}' for key, count in sorted(values.items())]


def _histogram(name: str, text: str, seen: Histogram) -> list[str]:
    lines, total = [f"# HELP {name} {text}", f"# TYPE {name} histogram"], 0
    for bound, count in zip((*seen.bounds, "+Inf"), seen.counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {seen.total:.6f}", f"{name}_count {total}"]
