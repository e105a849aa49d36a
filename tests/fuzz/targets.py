"""What is fuzzed. Each function takes any bytes; what it raises is a finding.

A refusal of ours (`InvalidModel`, `Unauthenticated`, …) is what should happen and is caught here.
Beside that each target says what must hold for what was not refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from ollama_distributed.adapters.engines.llamacpp.vocabulary import fragments_in
from ollama_distributed.base.errors import Forbidden, Invalid, InvalidModel, Unauthenticated
from ollama_distributed.gateway.gate import Head, credential, sent_credential
from ollama_distributed.models import manifest, modelfile, parameters
from ollama_distributed.models.gguf import (
    Header,
    NeedMore,
    architecture_of,
    capabilities_of,
    chat_template_of,
    human_number,
    kind_of,
    model_info,
    numbers_of,
    pooling_of,
    read_header,
    tells_numbers,
    tensor_list,
)
from ollama_distributed.models.memory import estimate
from tests.fuzz.callers import CSRF, GATE, GOOD, SESSION

Target = Callable[[bytes], None]
BEHIND = 1 << 20
"""Bytes of a file behind those that were read."""


def gguf(data: bytes) -> None:
    """The header of a model's file: whole, as the begin of a larger one, and as far as a look needs it."""
    for size, verbose in ((len(data), False), (len(data) + BEHIND, True)):
        try:
            header = read_header(data, size, verbose=verbose)
        except InvalidModel:
            continue
        except NeedMore:
            assert size > len(data), "there is no more"
            continue
        _tensors_lie_in_the_file(header, size)
        _is_told(header, verbose=verbose)
    with suppress(InvalidModel):
        numbers_of(read_header(data, enough=tells_numbers))


def _tensors_lie_in_the_file(header: Header, size: int) -> None:
    end = header.data_offset
    assert end <= size or not header.tensors
    for tensor in sorted(header.tensors, key=lambda one: one.offset):
        begin = header.data_offset + tensor.offset
        assert begin >= end, "it overlaps"
        assert tensor.size > 0
        end = begin + tensor.size
    assert end <= size or not header.tensors, "it ends behind the file"


def _is_told(header: Header, *, verbose: bool) -> None:
    """All that is read out of a header, and shown as JSON."""
    for tell in (kind_of, pooling_of, chat_template_of, _estimated, _capabilities):
        with suppress(InvalidModel):
            tell(header)
    msgspec.json.encode([model_info(header, verbose=verbose), tensor_list(header)])
    fragments_in(header.metadata).withheld(2, "\N{GRINNING FACE}", 3)


def _estimated(header: Header) -> None:
    architecture = architecture_of(header)
    need = estimate(architecture, weights_bytes=header.file_size, context_tokens=1 << 40, slots=256)
    msgspec.json.encode([architecture, need, need.total_bytes, human_number(architecture.parameters)])


def _capabilities(header: Header) -> None:
    capabilities_of(header, chat_template=chat_template_of(header), projectors=(header,))


def read_manifest(data: bytes) -> None:
    """A manifest, and the small layers that it names: config, parameters, messages."""
    named = manifest.named_blobs(data)
    try:
        read = manifest.parse_manifest(data)
    except InvalidModel:
        pass
    else:
        assert read.blobs() <= named, "a blob that is needed would be deleted"
        assert all("/" not in blob.filename and "." not in blob.filename for blob in read.blobs())
        assert manifest.parse_manifest(manifest.encode_manifest(read)) == read
        msgspec.json.encode(read.size_bytes)
    with suppress(InvalidModel):
        config = manifest.parse_config(data)
        assert manifest.parse_config(manifest.encode_config(config)) == config
    with suppress(InvalidModel):
        stored = manifest.parse_parameters(data)
        typed, _ = parameters.from_stored(stored)
        parameters.lines(typed)
        manifest.go_json([stored, typed])
    with suppress(InvalidModel):
        manifest.go_json(manifest.parse_messages(data))


def read_modelfile(data: bytes) -> None:
    """What is printed of a Modelfile reads as the same commands, whatever its texts hold."""
    text = data.decode("utf-8", "replace")
    try:
        commands = modelfile.parse_commands(text)
    except InvalidModel:
        pass
    else:
        assert modelfile.parse_commands(modelfile.print_commands(commands)) == commands
    try:
        asked = modelfile.parse(text)
    except InvalidModel:
        pass
    else:
        msgspec.json.encode(asked)
        parameters.lines(asked.parameters)
    shown = modelfile.generated(display="m", weights=["w"], system=text, template=text, licenses=[text])
    names = [command.name for command in modelfile.parse_commands(shown)]
    assert names == ["from", *(["template", "system"] if text else []), "license"], "a text became commands"


def authorization(data: bytes) -> None:
    """What a caller sends to prove who it is: only the credentials that exist open anything."""
    text = data.decode("latin-1")
    for fields in ({"authorization": text}, {"x-api-key": text}, {"cookie": f"od_session={text}"}):
        for peer in ("127.0.0.1", "192.0.2.1"):
            _is_who_it_says("GET", fields, peer)
    _is_who_it_says("POST", {"cookie": f"od_session={SESSION}", "x-csrf-token": text}, "192.0.2.1")


def _is_who_it_says(method: str, fields: Mapping[str, str], peer: str) -> None:
    head = Head(method, "/api/tags", {"host": "127.0.0.1:8080", **fields}, 1, peer)
    try:
        identity = GATE.admit(head, None).identity
    except (Unauthenticated, Forbidden, Invalid):
        return
    if identity.role == "local":
        assert peer == "127.0.0.1", "a stranger from elsewhere came in"
        assert not credential(head.headers).startswith("odk_"), "a wrong key counts as none"
        return
    assert sent_credential(head) in GOOD, "who is that?"
    if method == "POST":
        assert fields["x-csrf-token"] == CSRF


TARGETS: Mapping[str, Target] = {
    "gguf": gguf,
    "manifest": read_manifest,
    "modelfile": read_modelfile,
    "authorization": authorization,
}
