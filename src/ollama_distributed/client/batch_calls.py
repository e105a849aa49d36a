"""The calls about files and batches as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlencode

import msgspec

from ollama_distributed.base import batches as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call

_decode_file = decoder_of(wire.FileObject)
_decode_files = decoder_of(wire.FileList)
_decode_deleted = decoder_of(wire.FileDeleted)
_decode_batch = decoder_of(wire.Batch)
_decode_batches = decoder_of(wire.BatchList)
_encode = msgspec.json.Encoder().encode


def upload_file(boundary: str) -> Call[wire.FileObject]:
    """The body is streamed by the client that runs it."""
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return Call(method="POST", path="/v1/files", decode=_decode_file, headers=kind)


def list_files(*, limit: int = 10_000, after: str = "", purpose: str = "") -> Call[wire.FileList]:
    """Your own files, newest first. `away`: nodes that did not answer, and so are not in the list."""
    asked = {"limit": str(limit), "after": after, "purpose": purpose}
    return Call(method="GET", path=_with("/v1/files", asked), decode=_decode_files, repeat="always")


def get_file(file_id: str) -> Call[wire.FileObject]:
    return Call(method="GET", path=_file_path(file_id), decode=_decode_file, repeat="always")


def delete_file(file_id: str) -> Call[wire.FileDeleted]:
    """Raises `Conflict` while a batch reads it."""
    return Call(method="DELETE", path=_file_path(file_id), decode=_decode_deleted)


def file_content(file_id: str) -> Call[bytes]:
    return Call(method="GET", path=_file_path(file_id) + "/content", decode=bytes, repeat="always")


def create_batch(
    input_file_id: str,
    endpoint: str = "/v1/chat/completions",
    *,
    completion_window: str = "24h",
    metadata: Mapping[str, str] | None = None,
) -> Call[wire.Batch]:
    """Have the requests of a file answered in idle slots, within the window."""
    ask = wire.BatchAsk(
        input_file_id=input_file_id,
        endpoint=endpoint,
        completion_window=completion_window,
        metadata=dict(metadata) if metadata is not None else None,
    )
    return Call(method="POST", path="/v1/batches", body=_encode(ask), decode=_decode_batch)


def list_batches(*, limit: int = 100, after: str = "") -> Call[wire.BatchList]:
    """Your own batches, newest first; `away` as with files."""
    asked = {"limit": str(limit), "after": after}
    return Call(method="GET", path=_with("/v1/batches", asked), decode=_decode_batches, repeat="always")


def get_batch(batch_id: str) -> Call[wire.Batch]:
    """How far it is; at its end the files with its results."""
    return Call(method="GET", path=_batch_path(batch_id), decode=_decode_batch, repeat="always")


def cancel_batch(batch_id: str) -> Call[wire.Batch]:
    """End it; the results that are there stay. Raises `Conflict` when it is over."""
    return Call(method="POST", path=_batch_path(batch_id) + "/cancel", decode=_decode_batch, repeat="always")


def _file_path(file_id: str) -> str:
    return f"/v1/files/{quote(file_id, safe='')}"


def _batch_path(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"


def _with(path: str, asked: Mapping[str, str]) -> str:
    return f"{path}?{urlencode({name: value for name, value in asked.items() if value})}"
