"""Plans a `create`: which layers the new manifest has, and what its config says.

Pure: the base and the uploaded files come with their headers already read; the plan
says what to write. Order and merging of layers follow Ollama's `server/create.go`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid, InvalidModel
from ollama_distributed.models import manifest as media
from ollama_distributed.models import parameters as options
from ollama_distributed.models.gguf import (
    Header,
    architecture_of,
    chat_template_of,
    human_number,
    kind_of,
    pooling_of,
)
from ollama_distributed.models.gguf.facts import architecture_name
from ollama_distributed.models.manifest import Layer, ModelConfig, go_json
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.spec import StoredMessage
from ollama_distributed.models.templates import detect, of_a_model, refusal

MAX_FILES = 64
MAX_PATH = 1_024


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model named by `from`."""

    display: str
    layers: tuple[Layer, ...]
    config: ModelConfig
    parameters: Mapping[str, Any] = {}
    """As stored, untyped."""
    template: str = ""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded GGUF file."""

    path: str
    """Relative name at the client."""
    blob: BlobId
    header: Header


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the request that do not name files."""

    template: str = ""
    system: str = ""
    license: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = {}
    messages: tuple[StoredMessage, ...] = ()
    renderer: str = ""
    parser: str = ""
    requires: str = ""


class NewLayer(msgspec.Struct, frozen=True):
    """A layer whose content is still to be stored."""

    media_type: str
    content: bytes


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    layers: tuple[Layer | NewLayer, ...]
    config: ModelConfig
    detected: str = ""
    """The known format of the file's own chat template, whose stop texts were added."""


def check_paths(files: Mapping[str, str]) -> None:
    """File names are labels and never opened; one that points elsewhere is refused all the same.

    Raises:
        Invalid: with Ollama's text, `file path must be relative`.
    """
    if len(files) > MAX_FILES:
        raise Invalid(f"{len(files)} files are given; at most {MAX_FILES} are taken")
    for path in files:
        parts = path.split("/")
        if len(path) > MAX_PATH or "\\" in path or "\x00" in path or any(p in ("", ".", "..") for p in parts):
            raise Invalid("file path must be relative")


def plan(
    *,
    base: BaseModel | None,
    files: Sequence[File] = (),
    adapters: Sequence[File] = (),
    changes: Changes,
) -> Plan:
    """What to write for this request.

    Raises:
        InvalidModel: a file is of the wrong kind, or the TEMPLATE is not known.
        Invalid: a parameter is unknown or of the wrong type.
    """
    layers: list[Layer | NewLayer] = [*base.layers] if base else []
    config = base.config if base else ModelConfig()
    inherited = dict(base.parameters) if base else {}
    if base is None:
        layers += [_file_layer(file) for file in files]
        config = _config_of(files)
    for adapter in adapters:
        if kind_of(adapter.header) != "adapter":
            raise InvalidModel(f"{adapter.path} is no adapter: its general.type is not 'adapter'")
        if config.model_family and architecture_name(adapter.header) != config.model_family:
            raise InvalidModel(
                f"{adapter.path} is an adapter for {architecture_name(adapter.header)}, "
                f"the model is {config.model_family}"
            )
        layers.append(_file_layer(adapter))
    if len(adapters) > 1:
        raise Invalid("only one adapter is currently supported")

    detected, stops = ("", ()) if base else _detected(files)
    if stops:
        inherited["stop"] = list(stops)
    if changes.template:
        same = base is not None and base.template == changes.template
        if not same and of_a_model(changes.template) is None:
            raise InvalidModel(refusal(changes.template))
        layers = _without(layers, media.TEMPLATE, media.PROMPT)
        layers.append(NewLayer(media.TEMPLATE, changes.template.encode()))
    if changes.system:
        layers = _without(layers, media.SYSTEM)
        layers.append(NewLayer(media.SYSTEM, changes.system.encode()))
    layers += [NewLayer(media.LICENSE, text.encode()) for text in changes.license if text]
    merged = inherited | options.from_json(changes.parameters)
    if merged:
        layers = _without(layers, media.PARAMS)
        layers.append(NewLayer(media.PARAMS, go_json(dict(sorted(merged.items())))))
    if changes.messages:
        layers = _without(layers, media.MESSAGES)
        rows = [{"role": message.role, "content": message.content} for message in changes.messages]
        layers.append(NewLayer(media.MESSAGES, go_json(rows)))
    _check_sizes(layers)
    return Plan(
        layers=tuple(layers),
        config=msgspec.structs.replace(
            config,
            renderer=changes.renderer or config.renderer,
            parser=changes.parser or config.parser,
            requires=changes.requires or config.requires,
        ),
        detected=detected,
    )


def _file_layer(file: File) -> Layer:
    kinds = {"model": media.MODEL, "adapter": media.ADAPTER, "projector": media.PROJECTOR}
    return Layer(
        media_type=kinds[kind_of(file.header)],
        digest=file.blob.digest,
        size=file.header.file_size,
        from_=file.path,
    )


def _config_of(files: Sequence[File]) -> ModelConfig:
    """The config of a model made from files: there must be exactly one model among them."""
    models = [file for file in files if kind_of(file.header) == "model"]
    if len(models) != 1:
        raise InvalidModel(
            f"{len(models)} of the files are models; exactly one is needed, beside projectors and adapters"
        )
    header = models[0].header
    architecture = architecture_of(header)
    pooling_of(header)
    families = [architecture.name]
    families += [
        name
        for name in (architecture_name(file.header) for file in files if kind_of(file.header) == "projector")
        if name not in families
    ]
    return ModelConfig(
        model_format="gguf",
        model_family=architecture.name,
        model_families=tuple(families),
        model_type=human_number(architecture.parameters),
        file_type=architecture.file_type,
    )


def _detected(files: Sequence[File]) -> tuple[str, tuple[str, ...]]:
    model = next(file for file in files if kind_of(file.header) == "model")
    return detect(chat_template_of(model.header))


def _without(layers: list[Layer | NewLayer], *media_types: str) -> list[Layer | NewLayer]:
    return [layer for layer in layers if layer.media_type not in media_types]


def _check_sizes(layers: Sequence[Layer | NewLayer]) -> None:
    for layer in layers:
        if isinstance(layer, NewLayer) and len(layer.content) > media.MAX_TEXT_BYTES:
            kind = layer.media_type.rpartition(".")[2]
            raise Invalid(f"{kind} is {len(layer.content)} bytes; at most {media.MAX_TEXT_BYTES} are stored")
