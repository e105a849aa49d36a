"""multipart/form-data as it comes, without I/O: small fields as text, one file as a stream of pieces.

Source: RFC 7578, RFC 2046 5.1. Strict where a browser or a client library never differs: CRLF, the
boundary at the begin of a line, one `Content-Disposition: form-data` with a name for each part.
"""

from __future__ import annotations

import re

import msgspec

from ollama_distributed.base.errors import Invalid, Malformed, UnsupportedMedia

MOST_FIELDS = 32
MOST_FIELD_BYTES = 16 * 1024
MOST_HEAD_BYTES = 8 * 1024
"""Of one part."""
_BOUNDARY = re.compile(r'(?:^|;)\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_ESCAPED = re.compile(r"\\(.)")


class Field(msgspec.Struct, frozen=True):
    name: str
    value: str


class FileBegins(msgspec.Struct, frozen=True):
    name: str
    filename: str


class FileData(msgspec.Struct, frozen=True):
    data: bytes


class FileEnds(msgspec.Struct, frozen=True):
    """All of its bytes came."""


Event = Field | FileBegins | FileData | FileEnds


def boundary_of(content_type: str) -> bytes:
    """
    Raises:
        UnsupportedMedia: it is no multipart/form-data.
        Invalid: it names no boundary.
    """
    kind, _, parameters = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise UnsupportedMedia("this route takes multipart/form-data")
    match = _BOUNDARY.search(parameters)
    if match is None:
        raise Invalid("multipart/form-data needs a boundary")
    return (match[1] or match[2]).encode("ascii", "replace")


class Multipart:
    """Feed it bytes, take events. After the last boundary what comes is left out."""

    def __init__(self, boundary: bytes) -> None:
        self._line = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary is like the others
        self._where = "preamble"
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._fields = 0
        self._skip = 0
        """Bytes of the line's end before a part's content."""
        self.over = False

    def feed(self, data: bytes) -> list[Event]:
        """
        Raises:
            Malformed: it is no multipart/form-data.
            Invalid: more or larger fields than a form may have.
        """
        if self.over:
            return []
        self._buffer += data
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> None:
        """
        Raises:
            Malformed: it ended before its last boundary.
        """
        if not self.over:
            raise Malformed("the form ends in the middle")

    def _step(self, events: list[Event]) -> bool:
        """Whether more can be done with what is here."""
        match self._where:
            case "preamble" | "body":
                return self._body(events)
            case "boundary":
                return self._boundary()
            case _:
                return self._head(events)

    def _body(self, events: list[Event]) -> bool:
        at = self._buffer.find(self._line)
        # What may be the begin of a boundary stays.
        end = at if at >= 0 else max(0, len(self._buffer) - len(self._line) + 1)
        piece = bytes(self._buffer[:end])
        del self._buffer[: end if at < 0 else end + len(self._line)]
        if self._where == "body" and piece:
            self._take(piece, events)
        elif piece.strip(b"\r\n") and self._where == "preamble":
            raise Malformed("the form does not begin with its boundary")
        if at < 0:
            return False
        if self._where == "body":
            self._end(events)
        self._where = "boundary"
        return True

    def _boundary(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self.over = True
            self._buffer.clear()
            return False
        if not self._buffer.startswith(b"\r\n"):
            raise Malformed("a boundary of the form is not a line by itself")
        del self._buffer[:2]
        self._where = "head"
        return True

    def _head(self, events: list[Event]) -> bool:
        at = self._buffer.find(b"\r\n\r\n")
        if (at if at >= 0 else len(self._buffer)) > MOST_HEAD_BYTES:
            raise Malformed("a part of the form has too long a head")
        if at < 0:
            return False
        head = bytes(self._buffer[:at])
        # The line's end stays: an empty part has its boundary right there.
        del self._buffer[: at + 2]
        self._fields += 1
        if self._fields > MOST_FIELDS:
            raise Invalid(f"a form has at most {MOST_FIELDS} fields")
        self._begin(head, events)
        self._where = "body"
        self._skip = 2
        return True

    def _begin(self, head: bytes, events: list[Event]) -> None:
        try:
            lines = head.decode("utf-8").split("\r\n")
        except UnicodeDecodeError as failure:
            raise Malformed("a head of the form is not UTF-8") from failure
        said = [line for line in lines if line.lower().startswith("content-disposition:")]
        if len(said) != 1 or "form-data" not in said[0].lower():
            raise Malformed("each part of the form needs one Content-Disposition: form-data")
        found = {name.lower(): _ESCAPED.sub(r"\1", value) for name, value in _PARAMETER.findall(said[0])}
        if "name" not in found:
            raise Malformed("each part of the form needs a name")
        self._name = found["name"]
        self._is_file = "filename" in found
        self._value.clear()
        if self._is_file:
            events.append(FileBegins(self._name, found["filename"]))

    def _take(self, piece: bytes, events: list[Event]) -> None:
        skipped = min(self._skip, len(piece))
        self._skip -= skipped
        piece = piece[skipped:]
        if self._is_file:
            if piece:
                events.append(FileData(piece))
            return
        self._value += piece
        if len(self._value) > MOST_FIELD_BYTES:
            raise Invalid(f"the field {self._name[:80]} is too long", param=self._name[:80])

    def _end(self, events: list[Event]) -> None:
        if self._is_file:
            events.append(FileEnds())
            return
        try:
            value = self._value.decode("utf-8")
        except UnicodeDecodeError as failure:
            raise Malformed(f"the field {self._name[:80]} is not UTF-8") from failure
        events.append(Field(self._name, value))
