"""Each call of the API as data: method, path, body, how to read the answer, what may be repeated.

Pure: the same calls run on both clients. Inference and models go to `/api/v1`; what the seed's
API does not have (create, copy, show, blobs, loaded models) goes to Ollama's `/api`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from ollama_distributed.client import wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.errors import InvalidName

T = TypeVar("T")

Repeat = Literal["always", "unanswered", "unsent"]
"""What may be sent again by itself: `always`: reading, or writing the same twice; `unanswered`:
inference, until the first byte of the answer (it has no effect but work); `unsent`: only what
surely never arrived."""


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    method: str
    path: str
    decode: Callable[[bytes], T]
    """The whole body, or one line of a stream."""
    body: bytes | None = None
    repeat: Repeat = "unsent"
    done: Callable[[T], bool] | None = None
    """Of a stream: says whether this was the last line. A stream that ends without it broke."""
    events: bool = False
    """The stream is server-sent events; else it is lines."""
    text: Callable[[T], Sequence[str]] | None = None
    """Of an answer's stream: the text in a line, which can be taken up again after it."""
    headers: Mapping[str, str] = {}
    missing_is: T | None = None
    """The result when the answer is 404 (asking whether something is there)."""


_decode_generate = decoder_of(wire.GenerateResponse)
_decode_chat = decoder_of(wire.ChatResponse)
_decode_embeddings = decoder_of(wire.EmbeddingsResponse)
_decode_rerank = decoder_of(wire.RerankResponse)
_decode_models = decoder_of(wire.ModelList)
_decode_model = decoder_of(wire.ModelInfo)
_decode_loaded = decoder_of(wire.LoadedList)
_decode_show = decoder_of(wire.ShowResponse)
_decode_progress = decoder_of(wire.Progress)
_decode_transfer = decoder_of(wire.Transfer)
_decode_transfers = decoder_of(wire.TransferList)
_decode_imported = decoder_of(wire.ImportResult)
_decode_status = decoder_of(wire.ModelStatus)
_decode_copies = decoder_of(wire.CopiesList)
_decode_removed = decoder_of(wire.RemovedList)
_decode_version = decoder_of(wire.Version)
_decode_health = decoder_of(wire.Health)
_encode = msgspec.json.Encoder().encode


def _nothing(_: bytes) -> None:
    return None


def generate(request: wire.GenerateRequest, *, stream: bool) -> Call[wire.GenerateResponse]:
    return Call(
        method="POST",
        path="/api/v1/generate",
        body=_encode(msgspec.structs.replace(request, stream=stream)),
        decode=_decode_generate,
        repeat="unanswered",
        done=lambda chunk: chunk.done,
        text=lambda chunk: (chunk.thinking or "", chunk.response),
    )


def chat(request: wire.ChatRequest, *, stream: bool) -> Call[wire.ChatResponse]:
    return Call(
        method="POST",
        path="/api/v1/chat",
        body=_encode(msgspec.structs.replace(request, stream=stream)),
        decode=_decode_chat,
        repeat="unanswered",
        done=lambda chunk: chunk.done,
        text=lambda chunk: (chunk.message.thinking or "", chunk.message.content),
    )


def embeddings(request: wire.EmbeddingsRequest) -> Call[wire.EmbeddingsResponse]:
    return Call(
        method="POST",
        path="/api/v1/embeddings",
        body=_encode(request),
        decode=_decode_embeddings,
        repeat="unanswered",
    )


def rerank(request: wire.RerankRequest) -> Call[wire.RerankResponse]:
    return Call(
        method="POST", path="/v1/rerank", body=_encode(request), decode=_decode_rerank, repeat="unanswered"
    )


# ── models ──────────────────────────────────────────────────────────────────────────


def list_models() -> Call[wire.ModelList]:
    return Call(method="GET", path="/api/v1/models", decode=_decode_models, repeat="always")


def get_model(name: str) -> Call[wire.ModelInfo]:
    return Call(method="GET", path=model_path(name), decode=_decode_model, repeat="always")


def delete_model(name: str) -> Call[None]:
    return Call(method="DELETE", path=model_path(name), decode=_nothing)


def start_download(name: str) -> Call[wire.Transfer]:
    """Again while it runs, it is the same transfer."""
    return Call(method="POST", path=model_path(name) + "/download", decode=_decode_transfer, repeat="always")


def distribute_model(name: str, nodes: Sequence[str]) -> Call[wire.TransferList]:
    return Call(
        method="POST",
        path=model_path(name) + "/distribute",
        body=_encode({"nodes": list(nodes)}),
        decode=_decode_transfers,
        repeat="always",
    )


def model_status(name: str) -> Call[wire.ModelStatus]:
    return Call(method="GET", path=model_path(name) + "/status", decode=_decode_status, repeat="always")


def list_copies() -> Call[wire.CopiesList]:
    return Call(method="GET", path="/api/v1/copies", decode=_decode_copies, repeat="always")


def remove_copies(name: str, nodes: Sequence[str], *, last_copy: bool) -> Call[wire.RemovedList]:
    asked = [("nodes", node) for node in nodes] + ([("last_copy", "true")] if last_copy else [])
    return Call(method="DELETE", path=f"{model_path(name)}?{urlencode(asked)}", decode=_decode_removed)


def list_transfers() -> Call[wire.TransferList]:
    return Call(method="GET", path="/api/v1/transfers", decode=_decode_transfers, repeat="always")


def get_transfer(transfer_id: str) -> Call[wire.Transfer]:
    return Call(method="GET", path=_transfer_path(transfer_id), decode=_decode_transfer, repeat="always")


def cancel_transfer(transfer_id: str) -> Call[wire.Transfer]:
    return Call(method="DELETE", path=_transfer_path(transfer_id), decode=_decode_transfer, repeat="always")


def _transfer_path(transfer_id: str) -> str:
    return f"/api/v1/transfers/{quote(transfer_id, safe='')}"


def pull_model(name: str, *, insecure: bool = False) -> Call[wire.Progress]:
    return _registry_call("/api/pull", name, insecure)


def push_model(name: str, *, insecure: bool = False) -> Call[wire.Progress]:
    return _registry_call("/api/push", name, insecure)


def _registry_call(path: str, name: str, insecure: bool) -> Call[wire.Progress]:
    asked: dict[str, Any] = {"model": name}
    if insecure:
        asked["insecure"] = True
    return Call(
        method="POST",
        path=path,
        body=_encode(asked),
        decode=_decode_progress,
        repeat="unanswered",
        done=lambda line: line.status == "success",
    )


def loaded_models() -> Call[wire.LoadedList]:
    return Call(method="GET", path="/api/ps", decode=_decode_loaded, repeat="always")


def show_model(
    name: str, *, verbose: bool = False, system: str | None = None, options: Mapping[str, Any] | None = None
) -> Call[wire.ShowResponse]:
    asked: dict[str, Any] = {"model": name}
    if verbose:
        asked["verbose"] = True
    if system is not None:
        asked["system"] = system
    if options is not None:
        asked["options"] = options
    return Call(method="POST", path="/api/show", body=_encode(asked), decode=_decode_show, repeat="always")


def create_model(request: wire.CreateRequest) -> Call[wire.Progress]:
    return Call(
        method="POST",
        path="/api/create",
        body=_encode(request),
        decode=_decode_progress,
        done=lambda line: line.status == "success",
    )


def copy_model(source: str, destination: str) -> Call[None]:
    asked = {"source": source, "destination": destination}
    return Call(method="POST", path="/api/copy", body=_encode(asked), decode=_nothing, repeat="always")


def unload_model(name: str) -> Call[wire.GenerateResponse]:
    asked = {"model": name, "keep_alive": 0, "stream": False}
    return Call(
        method="POST", path="/api/generate", body=_encode(asked), decode=_decode_generate, repeat="always"
    )


def has_blob(digest: str) -> Call[bool]:
    return Call(
        method="HEAD", path=_blob_path(digest), decode=lambda _: True, repeat="always", missing_is=False
    )


def put_blob(digest: str) -> Call[None]:
    """The body is streamed by the client that runs it."""
    return Call(method="POST", path=_blob_path(digest), decode=_nothing)


def export_models(names: Sequence[str]) -> Call[bytes]:
    """The answer is a file; the client that runs it writes it as it comes."""
    if len(names) == 1:
        path = model_path(names[0]) + "/bundle"
    else:
        path = "/api/v1/bundles?" + urlencode([("model", name) for name in names])
    return Call(method="GET", path=path, decode=bytes, repeat="always")


def import_bundle(name: str | None, *, replace: bool) -> Call[wire.ImportResult]:
    """The body is streamed by the client that runs it."""
    asked = {key: value for key, value in (("name", name), ("replace", "true" if replace else None)) if value}
    path = "/api/v1/bundles" + (f"?{urlencode(asked)}" if asked else "")
    return Call(method="POST", path=path, decode=_decode_imported)


def version() -> Call[wire.Version]:
    return Call(method="GET", path="/api/v1/version", decode=_decode_version, repeat="always")


def health() -> Call[wire.Health]:
    return Call(method="GET", path="/api/v1/health", decode=_decode_health, repeat="always")


def model_path(name: str) -> str:
    # A name may hold `/` and `:`; a part of dots would be folded into another path on the way.
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidName(f"{name!r} is not a model name")
    return "/api/v1/models/" + quote(name, safe="/:")


def _blob_path(digest: str) -> str:
    return "/api/blobs/" + quote(digest, safe=":")
