"""Refuses JSON bodies that a parser should not meet: too deep, too many nodes, doubled keys.

Runs once per body, before a dialect decodes it. The decoder of the dialects (msgspec)
takes the last of two equal keys and any depth that its stack holds; two readers that
disagree about one body is how requests are smuggled past a check, so both are 400 here.

It may run in a thread: long strings (images) are cut out before the decoder sees them, for
a C decoder holds every other thread, the event loop's too, until it has read them.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ollama_distributed.base.errors import Malformed
from ollama_distributed.gateway.limits import Limits

_LONG = 64 * 1024
"""Bytes of a string that is worth cutting; shorter ones decode in well under a millisecond."""
_KEPT = 16
"""Bytes of a cut string that stay at each end."""
_TEXT_ENDS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_")
_PIECE = 256 * 1024
"""Bytes looked at in one go."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("invalid JSON: a key appears twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"invalid JSON: {name} is not a JSON number")


class JsonGuard:
    """The check, with its limits bound once: it is on the hot path."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        digits = limits.integer_digits

        def integer(text: str) -> int:
            if len(text) > digits and len(text.lstrip("-")) > digits:
                raise Malformed(f"invalid JSON: an integer has more than {digits} digits")
            return int(text)

        # The decoder calls `parse_int` for each integer; floats stay as the C code has them.
        decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=integer, parse_constant=_no_constant)
        self._decode, self._scan = decoder.decode, decoder.raw_decode

    def check(self, body: bytes, *, max_string: int) -> None:
        """Raises `Malformed`; returns nothing, for the dialect decodes into its own types."""
        limits = self._limits
        size = len(body)
        if size > _LONG:
            body = _cut_long_strings(body, max_string)
        opened = body.count(b"{") + body.count(b"[")
        # Commas and brackets inside strings only make this count too high, never too low.
        if opened + body.count(b",") > limits.json_nodes and _too_many(body, limits.json_nodes):
            raise Malformed(f"invalid JSON: more than {limits.json_nodes} values")
        try:
            tree = self._read(body.decode())
        except UnicodeDecodeError as exc:
            raise Malformed("invalid JSON: the body is not UTF-8") from exc
        except RecursionError as exc:
            raise Malformed(f"invalid JSON: nested deeper than {limits.json_depth}") from exc
        except json.JSONDecodeError as exc:
            where = f" at character {exc.pos}" if len(body) == size else ""  # cut: it is elsewhere
            raise Malformed(f"invalid JSON: {exc.msg}{where}") from exc
        if opened > limits.json_depth or len(body) > max_string:
            self._walk(tree, max_string)

    def _read(self, text: str) -> Any:
        """As the decoder does, less its search for white space around the value."""
        try:
            tree, end = self._scan(text)
        except json.JSONDecodeError:  # it may begin with white space
            return self._decode(text)
        return tree if end == len(text) else self._decode(text)

    def _walk(self, tree: Any, max_string: int) -> None:
        depth = 0
        level = [tree]
        while level:
            depth += 1
            below: list[Any] = []
            for node in level:
                if type(node) is str:
                    if len(node) > max_string:
                        raise _too_long(max_string)
                elif type(node) is dict:
                    below.extend(node.values())
                elif type(node) is list:
                    below.extend(node)
                else:
                    continue
                if depth > self._limits.json_depth and type(node) is not str:
                    raise Malformed(f"invalid JSON: nested deeper than {self._limits.json_depth}")
            level = below


def _too_long(max_string: int) -> Malformed:
    return Malformed(f"invalid JSON: a string is longer than {max_string} characters")


def _cut_long_strings(body: bytes, max_string: int) -> bytes:
    """The same JSON, or the same breach, with the middle of each long plain string left out.

    What lies between two quotes without a backslash is a whole string, or what stands between
    two strings. The latter never ends in a letter or digit if the JSON is valid, so only a
    string is cut, or a body that is refused before and after. Keys are left as they are.
    """
    kept: list[bytes] = []
    done = 0
    probe = _LONG  # a string of twice that length holds a probe, wherever it begins
    while probe < len(body):
        start = body.rfind(b'"', done, probe)
        end = body.find(b'"', probe)
        if end < 0:
            break
        if start >= 0 and end - start > _LONG and _is_plain_value(body, start, end):
            if end - start - 1 > max_string:
                raise _too_long(max_string)
            kept += (body[done : start + _KEPT], body[end - _KEPT : end])
            done = end
        probe = max(probe, end) + _LONG
    kept.append(body[done:])
    return b"".join(kept)


def _is_plain_value(body: bytes, start: int, end: int) -> bool:
    """Whether the quotes at `start` and `end` may hold a string value of plain ASCII."""
    return (
        body[start - 1 : start] != b"\\"
        and body[end - 1] in _TEXT_ENDS
        and body[end + 1 : end + 2] in (b",", b"]", b"}")
        and body.find(b"\\", start, end) < 0
        and all(body[at : min(at + _PIECE, end)].isascii() for at in range(start, end, _PIECE))
    )


def _too_many(body: bytes, most: int) -> bool:
    """Whether the body has more than `most` values, by the separators outside its strings."""
    # Left to right, a run of backslashes pairs up as a parser reads it: what remains of the
    # quotes after both replacements are the ends of strings.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most:  # two quotes for a key, two for its value
        return True
    skeleton = b"".join(plain.split(b'"')[::2])
    return skeleton.count(b"{") + skeleton.count(b"[") + skeleton.count(b",") >= most
