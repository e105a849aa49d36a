"""Turns a stored manifest into a `ModelSpec`: reads its small blobs and GGUF headers."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import structlog

from ollama_distributed.base.errors import BlobNotFound, InvalidModel, OllamaDistributedError
from ollama_distributed.catalog.ports import ManifestStamp, Store, StoredManifest
from ollama_distributed.models import manifest as media
from ollama_distributed.models import parameters
from ollama_distributed.models.gguf import (
    Header,
    architecture_of,
    capabilities_of,
    chat_template_of,
    pooling_of,
    thinking_tags_of,
)
from ollama_distributed.models.manifest import Manifest, ModelConfig, parse_config, parse_manifest
from ollama_distributed.models.names import ModelName
from ollama_distributed.models.spec import Architecture, ModelSpec, StoredMessage
from ollama_distributed.models.stored import StoredModel, sizes_of
from ollama_distributed.models.templates import RAW, of_a_model, refusal, twin

log = structlog.get_logger()

_READ = frozenset(
    {
        media.MODEL,
        media.ADAPTER,
        media.PROJECTOR,
        media.TEMPLATE,
        media.PROMPT,
        media.SYSTEM,
        media.PARAMS,
        media.MESSAGES,
        media.LICENSE,
        media.EMBED,
    }
)
"""Layers that are looked into, or ignored; of the others it is enough that they are there."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the store that can be served."""

    name: ModelName
    stamp: ManifestStamp
    manifest: Manifest
    config: ModelConfig
    spec: ModelSpec
    stored: StoredModel
    stored_parameters: dict[str, Any] = {}
    """As they are on disk; options of other versions survive a `create` from this model."""


class Texts(msgspec.Struct, frozen=True, kw_only=True):
    """The small layers of a model."""

    template: str = ""
    system: str = ""
    parameters: dict[str, Any] = {}
    messages: tuple[StoredMessage, ...] = ()
    license: tuple[str, ...] = ()


async def read_entry(store: Store, name: ModelName, stored: StoredManifest) -> Entry:
    """Read everything that a spec needs.

    Raises:
        InvalidModel: manifest, config or GGUF header is damaged, or its format is not ours.
        BlobNotFound: a layer is missing.
    """
    manifest = parse_manifest(stored.data)
    config = parse_config(await store.read_blob(manifest.config.blob, media.MAX_CONFIG_BYTES))
    texts = await _texts(store, manifest)
    if config.remote_host or config.remote_model:
        raise InvalidModel("this model runs on another host (a cloud model); this server cannot serve it")
    models = manifest.of_type(media.MODEL)
    if config.model_format not in ("", "gguf") or not models:
        raise InvalidModel(f"the model's format is {config.model_format or 'unknown'}; only GGUF can be run")
    for layer in manifest.of_type(media.ADAPTER):
        await store.read_header(layer.blob)  # nothing reaches a runner unread
    header = await store.read_header(models[0].blob)
    projectors = manifest.of_type(media.PROJECTOR)
    heard = tuple([await store.read_header(layer.blob) for layer in projectors])
    for layer in (*models[1:], *(layer for layer in manifest.layers if layer.media_type not in _READ)):
        if await store.blob_size(layer.blob) is None:
            raise BlobNotFound(f'blob "{layer.blob}" not found')
    if texts.template and chat_template_of(header) and twin(texts.template) is None:
        # `show` has both: the TEMPLATE in the Modelfile, the one in use as `template`.
        log.warning("catalog.template_not_used", model=name.display, used="the model file's own")
    typed, left_out = parameters.from_stored(texts.parameters)
    if left_out:
        log.warning("catalog.parameters_ignored", model=name.display, parameters=left_out)
    spec = _spec(
        store, name, stored, manifest, config, texts, header, architecture_of(header), projectors=heard
    )
    return Entry(
        name=name,
        stamp=stored.stamp,
        manifest=manifest,
        config=config,
        spec=msgspec.structs.replace(spec, parameters=typed),
        stored=StoredModel(
            name=name,
            key=name.key,
            digest=spec.digest,
            blobs=sizes_of(manifest),
            modified_at=stored.stamp.modified_at,
        ),
        stored_parameters=texts.parameters,
    )


def stored_model(
    name: ModelName, stored: StoredManifest, error: OllamaDistributedError
) -> StoredModel | None:
    """What lies on the disk of a model that cannot be served. None: nobody knows."""
    try:
        manifest = parse_manifest(stored.data)
    except InvalidModel:
        return None
    return StoredModel(
        name=name,
        key=name.key,
        digest=_digest(stored),
        blobs=sizes_of(manifest),
        modified_at=stored.stamp.modified_at,
        lacking=error.message if isinstance(error, BlobNotFound) else "",
    )


def _digest(stored: StoredManifest) -> str:
    return hashlib.sha256(stored.data).hexdigest()


def _spec(
    store: Store,
    name: ModelName,
    stored: StoredManifest,
    manifest: Manifest,
    config: ModelConfig,
    texts: Texts,
    header: Header,
    architecture: Architecture,
    *,
    projectors: tuple[Header, ...],
) -> ModelSpec:
    own = chat_template_of(header)
    jinja, problem = _jinja(texts.template, own)
    pooling = pooling_of(header)
    return ModelSpec(
        name=str(name),
        display=name.display,
        digest=_digest(stored),
        size_bytes=manifest.size_bytes,
        modified_at=stored.stamp.modified_at,
        architecture=architecture,
        weights=store.blob_path(manifest.of_type(media.MODEL)[0].blob),
        weights_bytes=header.file_size,
        projectors=_paths(store, manifest, media.PROJECTOR),
        adapters=_paths(store, manifest, media.ADAPTER),
        chat_template="" if pooling else jinja,
        template=texts.template,
        template_problem="" if pooling else problem,
        template_refuses="raise_exception" in (jinja or own),
        system=texts.system,
        messages=texts.messages,
        license=texts.license,
        capabilities=capabilities_of(
            header, chat_template=jinja or own, go_template=texts.template, projectors=projectors
        ),
        families=config.model_families or (),
        parent=_parent(manifest),
        pooling=pooling,
        thinking_tags=thinking_tags_of(jinja or own),
        requires=config.requires,
    )


def _jinja(go_template: str, own: str) -> tuple[str, str]:
    """The Jinja that replaces the GGUF's own ("": the own one), and what is wrong with it."""
    if not go_template:
        # llama.cpp would take ChatML for a model without a template; Ollama passes the text through.
        return ("" if own else RAW), ""
    known = twin(go_template)
    if known is not None and (known != RAW or not own):
        return known, ""
    if known is None and not _offers_more(own):
        known = of_a_model(go_template)
        if known is not None:
            return known, ""
    if own:
        # As Ollama does by now: what the model's makers wrote in the file goes first.
        return "", ""
    return "", refusal(go_template)


def _offers_more(own: str) -> bool:
    """Than a template of one turn, which knows neither tools nor thinking."""
    return "tools" in own or "tool_call" in own or thinking_tags_of(own) is not None


async def _texts(store: Store, manifest: Manifest) -> Texts:
    async def last(*media_types: str) -> bytes:
        layers = manifest.of_type(*media_types)
        return await store.read_blob(layers[-1].blob, media.MAX_TEXT_BYTES) if layers else b""

    licenses = [
        await store.read_blob(layer.blob, media.MAX_TEXT_BYTES) for layer in manifest.of_type(media.LICENSE)
    ]
    return Texts(
        template=_text(await last(media.TEMPLATE, media.PROMPT)),
        system=_text(await last(media.SYSTEM)),
        parameters=media.parse_parameters(await last(media.PARAMS) or b"{}"),
        messages=media.parse_messages(await last(media.MESSAGES) or b"[]"),
        license=tuple(_text(data) for data in licenses),
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _paths(store: Store, manifest: Manifest, media_type: str) -> tuple[str, ...]:
    return tuple(store.blob_path(layer.blob) for layer in manifest.of_type(media_type))


def _parent(manifest: Manifest) -> str:
    """The model that this one was made from. Files leave their name there too, which is no model."""
    source = manifest.of_type(media.MODEL)[0].from_
    return "" if source.endswith(".gguf") else source
