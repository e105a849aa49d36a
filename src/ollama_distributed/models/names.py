"""Names of models and blobs, exactly as Ollama reads them.

`[scheme://][host/][namespace/]model[:tag]`; defaults registry.ollama.ai, library,
latest; compared without case. A `ModelName` or `BlobId` that exists is valid: nothing
else may become part of a path (CVE-2024-37032). Source: Ollama `types/model/name.go`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import msgspec

from ollama_distributed.base.errors import InvalidName

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
DEFAULT_SCHEME = "https"

_FIRST = "[A-Za-z0-9_]"
# `\Z`, not `$`: `$` would let one trailing newline through.
_HOST = re.compile(_FIRST + r"[A-Za-z0-9_.:-]{0,349}\Z")
_NAMESPACE = re.compile(_FIRST + r"[A-Za-z0-9_-]{0,79}\Z")
_MODEL = re.compile(_FIRST + r"[A-Za-z0-9_.-]{0,79}\Z")
_TAG = _MODEL
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}\Z")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_DIGEST_LIKE = re.compile(r"sha256[:-][0-9a-f]{64}\Z", re.IGNORECASE)

_LONGEST_NAME = 620
"""Longest text worth looking at: scheme, 350 + 3 x 80 characters and separators."""


class ModelName(msgspec.Struct, frozen=True, kw_only=True):
    """A fully qualified name. Parts keep the case in which they were written."""

    host: str = DEFAULT_HOST
    namespace: str = DEFAULT_NAMESPACE
    model: str
    tag: str = DEFAULT_TAG
    scheme: str = DEFAULT_SCHEME
    """How to reach the registry; never part of the name's identity."""

    def __post_init__(self) -> None:
        valid = (
            _HOST.match(self.host)
            and _NAMESPACE.match(self.namespace)
            and _MODEL.match(self.model)
            and _TAG.match(self.tag)
            and _SCHEME.match(self.scheme)
        )
        # A digest is no name: `sha256:...` in the place of a model is a mistake or an attack.
        if not valid or _DIGEST_LIKE.match(f"{self.model}:{self.tag}") or _DIGEST_LIKE.match(self.model):
            raise InvalidName("invalid model name")

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read a name as a client writes it.

        Raises:
            InvalidName: with Ollama's text, `invalid model name`.
        """
        if not text or len(text) > _LONGEST_NAME:
            raise InvalidName("invalid model name")
        rest, tag = text, DEFAULT_TAG
        if rest.rfind(":") > rest.rfind("/"):
            rest, tag = _promised(rest, ":")
        namespace, host, scheme = DEFAULT_NAMESPACE, DEFAULT_HOST, DEFAULT_SCHEME
        if "/" not in rest:
            return cls(model=rest, tag=tag)
        rest, model = _promised(rest, "/")
        if "/" not in rest:
            namespace = rest
        else:
            rest, namespace = _promised(rest, "/")
            before, separator, after = rest.partition("://")
            # Ollama fills an empty host or scheme with its default; a name that spells one out as
            # empty (`://x/y`) is a mistake that we refuse instead.
            scheme, host = (before, after) if separator else (DEFAULT_SCHEME, rest)
        return cls(host=host, namespace=namespace, model=model, tag=tag, scheme=scheme)

    @classmethod
    def from_parts(cls, parts: tuple[str, str, str, str]) -> ModelName:
        """From the four parts of a manifest's path."""
        host, namespace, model, tag = parts
        return cls(host=host, namespace=namespace, model=model, tag=tag)

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """Equal for names that differ by case only."""
        return str(self).lower()

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Directories and file of the manifest under `manifests/`."""
        return (self.host, self.namespace, self.model, self.tag)

    @property
    def display(self) -> str:
        """The short form that people see; always with its tag."""
        if self.host.lower() != DEFAULT_HOST:
            return str(self)
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"


class BlobId(msgspec.Struct, frozen=True, order=True):
    """sha256 of a blob's content; the only thing that a blob's path is made from."""

    hex: str
    """64 lower-case hex digits."""

    def __post_init__(self) -> None:
        if not _HEX.match(self.hex):
            raise InvalidName("invalid digest format")

    @classmethod
    def parse(cls, text: str) -> BlobId:
        """Read `sha256:` or `sha256-` and 64 lower-case hex digits.

        Raises:
            InvalidName: with Ollama's text, `invalid digest format`.
        """
        match = _DIGEST.match(text)
        if match is None:
            raise InvalidName("invalid digest format")
        return cls(match[1])

    @property
    def digest(self) -> str:
        """`sha256:...`, as in manifests."""
        return f"sha256:{self.hex}"

    @property
    def filename(self) -> str:
        """`sha256-...`, as under `blobs/`."""
        return f"sha256-{self.hex}"

    def __str__(self) -> str:
        return self.digest


@functools.lru_cache(maxsize=1024)
def name_key(text: str) -> str:
    """Under which a name is looked up, as a client writes it: equal for spellings of one model.

    Other engines may have names that break our rules: those are equal up to case.
    """
    try:
        return ModelName.parse(text).key
    except InvalidName:
        return text.lower()


def as_spelled(name: ModelName, known: Iterable[ModelName]) -> ModelName:
    """The name, in the spelling of the known ones as far as it matches one of them without case."""
    best: tuple[str, ...] = ()
    for one in known:
        depth = 0
        while depth < 4 and one.parts[depth].lower() == name.parts[depth].lower():
            depth += 1
        if depth > len(best):
            best = one.parts[:depth]
    host, namespace, model, tag = (*best, *name.parts[len(best) :])
    return ModelName.from_parts((host, namespace, model, tag))


def _promised(text: str, separator: str) -> tuple[str, str]:
    """Cut at the last separator. An empty side stays empty, and is then refused."""
    before, _, after = text.rpartition(separator)
    return before, after
