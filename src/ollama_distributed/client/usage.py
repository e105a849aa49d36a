"""`client.usage`: who used what; for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from ollama_distributed.base import usage as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync

_decode = decoder_of(wire.UsageAnswer)


def get(
    *,
    by: Sequence[wire.By] = ("day",),
    start: str | None = None,
    end: str | None = None,
    key: str = "",
    team: str = "",
) -> Call[wire.UsageAnswer]:
    """Tokens, requests, seconds, energy and money of the whole cluster, grouped by `by`.

    `start`, `end`: days such as 2026-11-23, UTC, both included; the last 30 unless said. `key`,
    `team`: only theirs. Names in `missing` did not answer.
    """
    return Call(method="GET", path=_path(by, start, end, key, team, "json"), decode=_decode, repeat="always")


def csv(
    *,
    by: Sequence[wire.By] = ("day",),
    start: str | None = None,
    end: str | None = None,
    key: str = "",
    team: str = "",
) -> Call[str]:
    """As `get`, as CSV text with a head."""
    return Call(
        method="GET", path=_path(by, start, end, key, team, "csv"), decode=bytes.decode, repeat="always"
    )


def _path(by: Sequence[wire.By], start: str | None, end: str | None, key: str, team: str, form: str) -> str:
    asked = {"by": ",".join(by), "from": start, "to": end, "key": key, "team": team, "format": form}
    return "/api/v1/usage?" + urlencode({name: text for name, text in asked.items() if text is not None})


class Usage(Group):
    """`client.usage`."""

    get = run(get)
    csv = run(csv)


class SyncUsage(SyncGroup):
    """`client.usage`."""

    get = run_sync(get)
    csv = run_sync(csv)
