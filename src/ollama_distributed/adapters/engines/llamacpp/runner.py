"""The child process of one loaded model. Run by path, isolated: `python -I runner.py`.

It imports nothing of ours, so that a tiny model answers 0.1 s after the start. What it
is to do comes as JSON on stdin (secrets never on argv or in the environment); the first
thing it does is to lower its own rights and to tie its life to its parent's. Tasks:

    {"task": "serve", "guard": {...}, "params": {...}}      llama.cpp's server, from the wheel
    {"task": "exec", "guard": {...}, "argv": [...]}         an external llama-server
    {"task": "info", "guard": {...}}                        prints what the wheel can do

The node waits for `/health` on the socket and reads stderr for the reason of a failure.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def guard(parent_pid: int, address_space_bytes: int | None, open_files: int) -> None:
    """Die with the parent, dump no core, keep files private."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = open_files if hard == resource.RLIM_INFINITY else min(open_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if address_space_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))


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
