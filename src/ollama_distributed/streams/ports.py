"""What streams needs of the world: someone who generates tokens for a request.

On one node that is `serving.service.Serving`; in a cluster also a node far away.
"""

from __future__ import annotations

from typing import Protocol

from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Generation,
    InferenceRequest,
    RerankRequest,
    RerankResult,
)
from ollama_distributed.base.tokens import SourceSink


class Source(Protocol):
    def start(
        self, request: InferenceRequest, sink: SourceSink, resume_ids: tuple[int, ...] = ()
    ) -> Generation:
        """Begin a generation; what goes wrong comes as `EngineFailed`.

        `resume_ids`: tokens of the same answer that another source emitted; generation
        goes on after them (migration rule R1).
        """
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...

    async def rerank(self, request: RerankRequest) -> RerankResult: ...

    async def count_tokens(self, request: InferenceRequest) -> int: ...
