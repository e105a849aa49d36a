"""The answer of `/api/show`."""

from __future__ import annotations

from ollama_distributed.catalog.entries import Entry
from ollama_distributed.catalog.ports import Store
from ollama_distributed.catalog.wire import ShownModel, capabilities, details
from ollama_distributed.models import manifest as media
from ollama_distributed.models import modelfile, parameters
from ollama_distributed.models.gguf import chat_template_of, model_info, tensor_list
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.templates import PASSTHROUGH


async def show_entry(store: Store, entry: Entry, *, verbose: bool, system: str) -> ShownModel:
    """Reads the headers again: a model's tensors and vocabulary are not kept in memory."""
    spec = entry.spec
    header = await store.read_header(entry.manifest.of_type(media.MODEL)[0].blob, verbose=verbose)
    projectors = entry.manifest.of_type(media.PROJECTOR)
    projector = await store.read_header(projectors[0].blob, verbose=verbose) if projectors else None
    used = spec.template if spec.chat_template or spec.template_problem else chat_template_of(header)
    return ShownModel(
        spec=spec,
        details=details(spec),
        license="\n".join(spec.license),
        modelfile=modelfile.generated(
            display=spec.display,
            weights=(spec.weights, *spec.projectors),
            adapters=spec.adapters,
            template=spec.template or PASSTHROUGH,
            system=system or spec.system,
            renderer=entry.config.renderer,
            parser=entry.config.parser,
            options=spec.parameters,
            licenses=spec.license,
            messages=spec.messages,
        ),
        parameters=parameters.lines(spec.parameters),
        template=used or PASSTHROUGH,
        system=system or spec.system,
        renderer=entry.config.renderer,
        parser=entry.config.parser,
        messages=spec.messages,
        model_info=model_info(header, verbose=verbose),
        projector_info=model_info(projector, verbose=verbose) if projector else None,
        tensors=tensor_list(header),
        capabilities=capabilities(spec),
        modified_at=spec.modified_at,
        requires=spec.requires,
    )


def show_remote(spec: ModelSpec) -> ShownModel:
    """A model of another engine: what its engine told us."""
    architecture = spec.architecture
    info: dict[str, object] = {}
    if architecture.name:
        info["general.architecture"] = architecture.name
        if architecture.context_tokens:
            info[f"{architecture.name}.context_length"] = architecture.context_tokens
        if architecture.embedding_length:
            info[f"{architecture.name}.embedding_length"] = architecture.embedding_length
    return ShownModel(
        spec=spec,
        details=details(spec),
        license="\n".join(spec.license),
        modelfile=modelfile.generated(display=spec.display, weights=(spec.display,)),
        parameters=parameters.lines(spec.parameters),
        template=spec.template,
        system=spec.system,
        renderer="",
        parser="",
        messages=spec.messages,
        model_info=info,
        projector_info=None,
        tensors=[],
        capabilities=capabilities(spec),
        modified_at=spec.modified_at,
        requires=spec.requires,
        remote_model=spec.remote.name if spec.remote else "",
        remote_host=spec.remote.engine if spec.remote else "",
    )
