"""Tar as a stream: writes the heads of members, reads regular files strictly.

Knows nothing of disks: no name is ever a path here, no link is followed, nothing is
decompressed. Everything that is no plain file or folder is refused (security table, row B).
Source: POSIX.1-2001, "pax interchange format"; heads are coded by the library's `tarfile`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator

import msgspec

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.manifest import MAX_BLOB_BYTES

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
"""An archive's length is a multiple of this, as of those that tar programs write."""
MAX_MEMBERS = 65_536
"""Four times the layers of the largest manifest that is read."""
MAX_EXTRA_BYTES = 64 << 10
"""Of an extended head: names and sizes take a few hundred bytes."""
MAX_NAME_CHARACTERS = 255

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd files begin."""
_FILES = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
_RECORD = re.compile(rb"([1-9][0-9]{0,9}) ")
_NUMBER = re.compile(r"[0-9]{1,19}\Z")


class Member(msgspec.Struct, frozen=True):
    """A file of an archive; its bytes come after it."""

    name: str
    """Parts of plain characters between slashes; leads nowhere outside."""
    size: int


# ── writing ─────────────────────────────────────────────────────────────────────────


def head(name: str, size: int) -> bytes:
    """What comes before the bytes of a file. Equal for equal files: no owner, no time."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "ascii", "strict")


def padding_bytes(size: int) -> int:
    """After the bytes of a file."""
    return -size % BLOCK_BYTES


def ending_bytes(so_far: int) -> int:
    """After the last file: two empty blocks, and up to a whole record."""
    end = so_far + 2 * BLOCK_BYTES
    return end + -end % RECORD_BYTES - so_far


def length(members: Iterable[tuple[str, int]]) -> int:
    """Of an archive with these files, by name and size."""
    total = sum(len(head(name, size)) + size + padding_bytes(size) for name, size in members)
    return total + ending_bytes(total)


# ── reading ─────────────────────────────────────────────────────────────────────────


class TarReader:
    """Cuts the bytes of an archive into its files, however they were split on the way.

    `feed` yields a `Member` for each file, then its bytes in parts.

    Raises:
        InvalidModel: damaged, cut short, or holds what no bundle may; says what.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        """Bytes of what is under way."""
        self._skip = 0
        self._wanted = False
        """They are a file's, and not an extended head's."""
        self._extra = bytearray()
        self._overrides: dict[str, str] = {}
        """What an extended head says of the next file."""
        self._members = 0
        self._over = False

    def feed(self, data: bytes) -> Iterator[Member | memoryview]:
        view = memoryview(data)
        while len(view) and not self._over:
            if self._left:
                part, view = view[: self._left], view[self._left :]
                self._left -= len(part)
                if self._wanted:
                    yield part
                else:
                    self._extra += part
                    if not self._left:
                        self._read_extra()
            elif self._skip:
                skipped = min(self._skip, len(view))
                self._skip -= skipped
                view = view[skipped:]
            else:
                missing = BLOCK_BYTES - len(self._head)
                self._head += view[:missing]
                view = view[missing:]
                if len(self._head) == BLOCK_BYTES:
                    yield from self._begin()

    def end(self) -> None:
        """There are no more bytes."""
        if self._left or self._head or self._overrides:
            raise InvalidModel("the bundle is cut short: it ends inside a file")

    def _begin(self) -> Iterator[Member]:
        block = bytes(self._head)
        self._head.clear()
        if not any(block):
            self._over = True
            return
        if not self._members and block.startswith(_COMPRESSED):
            raise InvalidModel("the bundle is compressed; decompress it first")
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise InvalidModel(f"the bundle has over {MAX_MEMBERS} members")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as exc:
            raise InvalidModel("the bundle is no tar archive, or it is damaged") from exc
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            self._begin_extra(info.size, of_one=info.type == tarfile.XHDTYPE)
            return
        overrides, self._overrides = self._overrides, {}
        name = _plain(overrides.get("path", info.name))
        size = _size(overrides.get("size"), info.size)
        if info.type == tarfile.DIRTYPE:
            self._skip = size + padding_bytes(size)
            return
        if info.type not in _FILES:
            what = _KINDS.get(info.type, "a member of an unknown kind")
            raise InvalidModel(f"the bundle holds {what}, {name!r}; only plain files may be in it")
        self._left, self._wanted, self._skip = size, True, padding_bytes(size)
        yield Member(name, size)

    def _begin_extra(self, size: int, *, of_one: bool) -> None:
        if not 0 <= size <= MAX_EXTRA_BYTES:
            raise InvalidModel(f"the bundle has an extended head of {size} bytes")
        if of_one:
            self._extra.clear()
            self._left, self._wanted, self._skip = size, False, padding_bytes(size)
        else:  # of all files that follow: times, comments; nothing that matters here
            self._skip = size + padding_bytes(size)

    def _read_extra(self) -> None:
        """`LENGTH KEY=VALUE\\n`, one after the other."""
        data, at = bytes(self._extra), 0
        while at < len(data):
            match = _RECORD.match(data, at)
            end = at + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
                raise InvalidModel("the bundle has an extended head that cannot be read")
            key, equals, value = data[match.end() : end - 1].partition(b"=")
            if not equals or key.startswith(b"GNU.sparse"):
                raise InvalidModel("the bundle has an extended head of a kind that is not read")
            if key in (b"path", b"size"):
                self._overrides[key.decode()] = value.decode("utf-8", "surrogateescape")
            at = end


def _plain(name: str) -> str:
    """The name without a leading `./` and a final slash.

    Raises:
        InvalidModel: it leads outside, or has what no plain name has.
    """
    parts = name.removesuffix("/").split("/")
    while len(parts) > 1 and parts[0] == ".":
        parts = parts[1:]
    plain = "/".join(parts)
    if plain == ".":
        return plain
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in plain
        or not (plain.isascii() and plain.isprintable())
        or len(plain) > MAX_NAME_CHARACTERS
    ):
        raise InvalidModel(f"the bundle holds {name[:80]!a}, which is no plain name")
    return plain


def _size(said: str | None, size: int) -> int:
    if said is not None:
        if not (said.isascii() and _NUMBER.match(said)):
            raise InvalidModel("the bundle has a file of a size that cannot be read")
        size = int(said)
    if not 0 <= size <= MAX_BLOB_BYTES:
        raise InvalidModel(f"the bundle has a file of an impossible size, {size}")
    return size
