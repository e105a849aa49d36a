"""`/metrics`: what the gateway counts, in Prometheus' text form (version 0.0.4).

Hand-made, as it needs three kinds of lines and no registry. Labels come from our own tables
(route patterns, statuses, loaded models), never from a request: series stay bounded.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable

from ollama_distributed.base.disk import DiskFigures
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.base.placement import PlacementFigures
from ollama_distributed.base.queue import QueueFigures
from ollama_distributed.base.transfers import TransferFigures
from ollama_distributed.base.usage import UsageFigures
from ollama_distributed.gateway.memory_metrics import memory_lines
from ollama_distributed.gateway.overload import MemoryFigures
from ollama_distributed.gateway.queue_metrics import queue_lines
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.gateway.transfer_metrics import transfer_lines
from ollama_distributed.gateway.usage_metrics import usage_lines
from ollama_distributed.serving.loaded import LoadedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES = {
    "slots": "Requests that the model can run at once.",
    "slots_busy": "Requests that it runs now.",
    "memory_bytes": "Memory of the loaded model.",
    "vram_bytes": "Of that, on GPUs.",
}
"""Field of `LoadedModel` -> what it means."""
_DISK_GAUGES = {
    "total_bytes": "Of the file system that the models are on.",
    "free_bytes": "Of that, free.",
    "used_bytes": "Files of the model store.",
    "quota_bytes": "What they may take; no value where there is no quota.",
    "coming_bytes": "On their way to the disk.",
    "evictable_bytes": "What models that may go would free.",
}
_DISK_COUNTERS = {
    "hits": "Requests for a model that was on this disk.",
    "misses": "Requests for a model that was not.",
    "evictions": "Models that went to make room.",
    "evicted_bytes": "What that freed.",
    "refused": "Times that there was no room.",
    "scrubbed_bytes": "Bytes of files that were read again.",
    "corrupt": "Files found damaged.",
    "repaired": "Models made whole again from other nodes.",
}
"""Fields of `DiskFigures` -> what they mean."""
_PIECE_COUNTERS = {
    "sent_bytes": "Bytes of models that went to other nodes.",
    "received_bytes": "Bytes of models that came from other nodes and were right.",
    "again": "Pieces that broke off, were wrong or came too slowly, and were asked for again.",
    "lies": "Times that a node sent wrong bytes of a model, and was dropped for that file.",
}
"""Fields of `PieceFigures` -> what they mean."""
_PLAN_GAUGES = {
    "waiting": "Moves of models that wait for others; of the leader only.",
    "short": "Models that cannot be as they are wanted; of the leader only.",
}
"""Fields of `PlacementFigures` -> what they mean."""
_NO_DISK, _NO_TRANSFERS = DiskFigures(), TransferFigures()


class _Histogram:
    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_BUCKETS_S, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*_BUCKETS_S, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


class GatewayMetrics:
    """Counts requests as they end."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._took: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._first_byte: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._tokens = {"prompt": 0, "cached": 0, "completion": 0}
        self._bytes_out = 0
        self._moves = 0

    def observe(self, summary: Summary) -> None:
        route = summary.route
        self._requests[route, summary.outcome, summary.status] += 1
        self._took[route].add(summary.took_s)
        if summary.first_byte_s is not None:
            self._first_byte[route].add(summary.first_byte_s)
        self._bytes_out += summary.bytes_out
        self._moves += summary.moves
        if summary.usage is not None:
            self._tokens["prompt"] += summary.usage.prompt_tokens
            self._tokens["cached"] += summary.usage.cached_tokens
            self._tokens["completion"] += summary.usage.completion_tokens

    def render(
        self,
        loaded: Iterable[LoadedModel],
        disk: DiskFigures | None = _NO_DISK,
        pieces: PieceFigures | None = None,
        places: PlacementFigures | None = None,
        moving: TransferFigures | None = _NO_TRANSFERS,
        waiting: QueueFigures | None = None,
        used: UsageFigures | None = None,
        memory: MemoryFigures | None = None,
    ) -> str:
        prefix = "ollama_distributed"
        lines = _head(f"{prefix}_requests_total", "counter", "Requests that ended.")
        for (route, outcome, status), count in sorted(self._requests.items()):
            labels = f'route="{_label(route)}",outcome="{outcome}",status="{status}"'
            lines.append(f"{prefix}_requests_total{{{labels}}} {count}")
        for name, text, histograms in (
            ("request_seconds", "Time from the head of a request to the end of its answer.", self._took),
            ("first_byte_seconds", "Time to the first byte of the answer.", self._first_byte),
        ):
            lines += _head(f"{prefix}_{name}", "histogram", text)
            for route, histogram in sorted(histograms.items()):
                lines += histogram.lines(f"{prefix}_{name}", f'route="{_label(route)}"')
        lines += _head(f"{prefix}_tokens_total", "counter", "Tokens; cached ones are among the prompt's.")
        lines += [f'{prefix}_tokens_total{{kind="{kind}"}} {count}' for kind, count in self._tokens.items()]
        lines += _head(f"{prefix}_response_bytes_total", "counter", "Bytes of answers' bodies.")
        lines.append(f"{prefix}_response_bytes_total {self._bytes_out}")
        lines += _head(f"{prefix}_failovers_total", "counter", "Answers that went on at another node.")
        lines.append(f"{prefix}_failovers_total {self._moves}")
        lines += _residents(prefix, [one for one in loaded if not one.node])
        lines += _disk(prefix, disk) if disk is not None else []
        for name, text in _PIECE_COUNTERS.items() if pieces is not None else ():
            lines += _head(f"{prefix}_pieces_{name}_total", "counter", text)
            lines.append(f"{prefix}_pieces_{name}_total {getattr(pieces, name)}")
        lines += _placement(f"{prefix}_placement", places) if places is not None else []
        lines += transfer_lines(prefix, moving, pieces or PieceFigures()) if moving is not None else []
        lines += queue_lines(prefix, waiting) if waiting is not None else []
        lines += usage_lines(prefix, used) if used is not None else []
        lines += memory_lines(prefix, memory) if memory is not None else []
        return "\n".join(lines) + "\n"


def _residents(prefix: str, loaded: list[LoadedModel]) -> list[str]:
    lines = _head(f"{prefix}_models_loaded", "gauge", "Models in memory.")
    lines.append(f"{prefix}_models_loaded {len(loaded)}")
    for name, text in _GAUGES.items():
        lines += _head(f"{prefix}_model_{name}", "gauge", text)
        lines += [
            f'{prefix}_model_{name}{{model="{_label(one.name)}"}} {getattr(one, name)}' for one in loaded
        ]
    return lines


def _disk(prefix: str, disk: DiskFigures) -> list[str]:
    lines: list[str] = []
    for name, text in _DISK_GAUGES.items():
        lines += _head(f"{prefix}_disk_{name}", "gauge", text)
        if (amount := getattr(disk, name)) is not None:
            lines.append(f"{prefix}_disk_{name} {amount}")
    for name, text in _DISK_COUNTERS.items():
        lines += _head(f"{prefix}_disk_{name}_total", "counter", text)
        lines.append(f"{prefix}_disk_{name}_total {getattr(disk, name)}")
    return lines


def _placement(prefix: str, places: PlacementFigures) -> list[str]:
    lines = _head(f"{prefix}_tasks_total", "counter", "What the cluster's plan had this node do.")
    for (kind, outcome), count in sorted(places.tasks.items()):
        lines.append(f'{prefix}_tasks_total{{kind="{kind}",outcome="{outcome}"}} {count}')
    for name, text in _PLAN_GAUGES.items():
        if (number := getattr(places, name)) is not None:
            lines += _head(f"{prefix}_{name}", "gauge", text)
            lines.append(f"{prefix}_{name} {number}")
    return lines


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
