"""What a process tries inside a runner's cage: run with the runner's own JSON on stdin, prints how each
attempt ended (`done`, or the name of the errno)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.util
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PTRACE_ATTACH = 16
F_SETOWN_EX, FIOSETOWN = 15, 0x8901
"""linux/fcntl.h, asm-generic/sockios.h"""


def tried(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc))
    return "done"


def read(path: str) -> None:
    with Path(path).open("rb") as file:
        file.read(16)


def write(path: str) -> None:
    with Path(path).open("ab") as file:
        file.write(b"x")


def listen(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()


def connect(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as line:
        line.connect(address)


def asked(number: int, *arguments: int) -> None:
    """A system call by its number."""
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, (number, *arguments))) < 0:
        raise OSError(ctypes.get_errno(), "")


def opened_to_all(path: str) -> None:
    """A file that may be read, so a descriptor of it is to be had."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fchmod(file, 0o666)
    finally:
        os.close(file)


def post(address: str) -> None:
    """A datagram needs no connection, and one end of a pair may send it to anybody."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"x", address)


def thread() -> None:
    one = threading.Thread(target=lambda: None)
    one.start()
    one.join()


def main() -> None:
    told = json.load(sys.stdin)
    spec = importlib.util.spec_from_file_location("runner", told["runner"])
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    inherited = socket.socket(socket.AF_UNIX)
    runner.confine(told["cage"])
    secret, own, model = told["secret"], told["own"], told["model"]
    attempts: dict[str, Callable[[], Any]] = {
        "read the model": lambda: read(model),
        "write in its folder": lambda: write(f"{own}/scratch"),
        "listen in its folder": lambda: listen(f"{own}/own.sock"),
        "start a thread": thread,
        "look at itself": lambda: read("/proc/self/status"),
        "import": lambda: __import__("decimal"),
        "write the model": lambda: write(model),
        "read a secret": lambda: read(secret),
        "write a secret": lambda: write(secret),
        "remove a secret": lambda: Path(secret).unlink(),
        "list the secrets": lambda: list(Path(secret).parent.iterdir()),
        "make a file beside": lambda: write(secret + ".new"),
        "link a secret": lambda: os.link(secret, f"{own}/linked"),
        "cut a secret": lambda: os.truncate(secret, 0),
        "open a secret to all": lambda: Path(secret).chmod(0o666),
        "open the model to all": lambda: opened_to_all(model),
        "give a secret away": lambda: os.chown(secret, -1, -1),
        "date a secret": lambda: os.utime(secret, (0, 0)),
        "read passwords": lambda: read("/etc/passwd"),
        "read the parent's environment": lambda: read(f"/proc/{os.getppid()}/environ"),
        "connect by TCP": lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", told["port"])),
        "connect by UDP": lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", told["port"])),
        "connect by IPv6": lambda: connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", told["port"])),
        "connect to a UNIX socket": lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, told["door"]),
        "connect with an older socket": lambda: inherited.connect(told["door"]),
        "send to a UNIX socket": lambda: post(told["mailbox"]),
        "have the parent signalled": lambda: fcntl.fcntl(inherited, fcntl.F_SETOWN, os.getppid()),
        "have a thread of it signalled": lambda: fcntl.fcntl(
            inherited, F_SETOWN_EX, struct.pack("ii", 0, os.getppid())
        ),
        "have it signalled by ioctl": lambda: fcntl.ioctl(
            inherited, FIOSETOWN, struct.pack("i", os.getppid())
        ),
        "fork": lambda: os.fork() or os._exit(0),
        "start a program": lambda: os.execv("/bin/true", ["true"]),
        "signal the parent": lambda: os.kill(os.getppid(), 0),
        "io_uring": lambda: asked(425, 1, 0),
        "attach to the parent": lambda: asked(
            101 if os.uname().machine == "x86_64" else 117, PTRACE_ATTACH, os.getppid(), 0, 0
        ),
    }
    json.dump({name: tried(attempt) for name, attempt in attempts.items()}, sys.stdout)


if __name__ == "__main__":
    main()
