"""Which system calls a runner may not make, as a seccomp filter (classic BPF). Pure but
for the numbers of this system.

It serves on a socket that it binds itself, reads one model and computes. So: no other kind of
socket and no connection to anyone, no new process, no look into or signal to another, nothing that
changes the machine, or whose a file is and who may read it: Landlock does not look at that, and root's
runner could open the machine to everybody. All that is left is allowed: what drivers of GPUs call is
their own affair.
Source: linux/seccomp.h, linux/filter.h, the call tables of both machines.
"""

from __future__ import annotations

import errno
import socket

Instruction = tuple[int, int, int, int | None]
"""`struct sock_filter`: code, jump if true, jump if false, operand; None: the process's own id."""
Filter = list[Instruction]

_LOAD, _AND, _EQUAL, _AT_LEAST, _SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_NUMBER, _MACHINE, _ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; of an argument the lower half, both machines being little-endian."""
_MACHINES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
"""linux/audit.h"""
_X32 = 0x4000_0000
"""Calls of x86-64's other ABI have this bit: a second set of numbers for the same calls."""
_CLONE_THREAD = 0x10000
_KIND_OF_SOCKET = 0xF

_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # other machines and other programs
    "connect": (42, 203),
    # other processes
    "fork": (57, None), "vfork": (58, None),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # memory and messages that are shared by a number or name of their own
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # whose a file is, who may, since when, and what is said of it; also of one that may only be read
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    "truncate": (76, 45),  # of a path, which Landlock knows from its third version on
    # names, mounts, other views of the machine
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    # the kernel and the machine
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "adjtimex": (159, 171), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
"""Name: number on x86-64, on ARM64."""
_MISSING = {
    # Its rings make sockets and open files past this filter.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Its flags lie in memory, where a filter cannot look; the C library then takes `clone`.
    "clone3": (435, 435),
}  # fmt: skip
"""Answered as by an old kernel, which programs know how to do without."""
SECCOMP = {"x86_64": 317, "aarch64": 277}
"""The call that sets a filter, by machine."""
_PROGRAMS = {"execve": (59, 221), "execveat": (322, 281)}
_SOCKET, _SOCKETPAIR, _CLONE = (41, 198), (53, 199), (56, 220)
_KILL, _TGKILL, _PRLIMIT = (62, 129), (234, 131), (302, 261)
_FCNTL, _IOCTL = (72, 25), (16, 29)
_SIGNALS_BY_FILE = {_FCNTL: (8, 10, 15), _IOCTL: (0x8901, 0x8902)}
"""F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: who is sent which signal, SIGKILL for one, when a
file can be read. linux/fcntl.h, asm-generic/sockios.h."""


def call_filter(machine: str, *, programs: bool) -> Filter:
    """For `x86_64` or `aarch64`. `programs`: another program may take this one's place (`execve`), which
    is how a llama-server starts."""
    on = 1 if machine == "aarch64" else 0
    refuse = _answer(errno.EPERM)
    out: Filter = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, _MACHINES[machine]),
        refuse,
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        out += [(_AT_LEAST, 0, 1, _X32), refuse]
    for numbers in (*_FORBIDDEN.values(), *(() if programs else _PROGRAMS.values())):
        if (number := numbers[on]) is not None:
            out += [(_EQUAL, 0, 1, number), refuse]
    for numbers in _MISSING.values():
        out += [(_EQUAL, 0, 1, numbers[on]), _answer(errno.ENOSYS)]

    stream_or_packets: Filter = [
        (_LOAD, 0, 0, _ARGUMENT + 8),
        (_AND, 0, 0, _KIND_OF_SOCKET),
        (_EQUAL, 1, 0, int(socket.SOCK_STREAM)),
        (_EQUAL, 0, 1, int(socket.SOCK_SEQPACKET)),  # CUDA's own, which nobody connects to
        _answer(None),
        refuse,
    ]
    unix: Filter = [
        (_LOAD, 0, 0, _ARGUMENT),
        (_EQUAL, 1, 0, int(socket.AF_UNIX)),
        refuse,
        *stream_or_packets,
    ]
    own: Filter = [(_LOAD, 0, 0, _ARGUMENT), (_EQUAL, 0, 1, None), _answer(None), refuse]
    for numbers, then in (
        (_SOCKET, unix),
        (_SOCKETPAIR, unix),  # one of two that take datagrams could send them to anybody
        (_CLONE, [(_LOAD, 0, 0, _ARGUMENT), (_SET, 0, 1, _CLONE_THREAD), _answer(None), refuse]),
        (_KILL, own),
        (_TGKILL, own),
        (_PRLIMIT, [(_LOAD, 0, 0, _ARGUMENT), (_EQUAL, 0, 1, 0), _answer(None), *own[1:]]),
        *((call, _unless(commands)) for call, commands in _SIGNALS_BY_FILE.items()),
    ):
        out += [(_EQUAL, 0, len(then), numbers[on]), *then]
    return [*out, _answer(None)]


def _unless(commands: tuple[int, ...]) -> Filter:
    """All commands, a call's second argument, but these."""
    refuse = _answer(errno.EPERM)
    refused = [step for command in commands for step in ((_EQUAL, 0, 1, command), refuse)]
    return [(_LOAD, 0, 0, _ARGUMENT + 8), *refused, _answer(None)]


def _answer(error: int | None) -> Instruction:
    return (_RETURN, 0, 0, _ALLOW if error is None else _ERRNO | error)
