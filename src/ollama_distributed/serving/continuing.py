"""Decides what an answer that another runner began comes to here (migration rules R1, R2 and R4).

The journal of what was emitted is kept in `streams/`; here it becomes the next runner's prompt.
"""

from __future__ import annotations

import zlib

import msgspec

from ollama_distributed.base.errors import ContextExceeded, ModelNotFound, Unsupported
from ollama_distributed.base.inference import InferenceRequest, Sampling
from ollama_distributed.base.tokens import Resume
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import CompletionRequest, Runner
from ollama_distributed.serving.prompts import (
    Prompt,
    completion,
    cut_to_fit,
    request_images,
    tags,
    thinking_of,
)


def resumable(request: InferenceRequest, prompt: Prompt) -> bool:
    """Rule R2: a grammar's state is lost with its runner, and so is a tool parser's. The text
    around a gap is put together by the engine, which takes no ids after it."""
    return isinstance(prompt.ask, CompletionRequest) and request.format is None and not prompt.ask.suffix


def check(spec: ModelSpec, request: InferenceRequest, resume: Resume) -> None:
    """Rules R2 and R4.

    Raises:
        ModelNotFound: this node's model of that name is not the one that began.
        Unsupported: it cannot be continued at all.
    """
    if request.format is not None:
        raise Unsupported("an answer with a grammar cannot be continued on another runner")
    if spec.digest != resume.model_digest:
        raise ModelNotFound(f"{request.model} of this node is not the model that began this answer")


def reseeded(sampling: Sampling, emitted: int) -> Sampling:
    """With another seed after so many tokens: the same one would draw the answer's first numbers
    again. Greedy sampling draws none, and no seed is a random one anyway."""
    if sampling.seed is None or sampling.seed < 0 or not sampling.temperature:
        return sampling
    return msgspec.structs.replace(sampling, seed=zlib.crc32(b"%d after %d" % (sampling.seed, emitted)))


def continued(spec: ModelSpec, request: InferenceRequest, sampling: Sampling, resume: Resume) -> Prompt:
    """Rule R1: the prompt as the first runner read it, then what was emitted already."""
    ids = (*resume.prompt_ids, *resume.ids) if resume.prompt_ids else (resume.prompt_text, resume.ids)
    images, thinking_tags = request_images(request), tags(spec, thinking_of(spec, request))
    return Prompt(
        ask=completion(request, sampling, ids, images=images, thinking_tags=thinking_tags),
        rendered=resume.prompt_text,
        ids=resume.prompt_ids,
        images=len(images),
        thinking_tags=thinking_tags,
    )


async def slid(
    runner: Runner, spec: ModelSpec, request: InferenceRequest, sampling: Sampling, resume: Resume
) -> Prompt:
    """An answer that went on beyond the context, whose window had slid: it slides again.

    Raises:
        ContextExceeded: it has images, which cannot be cut.
    """
    context_tokens = runner.plan.context_tokens
    if request_images(request):
        raise ContextExceeded("prompt and answer are longer than the context", context_tokens=context_tokens)
    ids = (*(resume.prompt_ids or await runner.tokenize(resume.prompt_text)), *resume.ids)
    shorter, thinking_tags = cut_to_fit(ids, context_tokens, sampling), tags(spec, thinking_of(spec, request))
    return Prompt(
        ask=completion(request, sampling, shorter, thinking_tags=thinking_tags), thinking_tags=thinking_tags
    )
