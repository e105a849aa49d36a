"""Amounts of disk as people write and read them: `500GB`, `1.5TiB`, `80%` of the whole."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?)\s*(%|[A-Za-z]*)")
_SHOWN = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))


def amount_bytes(text: str, whole: int) -> int:
    """Bytes of an amount; a share is one of `whole`.

    Raises:
        ValueError: it is none.
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = found[2].upper() if found else "?"
    if found is None or (unit != "%" and unit not in _FACTORS):
        raise ValueError(f"{text!r} is no amount of disk; write e.g. 500GB, 1.5TiB or 80%")
    number = float(found[1])
    if unit == "%":
        if number > 100:
            raise ValueError(f"{text!r}: at most 100%")
        return int(whole * number / 100)
    return int(number * _FACTORS[unit])


def size_text(bytes_: int) -> str:
    """`98.2 MB`; as the lists show sizes."""
    for factor, unit in _SHOWN:
        if abs(bytes_) >= factor:
            return f"{bytes_ / factor:.3g} {unit}"
    return f"{bytes_} B"
