"""A word to the kernel: this thread works shortly and often, so let it run as soon as it wakes.

Where llama.cpp computes on every core, a token waits for its way out: the node wakes when it comes, and the
kernel lets who computes go on for the rest of a slice (1.4 ms on two cores). A thread that asks for a shorter
slice is due sooner; over time it gets no more than its share. Not the shortest, since within its slice nobody
takes its place. Whom the node starts computes long and gets the usual one (and lets the node go first:
`adapters/engines/llamacpp/threads.py`).

Sources: sched_setattr(2); Linux 6.12's `sched/eevdf: Allow sched_attr::sched_runtime`, before which the
kernel ignores it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_GET_SET = {"x86_64": (315, 314), "aarch64": (275, 274), "riscv64": (275, 274)}
"""Numbers of the calls sched_getattr and sched_setattr, which the C library does not wrap."""
_RESET_ON_FORK = 1
_FAIR = (os.SCHED_OTHER, os.SCHED_BATCH) if sys.platform == "linux" else ()

SHORT_NS = 500_000
"""What the node does between two looks at its sockets takes 0.1 to 0.5 ms; the kernel takes 0.1 to 100 ms."""


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def slice_ns() -> int | None:
    """The calling thread's. None: the kernel does not tell."""
    found = _attributes()
    return found.runtime if found is not None and found.runtime else None


def run_soon() -> bool:
    """Ask it for the calling thread; the rest of how it is scheduled stays. Whether the kernel took it."""
    wanted = _attributes()
    if wanted is None or wanted.policy not in _FAIR or wanted.nice < 0:
        return False  # a person chose, and what is reset for the node's children would be that too
    wanted.runtime, wanted.flags = SHORT_NS, wanted.flags | _RESET_ON_FORK
    _, set_call = _GET_SET[platform.machine()]
    return ctypes.CDLL(None).syscall(set_call, 0, ctypes.byref(wanted), 0) == 0 and slice_ns() == SHORT_NS


def _attributes() -> _Attributes | None:
    if sys.platform != "linux" or platform.machine() not in _GET_SET:
        return None
    found = _Attributes()
    get_call, _ = _GET_SET[platform.machine()]
    size = ctypes.sizeof(found)
    return found if ctypes.CDLL(None).syscall(get_call, 0, ctypes.byref(found), size, 0) == 0 else None
