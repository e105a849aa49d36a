"""How choices of nodes look to a person. Pure but for the time zone: structs in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ollama_distributed.cli import tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.routing import RouteDecision, RouteDecisions, RouteTimes
    from ollama_distributed.routing.replay import Replayed

REASONS = {
    "only": "no other node could be asked",
    "prefix": "its cache holds the most of the prompt, and it is not crowded",
    "load": "the first token comes soonest there",
    "local": "none is sooner, and a hop would be for nothing",
    "warm": "it has the model in memory",
    "spill": "who holds more of the prompt has too much to do",
    "last-resort": "no node that is online holds the model",
    "retry": "the first one refused",
    "failover": "the node that answered was lost",
    "round-robin": "it was its turn",
    "least-connections": "it had the fewest requests",
}


def decision_text(found: RouteDecision, look: Look) -> str:
    first = found.order[0] if found.order else "nobody"
    text = tables.facts(
        [
            ("request", Cell(found.request_id)),
            ("model", Cell(found.model)),
            ("chosen", Cell(first, tables.BOLD)),
            ("because", Cell(f"{found.reason}: {REASONS.get(found.reason, '')}" if found.order else "")),
            ("then", Cell(", ".join(found.order[1:]))),
            ("prompt", Cell(f"about {found.prompt_tokens} tokens" if found.prompt_tokens else "")),
            ("chosen by", Cell(f"{found.gateway}, policy {found.policy}" if found.gateway else "")),
        ],
        look,
    )
    if found.candidates:
        text += "\n" + _candidates(found, look)
    for one in found.left_out:
        text += tables.note("", f"{one.name} is not asked: {one.reason}", tables.DIM, look)
    if found.times is not None:
        text += "\n" + _times(found.times, look)
    return text


def _candidates(found: RouteDecision, look: Look) -> str:
    rows = found.candidates
    first = found.order[0] if found.order else ""
    return tables.table(
        [
            Column("NODE", [Cell(r.name, tables.GREEN if r.name == first else "") for r in rows]),
            Column("FIRST TOKEN", [Cell(_s(r.ttft_s), tables.BOLD) for r in rows]),
            Column("READ", [Cell(_s(r.read_s)) for r in rows], 1),
            Column("WAIT", [Cell(_s(r.wait_s)) for r in rows], 2),
            Column("LOAD", [Cell(_s(r.load_s)) for r in rows], 3),
            Column("HOP", [Cell(_s(r.hop_s)) for r in rows], 6),
            Column("CACHED", [Cell(str(r.cached_tokens)) for r in rows], 1),
            Column("BUSY", [Cell(f"{r.busy}+{r.queued}/{r.slots}" if r.loaded else "cold") for r in rows], 4),
            Column("TOKENS/S", [Cell(f"{r.read_tokens_per_s:.0f}") for r in rows], 5),
        ],
        look,
    )


def _times(times: RouteTimes, look: Look) -> str:
    read = times.prompt_tokens - times.cached_tokens
    return tables.facts(
        [
            ("answered by", Cell(times.node + (f" after {times.moves} moves" if times.moves else ""))),
            ("load", Cell(_s(times.load_s))),
            ("wait", Cell(_s(times.wait_s))),
            ("prefill", Cell(f"{_s(times.prefill_s)}  {read} tokens read, {times.cached_tokens} cached")),
            ("decode", Cell(f"{_s(times.decode_s)}  {times.completion_tokens} tokens")),
            ("total", Cell(_s(times.total_s), tables.BOLD)),
        ],
        look,
    )


def decisions_text(found: RouteDecisions, look: Look) -> str:
    rows = found.decisions
    if not rows:
        return "this node has sent no request yet\n"
    return tables.table(
        [
            Column(
                "AT", [Cell(time.strftime("%H:%M:%S", time.localtime(r.at)), tables.DIM) for r in rows], 3
            ),
            Column("REQUEST", [Cell(r.request_id) for r in rows]),
            Column("MODEL", [Cell(r.model) for r in rows], 2),
            Column("NODE", [Cell(r.times.node if r.times else next(iter(r.order), "-")) for r in rows]),
            Column("WHY", [Cell(r.reason) for r in rows]),
            Column("CACHED", [Cell(_cached(r)) for r in rows], 1),
            Column("PREFILL", [Cell(_s(r.times.prefill_s) if r.times else "-") for r in rows], 4),
            Column("TOTAL", [Cell(_s(r.times.total_s) if r.times else "-") for r in rows], 1),
        ],
        look,
    )


def _cached(one: RouteDecision) -> str:
    return f"{one.times.cached_tokens}/{one.times.prompt_tokens}" if one.times else "-"


def replay_text(rows: Sequence[Replayed], look: Look) -> str:
    return tables.table(
        [
            Column("POLICY", [Cell(r.policy, tables.BOLD) for r in rows]),
            Column("REQUESTS", [Cell(str(r.requests)) for r in rows], 3),
            Column("TOKENS READ", [Cell(f"{r.read_tokens:,}") for r in rows]),
            Column("FIRST TOKEN", [Cell(_s(r.ttft_s)) for r in rows]),
            Column("P95", [Cell(_s(r.ttft_p95_s)) for r in rows], 1),
            Column("WAITED", [Cell(str(r.waited)) for r in rows], 2),
            Column("BY NODE", [Cell(" ".join(f"{n}:{c}" for n, c in r.nodes.items())) for r in rows], 4),
        ],
        look,
    )


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
