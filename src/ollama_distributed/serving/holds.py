"""Models that placement keeps in this node's memory, whatever keep-alive says.

State only. A model may be held under several names that share one runner; it is let go when
the last of them is.
"""

from __future__ import annotations

from ollama_distributed.serving.residents import LoadKey


class Holds:
    def __init__(self) -> None:
        self._names: dict[LoadKey, set[str]] = {}
        """None of them is empty."""

    def __contains__(self, key: LoadKey) -> bool:
        return key in self._names

    def names(self, key: LoadKey) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted(self._names.get(key, ())))

    def put(self, key: LoadKey, name: str) -> None:
        """Hold it under this name, and under no other key."""
        self.drop(name)
        self._names.setdefault(key, set()).add(name)

    def drop(self, name: str) -> None:
        """Hold nothing under this name any more."""
        for key, names in list(self._names.items()):
            names.discard(name)
            if not names:
                del self._names[key]

    def clear(self, key: LoadKey) -> None:
        self._names.pop(key, None)
