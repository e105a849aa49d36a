"""The child process of one loaded model. Run by path, isolated: `python -I runner.py`.

It imports nothing of ours, so that a tiny model answers 0.1 s after the start. What it
is to do comes as JSON on stdin (secrets never on argv or in the environment); the first
thing it does is to tie its life to its parent's and to give up, for good, all rights that
its task does not need (`sandbox/plan.py` says which). Tasks:

    {"task": "serve", "guard": {...}, "cage": ..., "params": {...}}  llama.cpp's server, from the wheel
    {"task": "exec", "guard": {...}, "cage": ..., "argv": [...]}     an external llama-server
    {"task": "info", "guard": {...}, "cage": ...}                    prints what the wheel can do

The node waits for `/health` on the socket and reads stderr for the reason of a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
"""linux/prctl.h"""
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 4
"""With the flag, since kernels before 5.16 else slow down all that a filtered process computes."""
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_RULE_PATH_BENEATH = 1
OF_FILES = 0b1100_0000_0000_0111
"""The rights that a rule on a file, not on a folder, may name."""
OOM_SCORE = b"500"
"""Of -1000 to 1000: a kernel that is out of memory ends a runner, not the node that could go on."""
CAPABILITY_VERSION_3 = 0x2008_0522
"""linux/capability.h"""


def guard(parent_pid: int, address_space_bytes: int | None, open_files: int) -> None:
    """Die with the parent, dump no core, keep files private."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
    os.umask(0o077)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container without it: nothing is lost but a preference
            place = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(place, OOM_SCORE)
            os.close(place)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = open_files if hard == resource.RLIM_INFINITY else min(open_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if address_space_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))


def confine(cage: dict[str, Any]) -> None:
    """Give up what the task does not need; nothing brings it back, in this program or the next."""
    libc = ctypes.CDLL(None, use_errno=True)

    def done(what: str, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    if cage["written_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (cage["written_bytes"],) * 2)
    try:
        done("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if cage["landlock"] is not None:
            keep_files(libc, done, **cage["landlock"])
        keep_capabilities(libc, done, cage["capabilities"])
        if cage["calls"] is not None:
            keep_calls(libc, done, **cage["calls"])
    except OSError as exc:
        raise SystemExit(f"error: the sandbox cannot be set up: {exc.strerror}") from exc


def keep_files(
    libc: Any,
    done: Callable[[str, int], int],
    rules: list[tuple[str, int]],
    files: int,
    tcp: int,
    scopes: int,
) -> None:
    """Landlock: of the rights `files`, `tcp` and `scopes` none but those of `rules`."""
    attributes = struct.pack("=QQQ", files, tcp, scopes)
    size = 24 if scopes else 16 if tcp else 8  # as much as the kernel knows of
    ruleset = done(
        "landlock_create_ruleset",
        libc.syscall(
            ctypes.c_long(LANDLOCK_CREATE_RULESET), attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)
        ),
    )
    for path, access in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        kept = access & files & (-1 if stat.S_ISDIR(os.fstat(place).st_mode) else OF_FILES)
        if kept:
            rule = struct.pack("=Qi", kept, place)
            number, kind = ctypes.c_long(LANDLOCK_ADD_RULE), ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH)
            done(f"landlock_add_rule {path}", libc.syscall(number, ruleset, kind, rule, ctypes.c_uint32(0)))
        if path.startswith("/proc/self"):
            os.set_inheritable(place, True)  # a folder of /proc that nobody holds open is made anew
        else:
            os.close(place)
    number = ctypes.c_long(LANDLOCK_RESTRICT_SELF)
    done("landlock_restrict_self", libc.syscall(number, ruleset, ctypes.c_uint32(0)))
    os.close(ruleset)


def keep_capabilities(libc: Any, done: Callable[[str, int], int], kept: int) -> None:
    """Of root's powers none but `kept`, a set of bits."""
    head, sets = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
    done("capget", libc.capget(head, sets))
    low, _, _, high, _, _ = struct.unpack("=6I", sets.raw)
    low, high = low & kept, high & kept >> 32
    done("capset", libc.capset(head, struct.pack("=6I", low, low, 0, high, high, 0)))


def keep_calls(
    libc: Any,
    done: Callable[[str, int], int],
    seccomp: int,
    instructions: list[tuple[int, int, int, int | None]],
) -> None:
    """A filter, set by the call of number `seccomp`; an operand of None is this process's own id."""
    own = os.getpid()
    packed = b"".join(
        struct.pack("=HBBI", code, true, false, own if operand is None else operand)
        for code, true, false, operand in instructions
    )
    held = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(held))
    flags = ctypes.c_uint(SECCOMP_FILTER_FLAG_SPEC_ALLOW)
    done(
        "seccomp",
        libc.syscall(ctypes.c_long(seccomp), ctypes.c_uint(SECCOMP_SET_MODE_FILTER), flags, program),
    )


def serve(params: dict[str, Any]) -> None:
    """Load the model and answer until killed. The keys are `launch.RunnerParams`'."""
    import xllamacpp as x

    def kind(name: str) -> Any:
        return x.ggml_type[f"GGML_TYPE_{name.upper()}"]

    p = x.CommonParams()
    p.model.path = params["model"]
    p.mmproj.path = params["projector"]
    p.mmproj_use_gpu = params["gpu_layers"] != 0
    loras = []
    for path in params["loras"]:
        lora = x.CommonAdapterLoraInfo()
        lora.path, lora.scale = path, 1.0
        loras.append(lora)
    p.lora_adapters = loras
    p.n_ctx = params["context_tokens"]
    p.n_parallel = params["slots"]
    p.kv_unified = False  # one slot's context must not kill the other streams (trap 6)
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = params["threads"]
    p.cpuparams.poll = p.cpuparams_batch.poll = params["poll"]
    p.n_threads_http = params["http_threads"]
    p.n_batch = params["batch"]
    p.n_ubatch = params["ubatch"]
    p.n_gpu_layers = params["gpu_layers"]
    p.main_gpu = params["main_gpu"]
    p.load_mode = (
        x.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        if params["use_mmap"]
        else x.llama_load_mode.LLAMA_LOAD_MODE_NONE
    )
    p.cache_type_k = p.cache_type_v = kind(params["kv_type"])
    flash = {None: "AUTO", True: "ENABLED", False: "DISABLED"}[params["flash_attention"]]
    p.flash_attn_type = x.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    p.ctx_shift = params["context_shift"]
    p.embedding = bool(params["pooling"])
    if params["pooling"]:
        p.pooling_type = x.llama_pooling_type[f"LLAMA_POOLING_TYPE_{params['pooling'].upper()}"]
    if params["chat_template"]:
        p.chat_template = params["chat_template"]
    p.cache_ram_mib = params["cache_ram_mib"]
    p.model_alias = {params["alias"]}
    p.hostnames = [params["socket"]]
    p.port = 0
    p.api_keys = [params["api_key"]]
    p.fit_params = False  # the plan is the node's: nothing may be shrunk behind its back
    p.warmup = False
    p.endpoint_metrics = True
    p.endpoint_slots = p.endpoint_props = p.ui = p.ui_mcp_proxy = False
    p.slot_save_path = p.media_path = ""
    p.cors_origins, p.cors_methods, p.cors_headers, p.cors_credentials = "", "", "", False
    p.cors_origins_explicit = True
    p.sleep_idle_seconds = -1
    p.offline = True
    p.verbosity = 2  # warnings and errors
    server = x.Server(p)  # returns when the model is loaded; raises when it cannot be
    while server.listening_address:
        signal.pause()


def info() -> None:
    import xllamacpp as x

    cpu = x.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    devices = [d["description"] or d["name"] for d in x.get_device_info() if d["type"] != cpu]
    json.dump({"version": x.__version__, "system": x.get_system_info(), "devices": devices}, sys.stdout)
    sys.stdout.flush()


def main() -> None:
    task = json.load(sys.stdin)
    guard(**task["guard"])
    if task.get("cage") is not None:
        confine(task["cage"])
    match task["task"]:
        case "serve":
            os.dup2(2, 1)  # one stream of messages
            serve(task["params"])
        case "exec":
            os.dup2(2, 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execv(task["argv"][0], task["argv"])  # noqa: S606  # typed argv, no shell
        case "info":
            info()
        case other:
            raise SystemExit(f"unknown task {other!r}")


if __name__ == "__main__":
    main()
