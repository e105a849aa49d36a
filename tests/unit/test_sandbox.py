"""The cage of a runner, as far as it can be seen without a kernel (security table S-13, ADR 28)."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from ollama_distributed.adapters.engines.llamacpp.sandbox.calls import Filter, call_filter
from ollama_distributed.adapters.engines.llamacpp.sandbox.files import Access, handled
from ollama_distributed.adapters.engines.llamacpp.sandbox.kernel import Kernel
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import NO_SANDBOX, Sandbox
from ollama_distributed.base.errors import LoadFailed

ALLOWED = 0
OWN_PID = 4711
X86, ARM = 0xC000_003E, 0xC000_00B7
I386 = 0x4000_0003


def answer(program: Filter, machine: int, number: int, *arguments: int) -> int:
    """What the filter says of a call: 0, or an errno. Runs the program as the kernel would."""
    words = {0: number, 4: machine} | {16 + 8 * i: value & 0xFFFF_FFFF for i, value in enumerate(arguments)}
    at, held = 0, 0
    while True:
        code, true, false, operand = program[at]
        operand = OWN_PID if operand is None else operand
        at += 1
        match code:
            case 0x20:
                held = words.get(operand, 0)
            case 0x54:
                held &= operand
            case 0x15:
                at += true if held == operand else false
            case 0x35:
                at += true if held >= operand else false
            case 0x45:
                at += true if held & operand else false
            case 0x06:
                return operand & 0xFFFF if operand & 0x0005_0000 == 0x0005_0000 else ALLOWED
            case _:
                raise AssertionError(f"no such instruction: {code:#x}")


CALLS = {
    "read": (0, 63), "openat": (257, 56), "mmap": (9, 222), "futex": (202, 98), "accept4": (288, 242),
    "bind": (49, 200), "ioctl": (16, 29), "sendto": (44, 206),
}  # fmt: skip
NEVER = {
    "connect": (42, 203), "ptrace": (101, 117), "process_vm_readv": (310, 270), "unshare": (272, 97),
    "mount": (165, 40), "bpf": (321, 280), "init_module": (175, 105), "tkill": (200, 130),
    "pidfd_send_signal": (424, 424), "open_by_handle_at": (304, 265), "keyctl": (250, 219),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "fchown": (93, 55),
    "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5), "removexattrat": (466, 466),
    "truncate": (76, 45), "shmat": (30, 196), "msgrcv": (70, 188), "semop": (65, 193), "mq_open": (240, 180),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "on", "number"), [("x86_64", X86, 0), ("aarch64", ARM, 1)])
def test_s13_which_calls_a_runner_may_make(machine: str, on: int, number: int) -> None:
    program = call_filter(machine, programs=False)

    def says(numbers: tuple[int, int], *arguments: int) -> int:
        return answer(program, on, numbers[number], *arguments)

    for name, numbers in CALLS.items():
        assert says(numbers) == ALLOWED, name
    for name, numbers in NEVER.items():
        assert says(numbers) == errno.EPERM, name
    assert says((425, 425)) == errno.ENOSYS  # io_uring_setup: would make sockets past the filter
    assert says((435, 435)) == errno.ENOSYS  # clone3: the C library takes clone then

    made, pair, clone = (41, 198), (53, 199), (56, 220)
    stream, datagram, packets = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
    flags = 0o2000000 | 0o4000  # CLOEXEC and NONBLOCK, which come in the same word
    assert says(made, socket.AF_UNIX, stream | flags) == ALLOWED
    assert says(made, socket.AF_UNIX, packets) == ALLOWED
    assert says(made, socket.AF_UNIX, datagram) == errno.EPERM
    for family in (socket.AF_INET, socket.AF_INET6, 16, 17, 38, 40):  # netlink, packets, AF_ALG, vsock
        assert says(made, family, stream) == errno.EPERM
        assert says(pair, family, stream) == errno.EPERM
    assert says(pair, socket.AF_UNIX, stream | flags) == ALLOWED
    assert says(pair, socket.AF_UNIX, datagram) == errno.EPERM  # could be sent to anybody's socket
    assert says(pair, socket.AF_UNIX, socket.SOCK_RAW | flags) == errno.EPERM  # the same by another name
    assert says(clone, 0x3D0F00) == ALLOWED  # as pthread_create calls it
    assert says(clone, 0x1200011) == errno.EPERM  # as fork calls it
    for kill in ((62, 129), (234, 131)):
        assert says(kill, OWN_PID, 6) == ALLOWED
        assert says(kill, 1, 9) == errno.EPERM
        assert says(kill, -1, 9) == errno.EPERM
    assert says((302, 261), 0) == says((302, 261), OWN_PID) == ALLOWED
    assert says((302, 261), 1) == errno.EPERM
    control, device = (72, 25), (16, 29)
    for command in (1, 2, 3, 4, 1033):  # F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_ADD_SEALS
        assert says(control, 5, command) == ALLOWED
    for command in (8, 10, 15):  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a file that signals another process
        assert says(control, 5, command, 1) == errno.EPERM
    assert says(device, 5, 0xC0484601) == ALLOWED  # of a GPU
    for command in (0x8901, 0x8902):  # FIOSETOWN, SIOCSPGRP: the same
        assert says(device, 5, command) == errno.EPERM


def test_s13_only_a_llama_server_may_take_the_place_of_its_launcher() -> None:
    for number in (59, 322):
        assert answer(call_filter("x86_64", programs=False), X86, number) == errno.EPERM
        assert answer(call_filter("x86_64", programs=True), X86, number) == ALLOWED


def test_s13_no_other_numbers_lead_to_the_same_calls() -> None:
    """x86-64 has three tables of calls; a filter that knows one is no filter."""
    program = call_filter("x86_64", programs=True)
    assert answer(program, I386, 3) == errno.EPERM
    assert answer(program, X86, 0x4000_0000 | 42) == errno.EPERM


def test_s13_a_home_that_holds_a_llama_server_stays_closed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "secrets").mkdir(parents=True)
    for name in ("llama-server", "libggml.so", "libllama.so.1", "admin.json"):
        (home / name).touch()
    sandbox = Sandbox("auto", program=str(home / "llama-server"), known=Kernel(7, "x86_64"))
    cage = sandbox.cage(tmp_path / "run", [str(tmp_path / "model.gguf"), ""])
    assert cage is not None
    rules = {path: Access(access) for path, access in cage["landlock"]["rules"]}
    readable = {path for path, access in rules.items() if access & Access.READ_FILE}
    inside = {path for path in readable if Path(path).is_relative_to(home)}
    assert inside == {str(home / name) for name in ("llama-server", "libggml.so", "libllama.so.1")}
    assert not any(home.is_relative_to(path) for path in readable)
    assert rules[str(tmp_path / "model.gguf")] == Access.READ_FILE
    writable = {path for path, access in rules.items() if access & Access.MAKE_REG}
    assert writable == {str(tmp_path / "run")}
    assert {path for path, access in rules.items() if access & Access.EXECUTE} & {"/usr/bin", "/bin"} == set()


def test_s13_devices_are_for_programs_that_see_a_gpu(tmp_path: Path) -> None:
    def paths(*, gpu: bool) -> set[str]:
        cage = Sandbox("auto", gpu=gpu, kernels=tmp_path / "gpu", known=Kernel(7, "")).cage(tmp_path)
        assert cage is not None
        return {path for path, _ in cage["landlock"]["rules"]}

    assert paths(gpu=True) - paths(gpu=False) >= {"/proc/self/task", "/dev/shm", str(tmp_path / "gpu")}
    assert not {path for path in paths(gpu=False) if path.startswith(("/dev/nvidia", "/dev/dri", "/dev/shm"))}


def test_an_older_kernel_is_asked_for_what_it_knows_only() -> None:
    first, fourth, seventh = handled(1), handled(4), handled(7)
    assert first["files"] == (1 << 13) - 1
    assert (first["tcp"], first["scopes"]) == (0, 0)
    assert fourth["files"] == (1 << 15) - 1
    assert (fourth["tcp"], fourth["scopes"]) == (3, 0)
    assert seventh["files"] == (1 << 16) - 1
    assert (seventh["tcp"], seventh["scopes"]) == (3, 3)


def test_auto_takes_what_the_kernel_has_and_says_what_it_lacks(tmp_path: Path) -> None:
    nothing = Sandbox("auto", known=Kernel(0, ""))
    assert nothing.cage(tmp_path) is None
    assert (nothing.kept, nothing.lacks) == (NO_SANDBOX, "Landlock and seccomp")
    assert nothing.environment(tmp_path) == {}
    calls_only = Sandbox("auto", known=Kernel(0, "aarch64"))
    cage = calls_only.cage(tmp_path)
    assert cage is not None
    assert cage["landlock"] is None
    assert cage["calls"]
    assert (calls_only.kept, calls_only.lacks) == ("calls (seccomp)", "Landlock")
    whole = Sandbox("auto", known=Kernel(3, "x86_64"))
    assert (whole.kept, whole.lacks) == ("files (Landlock 3), calls (seccomp)", "")


def test_on_wants_all_of_it_and_off_nothing(tmp_path: Path) -> None:
    for lacking in (Kernel(0, ""), Kernel(7, ""), Kernel(0, "x86_64")):
        with pytest.raises(LoadFailed, match=r"engine_sandbox: on.*lacks"):
            Sandbox("on", known=lacking)
    cage = Sandbox("on", known=Kernel(7, "x86_64")).cage(tmp_path)
    assert cage is not None
    assert cage["landlock"]
    assert cage["calls"]
    off = Sandbox("off", known=Kernel(7, "x86_64"))
    assert off.cage(tmp_path) is None
    assert off.kept == NO_SANDBOX
