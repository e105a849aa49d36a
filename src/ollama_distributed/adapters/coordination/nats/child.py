"""Becomes nats-server, which dies with the node. Run as `python -I child.py PARENT PROGRAM ARG…`.

Imports nothing of ours: it runs isolated, for some milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""linux/prctl.h; kept over exec."""


def main() -> None:
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        # SIGTERM lets it close its files; the store is safe against SIGKILL as well.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    os.umask(0o077)
    os.execv(program, [program, *arguments])  # noqa: S606  # our own program and arguments


if __name__ == "__main__":
    main()
