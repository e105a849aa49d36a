"""What is said twice on purpose (a record and its wire form, a form and its SDK call) says the same."""

from __future__ import annotations

import inspect

import msgspec

from ollama_distributed.base.access import PolicyAsk
from ollama_distributed.base.policies import Policy
from ollama_distributed.base.usage import RowKey, Sums, UsageRow
from ollama_distributed.client.access_calls import create_policy


def fields(kind: type[msgspec.Struct]) -> dict[str, object]:
    return {field.name: (field.type, field.default) for field in msgspec.structs.fields(kind)}


def test_all_that_a_policy_says_can_be_asked_for() -> None:
    kept, asked = fields(Policy), fields(PolicyAsk)
    said_by_us = {"by", "at"}
    assert asked.keys() == kept.keys() - said_by_us
    differ = {name for name in asked if asked[name] != kept[name]}
    assert differ == {"name", "version"}  # the path may name it; which one is changed may be left out


def test_the_sdk_asks_for_all_that_a_policy_may_say() -> None:
    asked = set(inspect.signature(create_policy).parameters)
    assert asked == set(fields(PolicyAsk)) - {"version"}


def test_the_api_tells_all_that_ledgers_count() -> None:
    told = fields(UsageRow).keys()
    assert fields(Sums).keys() - told == {"joules"}  # told as `energy_wh`
    assert fields(RowKey).keys() - told == {"start", "days"}  # told as `day` or `hour`
