"""llama.cpp servers on loopback TCP, as somebody else's llama-server that a node may use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.limits import SOON_S

SERVE = """
import os, sys, xllamacpp as x
path, pooling = sys.argv[1:]
p = x.CommonParams(); p.model.path = path; p.n_ctx = 4096; p.n_parallel = 2
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.n_batch = p.n_ubatch = 512 if pooling else 256
p.cache_ram_mib = 16; p.hostnames = ["127.0.0.1"]; p.port = 0; p.ui = False; p.fit_params = False
p.endpoint_metrics = True; p.ctx_shift = not pooling; p.kv_unified = False; p.warmup = False
p.api_keys = ["secret"]
p.model_alias = {os.path.basename(path).removesuffix(".gguf")}
if pooling:
    p.n_ctx = 1024; p.embedding = True
    p.pooling_type = x.llama_pooling_type[f"LLAMA_POOLING_TYPE_{pooling.upper()}"]
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""
API_KEY = "secret"


class LlamaServers:
    """One server per model, started when it is asked for, and again when it was killed."""

    def __init__(self) -> None:
        self._children: dict[Path, tuple[subprocess.Popen[str], str]] = {}

    def url(self, model: Path, pooling: str = "") -> str:
        child, url = self._children.get(model, (None, ""))
        if child is None or child.poll() is not None:
            child = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(model), pooling],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            assert url, f"no llama.cpp server for {model}"
            self._children[model] = (child, url)
        return url

    def kill(self, model: Path) -> None:
        child, _ = self._children[model]
        child.kill()
        child.communicate()

    def close(self) -> None:
        for child, _ in self._children.values():
            child.communicate(timeout=SOON_S)
