"""What a policy says of one call: which models there are, how much may be generated.

Nothing is cut in silence: a request that asks for more is refused with the limit in the message; one
that says nothing gets the limit. A model that is not allowed is answered as one that is not there.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from ollama_distributed.access.policies import allows_model
from ollama_distributed.base.errors import ContextExceeded, Invalid, ModelNotFound
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, RerankRequest
from ollama_distributed.base.policies import Policy
from ollama_distributed.gateway.dialects.contract import Call, Generate


class Counts(Protocol):
    """`base.inference.Inference`."""

    async def count_tokens(self, request: InferenceRequest, /) -> int: ...


def within_policy(call: Call, policy: Policy) -> Call:
    """The call as the policy lets it be, as far as it can be said without the model.

    Raises:
        ModelNotFound: the policy does not have the model.
        Invalid: it asks for more than the policy allows.
    """
    if isinstance(call, Generate):
        for request in call.requests:
            _check(request, policy)
        requests = tuple(_generating(request, policy) for request in call.requests)
        return msgspec.structs.replace(call, requests=requests)
    _check(call.request, policy)
    return call


def needs_count(call: Call, policy: Policy) -> bool:
    """Whether the length of its prompt decides; to be asked of the model."""
    return (
        policy.max_context is not None
        and isinstance(call, Generate)
        and not any(request.load_only for request in call.requests)
    )


async def within_context(call: Call, policy: Policy, counts: Counts) -> Call:
    """As `within_policy`, for prompt and answer together.

    Raises:
        ContextExceeded: together they are longer than the policy allows.
        OllamaDistributedError: the prompt cannot be counted.
    """
    most = policy.max_context
    assert isinstance(call, Generate)
    assert most is not None
    bounded = []
    for request in call.requests:
        prompt = await counts.count_tokens(request)
        wanted = request.sampling.num_predict
        if prompt + max(wanted or 0, 1) > most:
            said = f" and at most {wanted} of answer" if wanted and wanted > 0 else ""
            raise ContextExceeded(
                f"{prompt} tokens of prompt{said} are more than the {most} that the policy "
                f"{policy.name!r} of this key allows together",
                prompt_tokens=prompt,
                context_tokens=most,
            )
        bounded.append(request if wanted and wanted > 0 else _predicting(request, most - prompt))
    return msgspec.structs.replace(call, requests=tuple(bounded))


def _check(request: InferenceRequest | EmbedRequest | RerankRequest, policy: Policy) -> None:
    if not allows_model(request.identity, request.model):
        raise ModelNotFound(f"model '{request.model}' not found")
    context = request.options.num_ctx
    if context is not None and policy.max_context is not None and context > policy.max_context:
        raise Invalid(
            f"a context of {context} tokens is more than the {policy.max_context} that the policy "
            f"{policy.name!r} of this key allows"
        )


def _generating(request: InferenceRequest, policy: Policy) -> InferenceRequest:
    most, wanted = policy.max_output, request.sampling.num_predict
    if most is None:
        return request
    if wanted is None or wanted < 0:
        return _predicting(request, most)
    if wanted > most:
        raise Invalid(
            f"{wanted} tokens of answer are more than the {most} that the policy {policy.name!r} of this "
            "key allows"
        )
    return request


def _predicting(request: InferenceRequest, tokens: int) -> InferenceRequest:
    sampling = msgspec.structs.replace(request.sampling, num_predict=tokens)
    return msgspec.structs.replace(request, sampling=sampling)
