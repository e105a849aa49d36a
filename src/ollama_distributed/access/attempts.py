"""How long who was wrong must wait before the next try: growing, per name and per address. Pure.

A name alone never waits longer than `NAME_MOST_S`, and an address that once knew the password
of a name is judged apart from all others: whoever tries an administrator's name all day keeps
the administrator out of nothing.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from ollama_distributed.cluster.identity.tries import bucket_of

FREE = 5
"""Wrong tries that cost nothing: people mistype."""
NAME_MOST_S = 30.0
"""With it, one name is tried some 3,000 times a day from everywhere together."""
ADDRESS_MOST_S = 900.0
FORGOTTEN_S = 3600.0
"""Without a wrong try for so long, it begins anew."""
MOST_KEPT = 10_000
"""Names and addresses each; who was quiet longest is forgotten first."""


class _Wrong(msgspec.Struct):
    count: int = 0
    at: float = 0.0


class _Kept:
    def __init__(self, most_s: float, free: int) -> None:
        self._most_s, self._free = most_s, free
        self._wrong: OrderedDict[str, _Wrong] = OrderedDict()

    def wait_s(self, key: str, now: float) -> float:
        known = self._wrong.get(key)
        if known is None or known.count < self._free:
            return 0.0
        # The exponent is bounded: a count of thousands would make a number without end.
        delay_s = min(self._most_s, 2.0 ** min(known.count - self._free, 16))
        return max(0.0, known.at + delay_s - now)

    def wrong(self, key: str, now: float) -> None:
        known = self._wrong.pop(key, None)
        if known is None or now - known.at > FORGOTTEN_S:
            known = _Wrong()
        known.count, known.at = known.count + 1, now
        self._wrong[key] = known
        if len(self._wrong) > MOST_KEPT:
            self._wrong.popitem(last=False)

    def right(self, key: str) -> None:
        self._wrong.pop(key, None)

    def take_back(self, key: str) -> None:
        known = self._wrong.get(key)
        if known is not None:
            known.count -= 1


class Attempts:
    """Of one server; `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._names = _Kept(NAME_MOST_S, FREE)
        self._addresses = _Kept(ADDRESS_MOST_S, 4 * FREE)  # many people may sit behind one address
        self._pairs = _Kept(NAME_MOST_S, FREE)
        self._codes = _Kept(NAME_MOST_S, 4 * FREE)
        """By address, too: of a provider. Behind a proxy all have one, so none waits for long."""
        self._known: OrderedDict[str, None] = OrderedDict()
        """Pairs of name and address that signed in."""

    def wait_s(self, name: str, address: str, now: float) -> float:
        """Seconds until this try may be made; 0: now."""
        pair = _pair(name, address)
        if pair in self._known:
            return self._pairs.wait_s(pair, now)
        return max(self._names.wait_s(name, now), self._addresses.wait_s(bucket_of(address), now))

    def wrong(self, name: str, address: str, now: float) -> None:
        pair = _pair(name, address)
        if pair in self._known:
            self._pairs.wrong(pair, now)
            return
        self._names.wrong(name, now)
        self._addresses.wrong(bucket_of(address), now)

    def wait_for_code_s(self, address: str, now: float) -> float:
        """As `wait_s`, for a provider's code, which names nobody yet."""
        return self._codes.wait_s(bucket_of(address), now)

    def wrong_code(self, address: str, now: float) -> None:
        """To be taken back where it was right, or nobody's fault."""
        self._codes.wrong(bucket_of(address), now)

    def take_code_back(self, address: str) -> None:
        self._codes.take_back(bucket_of(address))

    def right(self, name: str, address: str) -> None:
        pair = _pair(name, address)
        self._pairs.right(pair)
        self._names.right(name)
        # The address' own count stays: one account there must not pay for tries at others.
        self._known[pair] = None
        self._known.move_to_end(pair)
        if len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)


def _pair(name: str, address: str) -> str:
    return f"{name}\n{bucket_of(address)}"
