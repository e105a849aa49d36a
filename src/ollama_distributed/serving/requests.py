"""What a request comes to on this node: the model, its complete options, the load that it needs.

`options.py` decides what wins; here it is remembered, since requests for one model ask for the same
again and again, and to merge forty fields takes longer than all else before the engine.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from ollama_distributed.base.inference import InferenceRequest, LoadOptions, Sampling
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving import options, prompts
from ollama_distributed.serving.options import Rules, Shape
from ollama_distributed.serving.ports import Catalogue

_REMEMBERED = 1024
"""Merged options kept for the next request; all are forgotten when so many came together."""

_Key = TypeVar("_Key", bound=Hashable)
_Kept = TypeVar("_Kept")


class Requests:
    def __init__(self, catalogue: Catalogue, rules: Rules) -> None:
        self._catalogue = catalogue
        self._rules = rules
        self._models: dict[str, Sampling] = {}
        """By digest: the defaults under the model's own."""
        self._merged: dict[tuple[str, Sampling], Sampling] = {}
        self._shapes: dict[tuple[str, LoadOptions], Shape] = {}

    def configure(self, rules: Rules) -> None:
        """Use other settings from now on."""
        self._rules = rules
        self._shapes.clear()

    async def find(self, request: InferenceRequest) -> tuple[ModelSpec, Sampling, Shape]:
        """The model, and what the request's options come to for it.

        Raises:
            ModelNotFound, InvalidModel: as `Catalogue.resolve`.
            Unsupported: it cannot do what is asked.
            Invalid: the request contradicts itself, or a PARAMETER has the wrong type.
        """
        return self._found(await self._catalogue.resolve(request.model), request)

    def find_now(self, request: InferenceRequest) -> tuple[ModelSpec, Sampling, Shape] | None:
        """As `find`; None: the disk has to be looked at."""
        spec = self._catalogue.known(request.model)
        return None if spec is None else self._found(spec, request)

    def shape(self, spec: ModelSpec, asked: LoadOptions) -> Shape:
        """The load that these options need. Raises `Invalid`."""
        shape = self._shapes.get((spec.digest, asked))
        if shape is None:
            shape = options.shape_of(spec, asked, self._rules)
            _keep(self._shapes, (spec.digest, asked), shape)
        return shape

    def _found(self, spec: ModelSpec, request: InferenceRequest) -> tuple[ModelSpec, Sampling, Shape]:
        if request.load_only and request.keep_alive_s == 0:
            return spec, options.DEFAULTS, self.shape(spec, request.options)
        prompts.check(spec, request)
        if not request.load_only:
            spec = prompts.with_template(spec, request.prompt)
        return spec, self._sampling(spec, request.sampling), self.shape(spec, request.options)

    def _sampling(self, spec: ModelSpec, asked: Sampling) -> Sampling:
        if asked.logit_bias is not None:  # a mapping: no key of a dictionary
            return options.overlay(self._of_model(spec), asked)
        found = self._merged.get((spec.digest, asked))
        if found is None:
            found = options.overlay(self._of_model(spec), asked)
            _keep(self._merged, (spec.digest, asked), found)
        return found

    def _of_model(self, spec: ModelSpec) -> Sampling:
        found = self._models.get(spec.digest)
        if found is None:
            found = options.model_sampling(spec.parameters)
            _keep(self._models, spec.digest, found)
        return found


def _keep(kept: dict[_Key, _Kept], key: _Key, value: _Kept) -> None:
    if len(kept) >= _REMEMBERED:
        kept.clear()
    kept[key] = value
