"""Real clients and frameworks, unmodified, against nodes: `python -m bench.clients_suite [CLIENT ...]`.

Each client is installed from its registry into an environment of its own, given the programs of
`bench/clients`, and prints what worked. The table says for each feature: passed, failed, not offered by
that version, or nothing where the client has no such thing. Needs npm for those in JavaScript.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tests.e2e.conftest import ANSWER, CONCLUSION, MODELS, THOUGHT, add_model
from tests.models import SMOLLM2, Models
from tests.nodes import NodeProcess, running_node

PROGRAMS = Path(__file__).parent / "clients"
UV = Path(sys.executable).parent / "uv"
CONTEXT_TOKENS = 262_144
"""Agents send prompts of a hundred thousand characters."""
LOAD_S = 8.0
TOKENS_PER_S = 60.0
MOST_S = 900.0
CONFIG = """\
engines:
  - name: echo
    kind: echo
    options: {models: [echo, gpt-5.5]}
"""
SLOW_CONFIG = CONFIG.replace("]}", f"], load_s: {LOAD_S}, tokens_per_s: {TOKENS_PER_S}}}")


class Client(msgspec.Struct, frozen=True):
    """One environment: what is installed there, and the program that is run in it."""

    name: str
    packages: tuple[str, ...]
    program: str
    python: bool = True
    arguments: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    """Dependencies that are left out: models of its own, and gigabytes of CUDA with them."""


CLIENTS = (
    Client("ollama", ("ollama",), "ollama_python.py"),
    Client("ollama of 2024", ("ollama==0.3.3",), "ollama_python.py"),
    Client("openai", ("openai",), "openai_python.py"),
    Client("openai of 2024", ("openai==1.55.3", "pydantic"), "openai_python.py"),
    Client("anthropic", ("anthropic", "pydantic"), "anthropic_python.py"),
    Client("anthropic of 2024", ("anthropic==0.40.0", "httpx<0.28", "pydantic"), "anthropic_python.py"),
    Client("litellm", ("litellm", "mcp"), "litellm_python.py"),
    Client(
        "langchain",
        ("langchain-ollama", "langchain-openai", "langchain-anthropic"),
        "langchain_python.py",
    ),
    Client(
        "llama-index",
        ("llama-index-llms-ollama", "llama-index-embeddings-ollama", "llama-index-llms-openai-like"),
        "llama_index_python.py",
    ),
    Client("instructor", ("instructor",), "instructor_python.py"),
    Client("pydantic-ai", ("pydantic-ai-slim[openai,anthropic]",), "pydantic_ai_python.py"),
    Client("openai-agents", ("openai-agents",), "openai_agents_python.py"),
    Client("llm", ("llm", "llm-ollama"), "llm_python.py"),
    Client("haystack", ("ollama-haystack",), "haystack_python.py"),
    Client("dspy", ("dspy", "numpy"), "dspy_python.py"),
    Client("aider", ("aider-chat",), "coding_agents.py", arguments=("aider",)),
    Client(
        "open-webui",
        ("open-webui",),
        "open_webui_python.py",
        without=(
            "accelerate", "faster-whisper", "opencv-python-headless", "rapidocr", "sentence-transformers",
            "transformers",
        ),
    ),
    Client("ollama (js)", ("ollama",), "ollama_node.mjs", python=False),
    Client("openai (js)", ("openai",), "openai_node.mjs", python=False),
    Client("anthropic (js)", ("@anthropic-ai/sdk",), "anthropic_node.mjs", python=False),
    Client(
        "ai-sdk",
        (
            "ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic",
            "ollama-ai-provider-v2", "zod",
        ),
        "ai_sdk_node.mjs",
        python=False,
    ),
    Client(
        "langchain (js)",
        ("@langchain/core", "@langchain/ollama", "@langchain/openai", "@langchain/anthropic", "zod"),
        "langchain_node.mjs",
        python=False,
    ),
    Client(
        "claude-code",
        ("@anthropic-ai/claude-code",),
        "coding_agents.py",
        python=False,
        arguments=("claude",),
    ),
    Client("codex", ("@openai/codex",), "coding_agents.py", python=False, arguments=("codex",)),
    Client("opencode", ("opencode-ai",), "coding_agents.py", python=False, arguments=("opencode",)),
    Client(
        "qwen-code", ("@qwen-code/qwen-code",), "coding_agents.py", python=False, arguments=("qwen",)
    ),
)  # fmt: skip


def install(client: Client, folder: Path, *, again: bool) -> None:
    """Into `folder`, once."""
    stamp = folder / "installed.json"
    wanted = json.dumps(client.packages)
    if not again and stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client.python:
        _quietly(str(UV), "venv", "--quiet", "--python", sys.executable, str(folder / "venv"))
        python = str(folder / "venv/bin/python")
        left_out = folder / "without.txt"
        left_out.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in client.without))
        options = ("--quiet", "--python", python, "--override", str(left_out))
        _quietly(str(UV), "pip", "install", *options, *client.packages)
    else:
        npm = shutil.which("npm") or sys.exit("npm is needed for the clients in JavaScript")
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        # Without the tag npm takes the last one that was made for this Node.js.
        newest = [f"{name}@latest" for name in client.packages]
        _quietly(npm, "install", "--no-audit", "--no-fund", "--loglevel=error", *newest, cwd=folder)
    stamp.write_text(wanted)


def _quietly(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}{done.stdout[-1000:]}")


def attempt(client: Client, folder: Path, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the program told, a row a feature."""
    if client.program.endswith(".mjs"):
        # Beside its node_modules: that is where node looks.
        for name in (client.program, "trying.mjs"):
            shutil.copyfile(PROGRAMS / name, folder / name)
        command = ["node", client.program]
    else:
        python = str(folder / "venv/bin/python") if client.python else sys.executable
        command = [python, str(PROGRAMS / client.program), *client.arguments]
    with (folder / "log").open("w") as log, tempfile.TemporaryDirectory() as home:
        clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": home, "CLIENT_FOLDER": str(folder)}
        try:
            done = subprocess.run(
                command, cwd=folder, env={**clean, **env}, stdout=subprocess.PIPE, stderr=log, text=True,
                timeout=MOST_S, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            told, whole = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as exc:
            told, whole = (exc.stdout or b"").decode(), False
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    if not whole:
        rows.append({"feature": "end", "outcome": "failed", "why": (folder / "log").read_text()[-800:]})
    return rows


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[dict[str, str]]:
    """One that knows this machine, one that asks everybody for a key, and a slow one."""
    config, slow_config = folder / "node.yaml", folder / "slow.yaml"
    config.write_text(CONFIG)
    slow_config.write_text(SLOW_CONFIG)
    env = {
        "OLLAMA_DISTRIBUTED_CONTEXT_LENGTH": str(CONTEXT_TOKENS),
        "OLLAMA_DISTRIBUTED_MDNS": "false",
        "OLLAMA_DISTRIBUTED_NUM_PARALLEL": "2",
    }
    options = ("--config", str(config))
    with (
        running_node(folder / "open", *options, env=env) as one,
        running_node(folder / "keyed", *options, "--require-key", env=env) as keyed,
        running_node(folder / "slow", "--config", str(slow_config), env=env) as slow,
    ):
        models = Models(folder)
        for node in (one, keyed):
            key = json.loads((node.data_dir / "admin.json").read_text())["key"]
            for name, gguf in (
                *MODELS.items(),
                ("smollm2:135m", SMOLLM2.read_bytes()),
                ("minilm", models.minilm().read_bytes()),
                ("endless", models.endless().read_bytes()),
            ):
                add_model(node.url, name, gguf, key=key)
        yield {
            "CLIENT_URL": one.url,
            "CLIENT_KEYED_URL": keyed.url,
            "CLIENT_SLOW_URL": slow.url,
            "CLIENT_KEY": user_key(keyed),
            "CLIENT_ANSWER": ANSWER,
            "CLIENT_THOUGHT": THOUGHT,
            "CLIENT_CONCLUSION": CONCLUSION,
        }


def user_key(node: NodeProcess) -> str:
    with node.admin() as client:
        return client.keys.create(name="clients", role="user").key


SIGNS = {"passed": "passed", "failed": "FAILED", "not offered": "not offered"}


def table(told: Mapping[str, list[dict[str, Any]]]) -> str:
    """A row a client, a column a feature; what failed is below."""
    features = list(
        dict.fromkeys(row["feature"] for rows in told.values() for row in rows if "feature" in row)
    )
    lines = [f"| client | {' | '.join(features)} |", f"| --- |{' --- |' * len(features)}"]
    wrong: list[str] = []
    for name, rows in told.items():
        versions = next((row["versions"] for row in rows if "versions" in row), {})
        outcomes = {row["feature"]: row for row in rows if "feature" in row}
        cells = [SIGNS[outcomes[one]["outcome"]] if one in outcomes else "" for one in features]
        with_versions = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"| {with_versions or name} | {' | '.join(cells)} |")
        wrong += [
            f"{name}, {one}: {row.get('why', '')}"
            for one, row in outcomes.items()
            if row["outcome"] == "failed"
        ]
    return "\n".join([*lines, "", *wrong])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clients", nargs="*", help="only these; all by default")
    parser.add_argument("--features", default="", help="only these, by spaces")
    parser.add_argument("--folder", type=Path, default=Path(".venv/clients"), help="for what is installed")
    parser.add_argument("--again", action="store_true", help="install the newest versions anew")
    parser.add_argument("--list", action="store_true", help="name the clients")
    chosen = parser.parse_args()
    clients = [one for one in CLIENTS if not chosen.clients or one.name in chosen.clients]
    if chosen.list:
        print("\n".join(one.name for one in clients))
        return 0
    told: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, nodes(Path(folder)) as env:
        for client in clients:
            place = (chosen.folder / re.sub(r"\W+", "-", client.name).strip("-")).resolve()
            try:
                install(client, place, again=chosen.again)
                told[client.name] = attempt(client, place, env | {"CLIENT_FEATURES": chosen.features})
            except RuntimeError as exc:
                told[client.name] = [{"feature": "install", "outcome": "failed", "why": str(exc)}]
            for row in told[client.name]:
                print(client.name, json.dumps(row), flush=True)
    print(table(told))
    return any(row.get("outcome") == "failed" for rows in told.values() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
