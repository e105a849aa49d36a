"""Whether somebody else needs this machine: its owner's hands, its plug, other programs.

All of it is read without root. Blocking: files of /proc and /dev, and on Linux one short program.

- Hands: when a terminal was typed into last (`/dev/pts/*`, `/dev/tty*`: the time of the last read, as
  `w` shows it), and what the desktop tells logind (`IdleHint`, set by GNOME, KDE and others a few minutes
  after the last key). `/dev/input` would be exact, but only root reads it.
- Plug: `psutil.sensors_battery`.
- Other programs: the busy time of the processor less that of this node and its children.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from ollama_distributed.base.clock import Clock

TERMINALS = ("pts/[0-9]*", "tty[0-9]*")
LOGINCTL_S = 2.0
_GRAPHICAL = ("x11", "wayland", "mir")
_SHOWN = ("Active", "IdleHint", "IdleSinceHint", "LockedHint", "Type", "Class", "Remote")


def terminal_idle_s(now: float, dev: Path = Path("/dev")) -> float | None:
    """Since the last key in any terminal of the machine. `now`: seconds since the Unix epoch."""
    newest: float | None = None
    for path in (found for pattern in TERMINALS for found in dev.glob(pattern)):
        try:
            seen = path.stat()
        except OSError:
            continue  # closed meanwhile
        # A console that nobody opened has the time of the machine's start: long ago, too.
        if stat.S_ISCHR(seen.st_mode) and (newest is None or seen.st_atime > newest):
            newest = seen.st_atime
    return None if newest is None else max(0.0, now - newest)


def desktop_idle_s(run: Callable[..., str], now: float) -> float | None:
    """Since somebody used a desktop of the machine; 0: now. None: there is no desktop, or no logind."""
    idle: float | None = None
    for line in run("list-sessions", "--no-legend").splitlines():
        fields = line.split()
        if not fields:
            continue
        shown = run("show-session", fields[0], *(f"--property={name}" for name in _SHOWN))
        session = dict(pair.split("=", 1) for pair in shown.splitlines() if "=" in pair)
        if session.get("Type") not in _GRAPHICAL or session.get("Class") != "user":
            continue
        here = session.get("Active") == "yes" and session.get("LockedHint") != "yes"
        if here and session.get("IdleHint") == "no":
            return 0.0
        since = int(session.get("IdleSinceHint") or 0) / 1e6
        if since:
            idle = min(now - since, idle) if idle is not None else now - since
    return idle


def loginctl(*arguments: str) -> str:
    """What it prints; empty where it is not there or does not work."""
    program = shutil.which("loginctl")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=LOGINCTL_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def on_battery() -> bool | None:
    """None: there is no battery."""
    read = getattr(psutil, "sensors_battery", None)  # not on every system
    battery = read() if read is not None else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


class OthersCpu:
    """The share of the processor that other programs use, since the last reading."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = _cpu_times()
        self._at = clock.monotonic()

    def read(self) -> float:
        """0..1 of all cores. What a child that ended used at last counts as others'."""
        (busy_before, own_before), at_before = self._before, self._at
        self._before, self._at = _cpu_times(), self._clock.monotonic()
        busy, own = self._before
        passed = (self._at - at_before) * (psutil.cpu_count() or 1)
        ours = sum(used - own_before.get(pid, 0.0) for pid, used in own.items())
        return min(max((busy - busy_before - ours) / passed, 0.0), 1.0) if passed > 0 else 0.0


def _cpu_times() -> tuple[float, dict[int, float]]:
    """Busy seconds of all cores, and of each process of this node."""
    times = psutil.cpu_times()
    # A guest's time is counted in `user` too; waiting for a disk is no work.
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    busy = sum(times) - guest - times.idle - getattr(times, "iowait", 0.0)
    own: dict[int, float] = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):  # it ended meanwhile
            used = process.cpu_times()
            own[process.pid] = used.user + used.system
    return busy, own


class OwnerProbe:
    """Implements `node.polite.service.Probe`. Blocking; for one thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._cpu = OthersCpu(clock)

    def owner_idle_s(self) -> float | None:
        now = self._clock.time()
        found = [idle for idle in (terminal_idle_s(now), desktop_idle_s(loginctl, now)) if idle is not None]
        return min(found, default=None)

    def on_battery(self) -> bool | None:
        return on_battery()

    def others_cpu(self) -> float | None:
        return self._cpu.read()
