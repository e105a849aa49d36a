"""What this kernel lets an unprivileged process give up for good: Landlock, seccomp.

Sources: linux/landlock.h, landlock(7), seccomp(2). The call numbers of Landlock are the same on
every machine.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from functools import cache

import msgspec

LANDLOCK_CREATE_RULESET = 444
LANDLOCK_CREATE_RULESET_VERSION = 1
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2


class Kernel(msgspec.Struct, frozen=True):
    landlock: int
    """Version of its interface; 0: none. 4 knows TCP, 5 devices, 6 signals and abstract sockets."""
    seccomp: str
    """The machine whose calls can be filtered: `x86_64`, `aarch64`; empty: not here."""


@cache
def kernel() -> Kernel:
    """Asked once; microseconds."""
    if sys.platform != "linux":
        return Kernel(0, "")
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0),
        ctypes.c_uint32(LANDLOCK_CREATE_RULESET_VERSION),
    )  # fmt: skip
    ctypes.set_errno(0)
    # No filter is given: EFAULT says that one would be read, EINVAL that there is no such mode.
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    filters = ctypes.get_errno() == errno.EFAULT
    machine = platform.machine()
    known = machine if machine in ("x86_64", "aarch64") and sys.maxsize > 1 << 32 else ""
    return Kernel(max(int(version), 0), known if filters else "")
