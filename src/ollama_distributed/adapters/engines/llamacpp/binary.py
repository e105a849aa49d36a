"""argv for an external `llama-server`. Pure, but for nothing: its `--help` comes as text.

Versions differ, so each flag is checked against the binary's own help. A flag that keeps
something dangerous off or keeps a promise of the plan is required; the binary is refused
without it. Secrets and templates travel in files of the runner's private folder.
"""

from __future__ import annotations

import re

from ollama_distributed.adapters.engines.llamacpp.launch import RunnerParams
from ollama_distributed.base.errors import LoadFailed

_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
KEY_FILE = "key"
TEMPLATE_FILE = "template.jinja"


def flags_in(help_text: str) -> frozenset[str]:
    """Every flag that the help names."""
    return frozenset(_FLAG.findall(help_text))


def files_of(params: RunnerParams) -> dict[str, str]:
    """Files to write (mode 0600) beside the socket before the start."""
    files = {KEY_FILE: params.api_key + "\n"}
    if params.chat_template:
        files[TEMPLATE_FILE] = params.chat_template
    return files


def argv(binary: str, params: RunnerParams, folder: str, flags: frozenset[str]) -> list[str]:
    """The command line.

    Raises:
        LoadFailed: the binary lacks a flag that is needed.
    """
    out = [binary]

    def need(*words: str) -> None:
        if words[0] not in flags:
            raise LoadFailed(f"{binary} is not usable: it does not know {words[0]}")
        out.extend(words)

    def may(*words: str) -> bool:
        known = words[0] in flags
        if known:
            out.extend(words)
        return known

    need("--model", params.model)
    need("--alias", params.alias)
    need("--host", params.socket)
    need("--port", "0")
    need("--api-key-file", f"{folder}/{KEY_FILE}")
    need("--ctx-size", str(params.context_tokens))
    need("--parallel", str(params.slots))
    need("--threads", str(params.threads))
    need("--threads-batch", str(params.threads))
    need("--threads-http", str(params.http_threads))
    need("--batch-size", str(params.batch))
    need("--ubatch-size", str(params.ubatch))
    need("--cache-type-k", params.kv_type)
    need("--cache-type-v", params.kv_type)
    need("--cache-ram", str(params.cache_ram_mib))
    need("--metrics")
    need("--no-slots")
    need("--jinja")
    if not (may("--no-ui") or may("--no-webui")):
        raise LoadFailed(f"{binary} is not usable: its web UI cannot be turned off")
    if params.gpu_layers >= 0:
        need("--gpu-layers", str(params.gpu_layers))
    if params.main_gpu:
        need("--main-gpu", str(params.main_gpu))
    if not params.use_mmap and not may("--load-mode", "none"):
        need("--no-mmap")
    if params.flash_attention is not None:
        need("--flash-attn", "on" if params.flash_attention else "off")
    if params.context_shift:
        need("--context-shift")
    if params.projector:
        need("--mmproj", params.projector)
    for path in params.loras:
        need("--lora", path)
    if params.pooling == "rank":
        need("--reranking")
    elif params.pooling:
        need("--embeddings")
        need("--pooling", params.pooling)
    if params.chat_template:
        need("--chat-template-file", f"{folder}/{TEMPLATE_FILE}")
    may("--poll", str(params.poll))
    may("--no-warmup")
    may("--no-kv-unified")
    may("--fit", "off")
    may("--offline")
    may("--cors-origins", "null")
    may("--no-cors-credentials")
    may("--log-colors", "off")
    return out
