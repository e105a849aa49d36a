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
from ollama_distributed.base.tokens import Resume, SourceSink, Written


class Source(Protocol):
    def start(self, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None) -> Generation:
        """Begin a generation; what goes wrong comes as `EngineFailed`.

        `resume`: an answer that another runner began; its `Prepared` names the same model.
        """
        ...

    def elsewhere(self, request: InferenceRequest, resume: Resume) -> bool:
        """Whether someone else than those that the answer left could go on with it now."""
        ...

    async def written(self, request: InferenceRequest) -> Written | None:
        """What other nodes have of an answer to the same request, by its id; None: nothing."""
        ...

    async def hand_over(self, request: InferenceRequest, written: Written) -> None:
        """Leave it at a node that can go on with it, if there is one."""
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...

    async def rerank(self, request: RerankRequest) -> RerankResult: ...

    async def count_tokens(self, request: InferenceRequest) -> int: ...
