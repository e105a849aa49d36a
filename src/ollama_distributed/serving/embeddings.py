"""Embedding inputs cut to fit, vectors normalised. Source: Ollama `server/routes.go` EmbedHandler."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ollama_distributed.base.errors import ContextExceeded, EngineError, Invalid
from ollama_distributed.serving.ports import Runner

TOO_LONG = "the input length exceeds the context length"
"""Ollama's text."""

NO_ROOM = "input after truncation exceeds maximum context length"
"""Ollama's text."""

_SPECIALS = 4
"""Most tokens that a tokenizer puts around a text."""


async def fit_inputs(
    runner: Runner, inputs: Sequence[str | tuple[int, ...]], limit: int, *, truncate: bool
) -> list[str | tuple[int, ...]]:
    """Each input with at most `limit` tokens, those that the tokenizer adds included.

    Raises:
        ContextExceeded: one is longer and `truncate` is false.
    """
    return [await _fit(runner, one, limit, truncate=truncate) for one in inputs]


async def _fit(
    runner: Runner, one: str | tuple[int, ...], limit: int, *, truncate: bool
) -> str | tuple[int, ...]:
    if isinstance(one, str):
        # No token is shorter than a byte: most inputs fit without being counted.
        if len(one) * 4 + _SPECIALS <= limit or len(one.encode()) + _SPECIALS <= limit:
            return one
        ids = await runner.tokenize(one)
        if len(ids) <= limit:
            return one
    else:
        ids = list(one)
        if len(ids) <= limit:
            return one
    if not truncate:
        raise ContextExceeded(TOO_LONG, prompt_tokens=len(ids), context_tokens=limit)
    if not isinstance(one, str):
        return tuple(ids[:limit])
    return keep_ends(ids, await runner.tokenize(one, add_special=False), limit)


def keep_ends(ids: Sequence[int], body: Sequence[int], limit: int) -> tuple[int, ...]:
    """`ids` cut to `limit` inside `body`, so that what the tokenizer put around it stays.

    An embedding of a text without its [SEP] is another embedding.

    Raises:
        Invalid: nothing of the text is left.
    """
    for start in range(len(ids) - len(body) + 1):
        if list(ids[start : start + len(body)]) == list(body):
            around = len(ids) - len(body)
            room = limit - around
            if room <= 0:
                raise Invalid(NO_ROOM)
            return (*ids[:start], *body[:room], *ids[start + len(body) :])
    if limit <= 0:
        raise Invalid(NO_ROOM)
    return tuple(ids[:limit])


def finished_vector(vector: Sequence[float], *, normalize: bool, dimensions: int | None) -> tuple[float, ...]:
    """The first `dimensions` numbers, of length 1 if `normalize`.

    Raises:
        EngineError: the vector has a NaN or an infinity.
    """
    if dimensions is not None and 0 < dimensions < len(vector):
        # Of the cut vector only the length changes: normalising before it would be undone.
        vector = vector[:dimensions]
    if not normalize:
        return tuple(vector)
    length = math.hypot(*vector)
    if not math.isfinite(length):
        raise EngineError("embedding contains NaN or Inf values")
    if length == 0.0:
        return tuple(vector)
    return tuple(number / length for number in vector)
