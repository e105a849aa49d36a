"""What the way a call is made adds to its requests: nobody sees a part, or has a part already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.gateway.dialects.contract import Generate

RESUME_AT = "x-ollama-resume-at"
"""Bytes of the answer's text that the client has; with the `x-request-id` that it was given."""


def requests_of(call: Generate, headers: Mapping[str, str]) -> Sequence[InferenceRequest]:
    """
    Raises:
        Invalid: the header is no number, or the call has several answers.
    """
    requests: Sequence[InferenceRequest] = call.requests
    if not call.stream:
        # Nobody sees a part of it: what cannot be continued may begin again, and the engine may send
        # it in one piece.
        requests = [one if one.whole else msgspec.structs.replace(one, whole=True) for one in requests]
    if RESUME_AT in headers:
        at = headers[RESUME_AT]
        if not (at.isascii() and at.isdigit() and len(at) <= 12 and "x-request-id" in headers):
            raise Invalid(f"{RESUME_AT} is a number of bytes, and x-request-id says of which answer")
        if len(requests) > 1:
            raise Invalid("a call with several answers cannot be taken up again")
        requests = [msgspec.structs.replace(requests[0], resume_at=int(at))]
    return requests
