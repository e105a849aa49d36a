"""Refuses JSON bodies that a parser should not meet: too deep, too many nodes, doubled keys.

Runs once per body, before a dialect decodes it. The decoder of the dialects (msgspec)
takes the last of two equal keys and any depth that its stack holds; two readers that
disagree about one body is how requests are smuggled past a check, so both are 400 here.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ollama_distributed.base.errors import Malformed
from ollama_distributed.gateway.limits import Limits


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
        self._decode = json.JSONDecoder(
            object_pairs_hook=_unique, parse_int=integer, parse_constant=_no_constant
        ).decode

    def check(self, body: bytes, *, max_string: int) -> None:
        """Raises `Malformed`; returns nothing, for the dialect decodes into its own types."""
        limits = self._limits
        opened = body.count(b"{") + body.count(b"[")
        # Commas and brackets inside strings only make this count too high, never too low.
        if opened + body.count(b",") > limits.json_nodes and _too_many(body, limits.json_nodes):
            raise Malformed(f"invalid JSON: more than {limits.json_nodes} values")
        try:
            tree = self._decode(body.decode())
        except UnicodeDecodeError as exc:
            raise Malformed("invalid JSON: the body is not UTF-8") from exc
        except RecursionError as exc:
            raise Malformed(f"invalid JSON: nested deeper than {limits.json_depth}") from exc
        except json.JSONDecodeError as exc:
            raise Malformed(f"invalid JSON: {exc.msg} at character {exc.pos}") from exc
        if opened > limits.json_depth or len(body) > max_string:
            self._walk(tree, max_string)

    def _walk(self, tree: Any, max_string: int) -> None:
        depth = 0
        level = [tree]
        while level:
            depth += 1
            below: list[Any] = []
            for node in level:
                if type(node) is str:
                    if len(node) > max_string:
                        raise Malformed(f"invalid JSON: a string is longer than {max_string} characters")
                elif type(node) is dict:
                    below.extend(node.values())
                elif type(node) is list:
                    below.extend(node)
                else:
                    continue
                if depth > self._limits.json_depth and type(node) is not str:
                    raise Malformed(f"invalid JSON: nested deeper than {self._limits.json_depth}")
            level = below


def _too_many(body: bytes, most: int) -> bool:
    """Whether the body has more than `most` values, by the separators outside its strings."""
    # Left to right, a run of backslashes pairs up as a parser reads it: what remains of the
    # quotes after both replacements are the ends of strings.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most:  # two quotes for a key, two for its value
        return True
    skeleton = b"".join(plain.split(b'"')[::2])
    return skeleton.count(b"{") + skeleton.count(b"[") + skeleton.count(b",") >= most
