"""An error on its way between nodes: class, text and fields survive the wire.

The code says which class it is; a code that this version does not know becomes the nearest
class that behaves alike (whether a retry helps), so old and new nodes understand each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ollama_distributed.base.errors import EngineError, OllamaDistributedError, Unavailable

Detail = str | int | float | bool | None


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    code: str
    message: str
    retryable: bool = False
    details: Mapping[str, Detail] = {}
    """Fields of the class: `retry_after_s`, `revision`, `param`, ..."""


def refusal_of(error: OllamaDistributedError) -> Refusal:
    details = {
        name: value
        for name, value in vars(error).items()
        if name != "message" and isinstance(value, (str, int, float, bool, type(None)))
    }
    return Refusal(code=error.code, message=error.message, retryable=error.retryable, details=details)


def error_of(refusal: Refusal) -> OllamaDistributedError:
    """The error as it was raised over there; fields that its class does not have are dropped."""
    kind = _BY_CODE.get(refusal.code)
    if kind is None:
        return (Unavailable if refusal.retryable else EngineError)(refusal.message)
    error = kind(refusal.message)
    for name, value in refusal.details.items():
        if name in vars(error):
            setattr(error, name, value)
    return error


def _tree(kind: type[OllamaDistributedError]) -> Iterator[type[OllamaDistributedError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_BY_CODE: Mapping[str, type[OllamaDistributedError]] = {
    kind.code: kind for kind in _tree(OllamaDistributedError)
}
