"""Keys, policies and who one is, as tables for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ollama_distributed.cli import humanize
from ollama_distributed.cli.tables import DIM, GREEN, RED, YELLOW, Cell, Column, Look, facts, note, table

if TYPE_CHECKING:
    from ollama_distributed.base.access import Explanation, KeyRow, WhoAmI
    from ollama_distributed.base.policies import Limits, Policy

_STATUS = {"valid": GREEN, "expired": YELLOW, "revoked": RED}


def keys_text(rows: Sequence[KeyRow], now: float, look: Look) -> str:
    return table(
        [
            Column("ID", [Cell(row.id) for row in rows]),
            Column("NAME", [Cell(row.name or "-") for row in rows]),
            Column("ROLE", [Cell(row.role) for row in rows]),
            Column("STATUS", [Cell(row.status, _STATUS[row.status]) for row in rows]),
            Column("TEAM", [Cell(row.team) for row in rows], 3),
            Column("POLICY", [Cell(row.holds or "-") for row in rows], 2),
            Column("LAST USED", [Cell(_ago(row.last_used_at, now)) for row in rows], 1),
            Column("EXPIRES", [Cell(_in(row.expires_at, now)) for row in rows], 4),
            Column("CREATED", [Cell(_ago(row.created_at, now), DIM) for row in rows], 5),
        ],
        look,
    )


def key_text(row: KeyRow, now: float, look: Look) -> str:
    own = "" if row.policy or not row.holds else " (of its role or team)"
    return facts(
        [
            ("id", Cell(row.id)),
            ("name", Cell(row.name)),
            ("role", Cell(row.role)),
            ("team", Cell(row.team)),
            ("status", Cell(row.status, _STATUS[row.status])),
            ("policy", Cell(row.holds + own)),
            ("created", Cell(_ago(row.created_at, now))),
            ("by", Cell(row.created_by)),
            ("expires", Cell(_in(row.expires_at, now))),
            ("last used", Cell(_ago(row.last_used_at, now))),
            ("rotated", Cell("" if row.rotated_at is None else _ago(row.rotated_at, now))),
            ("old secret", Cell("" if row.old_until is None else f"good, ends {_in(row.old_until, now)}")),
            ("revoked", Cell("" if row.revoked_at is None else _ago(row.revoked_at, now))),
            ("admin.json of", Cell(row.admin_of)),
        ],
        look,
    )


def whoami_text(who: WhoAmI, now: float, look: Look) -> str:
    may: dict[str, list[str]] = {}
    for name, verbs in who.may.items():
        may.setdefault(", ".join(verbs), []).append(name)
    width = max(map(len, may), default=0)
    rights = "".join(note(f"{verbs:{width}}  ", ", ".join(names), "", look) for verbs, names in may.items())
    return facts(
        [
            ("role", Cell(who.role)),
            ("team", Cell(who.team)),
            ("user", Cell(who.user)),
            ("key", Cell(" ".join(filter(None, (who.key_id, who.key_name))))),
            ("expires", Cell(_in(who.expires_at, now) if who.key_id else "")),
            ("policy", Cell(who.policy.name if who.policy is not None else "none: no limits")),
        ],
        look,
    ) + (f"\nmay, if the policy allows it:\n{rights}" if may else "")


def policies_text(rows: Sequence[Policy], look: Look) -> str:
    return table(
        [
            Column("NAME", [Cell(row.name) for row in rows]),
            Column("MODELS", [Cell(" ".join(row.models)) for row in rows]),
            Column("HOLDS FOR", [Cell(_holds(row)) for row in rows], 1),
            Column("LIMITS", [Cell(", ".join(_limits(row.limits)) or "-") for row in rows], 2),
            Column("PRIORITY", [Cell(row.priority) for row in rows], 3),
            Column("VERSION", [Cell(str(row.version), DIM) for row in rows], 4),
        ],
        look,
    )


def policy_text(policy: Policy, look: Look) -> str:
    return facts(
        [
            ("name", Cell(policy.name)),
            ("version", Cell(str(policy.version))),
            ("models", Cell(" ".join(policy.models) or "none")),
            ("routes", Cell(" ".join(policy.routes) or "none")),
            ("read only", Cell("yes" if policy.read_only else "")),
            ("max context", Cell(_tokens(policy.max_context))),
            ("max output", Cell(_tokens(policy.max_output))),
            ("priority", Cell(f"{policy.priority} at most")),
            ("nodes", Cell(" ".join(f"{name}={value}" for name, value in sorted(policy.nodes.items())))),
            ("cache group", Cell(policy.cache_group)),
            ("limits", Cell(", ".join(_limits(policy.limits)))),
            ("holds for", Cell(_holds(policy))),
            ("comment", Cell(policy.comment)),
        ],
        look,
    )


def explanation_text(said: Explanation, look: Look) -> str:
    verdict = Cell("allowed", GREEN) if said.allowed else Cell("refused", RED)
    policy = "none: no limits" if said.policy is None else f"{said.policy.name} (by {said.by})"
    reasons = [("because" if number == 0 else "", Cell(text)) for number, text in enumerate(said.reasons)]
    who = f"role {said.role}, team {said.team}"
    return facts([("who", Cell(who)), ("policy", Cell(policy)), ("verdict", verdict), *reasons], look)


def _holds(policy: Policy) -> str:
    named = [*(f"role {role}" for role in policy.roles), *(f"team {team}" for team in policy.teams)]
    return ", ".join(named) or "keys that name it"


def _limits(limits: Limits) -> list[str]:
    said = [
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.requests_per_month, "requests/month"),
        (limits.tokens_per_month, "tokens/month"),
        (limits.budget_per_month, "money/month"),
        (limits.concurrency, "at once"),
    ]
    found = [
        f"{number:g} {unit}" if isinstance(number, float) else f"{number} {unit}"
        for number, unit in said
        if number is not None
    ]
    return [*found, "a team together"] if found and limits.shared_by == "team" else found


def _tokens(number: int | None) -> str:
    return "" if number is None else f"{number} tokens"


def _ago(at: float | None, now: float) -> str:
    return "never" if not at else f"{humanize.age(now - at)} ago"


def _in(at: float | None, now: float) -> str:
    if at is None:
        return "never"
    return f"in {humanize.age(at - now)}" if at > now else f"{humanize.age(now - at)} ago"
