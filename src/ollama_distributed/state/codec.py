"""Records as bytes: JSON, in one order, so that equal records are equal bytes.

Unknown fields are skipped: a newer node may write more than this version reads.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ollama_distributed.base.errors import Invalid

_encoder = msgspec.json.Encoder(order="deterministic")

T = TypeVar("T", bound=msgspec.Struct)


def encode(record: msgspec.Struct) -> bytes:
    return _encoder.encode(record)


class Decoder:
    """Decodes any of the records; one decoder per type is built once."""

    def __init__(self) -> None:
        self._decoders: dict[type, msgspec.json.Decoder[object]] = {}

    def decode(self, value: bytes, kind: type[T]) -> T:
        """
        Raises:
            Invalid: the bytes are no record of this kind.
        """
        decoder = self._decoders.get(kind)
        if decoder is None:
            decoder = self._decoders[kind] = msgspec.json.Decoder(kind)
        try:
            record = decoder.decode(value)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Invalid(f"no {kind.__name__}: {exc}") from exc
        assert isinstance(record, kind)
        return record


_decoder = Decoder()
decode = _decoder.decode
