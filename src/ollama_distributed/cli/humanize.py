"""Sizes, times and shares as Ollama's command line shows them.

Pure. Source: ollama/ollama `format/bytes.go`, `format/time.go`, `cmd/cmd.go` (ps, list).
"""

from __future__ import annotations

from datetime import datetime, timedelta

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FOREVER = timedelta(days=20 * 365)
"""A model that never expires carries a time further away than this."""


def size(bytes_: int) -> str:
    for factor, unit in _UNITS:
        if bytes_ >= factor:
            value = bytes_ / factor
            return f"{int(value)} {unit}" if value >= 10 or value == int(value) else f"{value:.1f} {unit}"
    return f"{bytes_} B"


def memory(bytes_: int) -> str:
    """Of a machine, as its maker tells it: `16 GiB`."""
    return f"{bytes_ / 2**30:.3g} GiB"


def count(number: int) -> str:
    """Parameters of a model: `134.5M`."""
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """A length of time in words, coarser the longer it is."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole < 60:
        return "1 second" if whole == 1 else f"{whole} seconds"
    minutes = whole // 60
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    hours = round(seconds / 3600)
    if hours < 48:
        return "About an hour" if hours == 1 else f"{hours} hours"
    days = hours // 24
    if days < 14:
        return f"{days} days"
    if days < 60:
        return f"{days // 7} weeks"
    if days < 730:
        return f"{days // 30} months"
    return f"{days // 365} years"


def ago(then: datetime | None, now: datetime) -> str:
    """The epoch itself: nobody knows (a model of an engine that does not say)."""
    if then is None:
        return "Never"
    if not then.timestamp():
        return "-"
    if then - now > _FOREVER:
        return "Forever"
    passed = (now - then).total_seconds()
    return f"{duration(passed)} ago" if passed >= 0 else f"{duration(-passed)} from now"


def until(then: datetime | None, now: datetime) -> str:
    """When a loaded model will be unloaded."""
    if then is None:
        return "Forever"
    return "Stopping..." if then <= now else ago(then, now)


def processor(size_bytes: int, vram_bytes: int) -> str:
    """Where a loaded model lies."""
    if vram_bytes == 0:
        return "100% CPU"
    if vram_bytes == size_bytes:
        return "100% GPU"
    if size_bytes == 0 or vram_bytes > size_bytes:
        return "Unknown"
    cpu = round((size_bytes - vram_bytes) / size_bytes * 100)
    return f"{cpu}%/{100 - cpu}% CPU/GPU"


def precise(nanoseconds: int) -> str:
    """A duration as Go prints it, for `--verbose`: `1.5s`, `12.34ms`."""
    if nanoseconds >= 60 * 10**9:
        minutes, rest = divmod(nanoseconds, 60 * 10**9)
        return f"{minutes}m{rest / 10**9:g}s"
    for factor, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if nanoseconds >= factor:
            return f"{nanoseconds / factor:.9g}{unit}"
    return f"{nanoseconds}ns"


def age(seconds: float) -> str:
    """A length of time for a table: `5s`, `3m`, `2h`, `4d`. Less than none (clocks differ) is `0s`."""
    whole = max(0, int(seconds))
    for unit_s, unit, most in ((1, "s", 120), (60, "m", 120), (3600, "h", 48)):
        if whole < unit_s * most:
            return f"{whole // unit_s}{unit}"
    return f"{whole // 86400}d"


def length_s(text: str) -> float:
    """Seconds from `90`, `90s`, `10m`, `2h`, `1d`.

    Raises:
        ValueError: it is none of these.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNIT_S else (text, "s")
    try:
        value = float(number) * _UNIT_S[unit]
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a length of time; write 90s, 10m, 2h or 1d")
    return value
