"""How OpenAI's routes ask for sampling, and what `n` makes of a request."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import InferenceRequest, LoadOptions, Sampling
from ollama_distributed.gateway.dialects.fields import INT_MAX, SEED_MAX, stops, within
from ollama_distributed.gateway.dialects.options import merged_options

MAX_CHOICES = 128
"""OpenAI's own bound on `n`; each choice is a generation of its own."""
MAX_TOP_LOGPROBS = 20
MAX_PENALTY = 10.0


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class ServerFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that chat and completions share; from `top_k` on those that llama.cpp's server and vLLM
    take beside OpenAI's own, and their clients send."""

    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None
    top_k: int | None = None
    """-1, as vLLM has it, and 0: all."""
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    """llama.cpp's name; vLLM's is the next one."""
    repetition_penalty: float | None = None
    repeat_last_n: int | None = None
    ignore_eos: bool | None = None
    """Go on to the length that is asked for, as load tools want it, where the engine can."""

    def beside(self) -> dict[str, Any]:
        """What is asked for beside OpenAI's own fields."""
        found: dict[str, Any] = {}
        if self.top_k is not None:
            found["top_k"] = max(within("top_k", self.top_k, -1, INT_MAX) or 0, 0)
        if self.min_p is not None:
            found["min_p"] = within("min_p", self.min_p, 0.0, 1.0)
        if self.typical_p is not None:
            found["typical_p"] = within("typical_p", self.typical_p, 0.0, 1.0)
        if self.repeat_penalty is not None:
            found["repeat_penalty"] = within("repeat_penalty", self.repeat_penalty, 0.0, MAX_PENALTY)
        elif self.repetition_penalty is not None:
            found["repeat_penalty"] = within("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY)
        if self.repeat_last_n is not None:
            found["repeat_last_n"] = within("repeat_last_n", self.repeat_last_n, -1, INT_MAX)
        if self.ignore_eos:
            found["ignore_eos"] = True
        return found


class SamplingFields(Protocol):
    """The fields that chat, completions and responses share."""

    @property
    def options(self) -> dict[str, Any] | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def stop(self) -> str | list[str] | None: ...


def sampling(
    row: SamplingFields,
    *,
    num_predict: int | None,
    bias: dict[str, float] | None = None,
    beside: dict[str, Any] | None = None,
) -> tuple[Sampling, LoadOptions]:
    """OpenAI's defaults differ from Ollama's: temperature and top_p are 1.0 unless the caller,
    or its `options`, say otherwise."""
    options = row.options or {}
    temperature = within("temperature", row.temperature, 0.0, 2.0)
    if temperature is None and options.get("temperature") is None:
        temperature = 1.0
    top_p = within("top_p", row.top_p, 0.0, 1.0)
    if top_p is None and options.get("top_p") is None:
        top_p = 1.0
    return merged_options(
        options,
        temperature=temperature,
        top_p=top_p,
        presence_penalty=within("presence_penalty", row.presence_penalty, -2.0, 2.0),
        frequency_penalty=within("frequency_penalty", row.frequency_penalty, -2.0, 2.0),
        seed=within("seed", row.seed, -SEED_MAX - 1, SEED_MAX),
        stop=stops("stop", row.stop),
        num_predict=num_predict,
        logit_bias=_checked_bias(bias),
        **(beside or {}),
    )


def max_tokens(param: str, value: int | None) -> int | None:
    """Negative, as some clients send it: no limit. 0 is refused: nothing could be answered."""
    if value is None:
        return None
    if value == 0:
        raise Invalid(f"{param} must be at least 1", param=param)
    return max(min(value, INT_MAX), -1)


def _checked_bias(bias: dict[str, float] | None) -> dict[str, float] | None:
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit()):
            raise Invalid(f'logit_bias keys are token ids, got "{token}"', param="logit_bias")
        within(f"logit_bias.{token}", value, -100.0, 100.0)
    return bias or None


def choices(first: InferenceRequest, count: int) -> tuple[InferenceRequest, ...]:
    """`count` requests that differ in id, and in seed where one was given."""
    if count == 1:
        return (first,)
    return (first, *(_sibling(first, number) for number in range(1, count)))


def _sibling(first: InferenceRequest, number: int) -> InferenceRequest:
    drawn = first.sampling
    if drawn.seed is not None and drawn.seed >= 0:
        drawn = msgspec.structs.replace(drawn, seed=(drawn.seed + number) & INT_MAX)
    return msgspec.structs.replace(
        first, request_id=RequestId(f"{first.request_id}-{number}"), sampling=drawn
    )
