"""The plan of a create: layers, their order, merging, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ollama_distributed.base.errors import Invalid, InvalidModel
from ollama_distributed.models import manifest as media
from ollama_distributed.models.create import BaseModel, Changes, File, NewLayer, Plan, check_paths, plan
from ollama_distributed.models.gguf import Header, read_header
from ollama_distributed.models.manifest import Layer, ModelConfig
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.scripted import scripted_model
from ollama_distributed.models.spec import StoredMessage

BLOB = BlobId("a" * 64)


def kinds(made: Plan) -> list[str]:
    return [layer.media_type.rpartition(".")[2] for layer in made.layers]


def content(made: Plan, media_type: str) -> Any:
    return [
        layer.content
        for layer in made.layers
        if isinstance(layer, NewLayer) and layer.media_type == media_type
    ]


@pytest.fixture(scope="module")
def header() -> Header:
    return read_header(scripted_model("hello"))


@pytest.fixture
def file(header: Header) -> File:
    return File(path="m.gguf", blob=BLOB, header=header)


def of(kind: str, file: File, architecture: str = "llama") -> File:
    header = Header(
        version=3,
        metadata={**file.header.metadata, "general.type": kind, "general.architecture": architecture},
        tensors=file.header.tensors,
        alignment=32,
        data_offset=file.header.data_offset,
        file_size=file.header.file_size,
    )
    return File(path=f"{kind}.gguf", blob=BlobId("b" * 64), header=header)


def base(**changes: Any) -> BaseModel:
    layers = (
        Layer(media_type=media.MODEL, digest=BLOB.digest, size=5),
        Layer(media_type=media.TEMPLATE, digest="sha256:" + "1" * 64, size=5),
        Layer(media_type=media.SYSTEM, digest="sha256:" + "2" * 64, size=5),
        Layer(media_type=media.LICENSE, digest="sha256:" + "3" * 64, size=5),
        Layer(media_type=media.PARAMS, digest="sha256:" + "4" * 64, size=5),
    )
    fields: dict[str, Any] = {
        "display": "x:latest",
        "layers": layers,
        "config": ModelConfig(model_format="gguf", model_family="llama"),
    }
    return BaseModel(**(fields | changes))


def test_from_a_file(file: File) -> None:
    made = plan(
        base=None,
        files=[file],
        changes=Changes(
            system="be kind",
            license=("free", ""),
            parameters={"temperature": 0, "stop": "x"},
            messages=(StoredMessage("user", "<hi>"),),
        ),
    )
    assert kinds(made) == ["model", "system", "license", "params", "messages"]
    assert made.layers[0] == Layer(
        media_type=media.MODEL, digest=BLOB.digest, size=file.header.file_size, from_="m.gguf"
    )
    assert json.loads(content(made, media.PARAMS)[0]) == {"stop": ["x"], "temperature": 0.0}
    assert content(made, media.MESSAGES) == [b'[{"role":"user","content":"\\u003chi\\u003e"}]\n']
    assert (made.config.model_format, made.config.model_family) == ("gguf", "llama")
    assert made.config.model_families == ("llama",)


def test_from_a_model_replaces_what_is_given_and_keeps_the_rest() -> None:
    made = plan(
        base=base(parameters={"top_k": 1, "future_option": 5, "stop": ["a"]}),
        changes=Changes(system="new", license=("second",), parameters={"stop": ["b"]}, requires="1.2.3"),
    )
    assert kinds(made) == ["model", "template", "license", "system", "license", "params"]
    assert json.loads(content(made, media.PARAMS)[0]) == {"top_k": 1, "future_option": 5, "stop": ["b"]}
    assert made.config.requires == "1.2.3"
    assert made.config.model_family == "llama"


def test_a_known_template_is_stored_as_written_and_an_unknown_one_refused() -> None:
    template = "{{ .Prompt }}"
    made = plan(base=base(), changes=Changes(template=template))
    assert content(made, media.TEMPLATE) == [template.encode()]
    assert kinds(made).count("template") == 1
    with pytest.raises(InvalidModel, match="TEMPLATE is not one that this server knows"):
        plan(base=base(), changes=Changes(template="{{ .Unknown }}"))
    same = plan(base=base(template="{{ .Unknown }}"), changes=Changes(template="{{ .Unknown }}"))
    assert content(same, media.TEMPLATE) == [b"{{ .Unknown }}"]


def test_projector_and_adapter(file: File) -> None:
    made = plan(
        base=None,
        files=[file, of("mmproj", file, "clip")],
        adapters=[of("adapter", file)],
        changes=Changes(),
    )
    assert kinds(made)[:3] == ["model", "projector", "adapter"]
    assert made.config.model_families == ("llama", "clip")


def test_files_of_the_wrong_kind_are_refused(file: File) -> None:
    with pytest.raises(InvalidModel, match="2 of the files are models"):
        plan(base=None, files=[file, file], changes=Changes())
    with pytest.raises(InvalidModel, match="0 of the files are models"):
        plan(base=None, files=[of("adapter", file)], changes=Changes())
    with pytest.raises(InvalidModel, match="no adapter"):
        plan(base=base(), adapters=[file], changes=Changes())
    with pytest.raises(InvalidModel, match="an adapter for gemma3, the model is llama"):
        plan(base=base(), adapters=[of("adapter", file, "gemma3")], changes=Changes())
    with pytest.raises(Invalid, match="only one adapter"):
        plan(base=base(), adapters=[of("adapter", file)] * 2, changes=Changes())


def test_a_wrong_parameter_stops_the_plan() -> None:
    with pytest.raises(Invalid, match='option "top_k" must be of type integer'):
        plan(base=base(), changes=Changes(parameters={"top_k": "x"}))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "", "a//b", "a\\b", "a\0", "./a", "x" * 2000]
)
def test_cve_2024_39719_paths_that_leave_the_folder_are_refused(path: str) -> None:
    with pytest.raises(Invalid, match="file path must be relative"):
        check_paths({path: BLOB.digest})


def test_plain_paths_are_taken() -> None:
    check_paths({"model.gguf": BLOB.digest, "sub/dir/x.gguf": BLOB.digest})
