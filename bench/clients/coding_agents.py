"""Coding agents for the command line, each pointed at the node as its own documentation says.

They talk to the echo model: told `call NAME {arguments}`, it calls that tool of the agent's own, and a file
that the tool wrote is the proof. Run with the agent's name; the standard library is enough.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trying import ABSENT, ECHO, KEY, KEYED_URL, URL, WRONG_KEY, feature, run, same

FOLDER = Path(os.environ["CLIENT_FOLDER"])
HOME = Path(os.environ["HOME"])
MOST_S = 180
WORDS = "the quick brown fox"
KNOWN = "gpt-5.5"
"""The echo model under a name that Codex knows: it offers its custom tools to such only."""


def ran(
    *command: str,
    env: dict[str, str] | None = None,
    where: Path | None = None,
    said: str = "",
    check: bool = True,
) -> str:
    """What the agent printed. `said`: to its standard input."""
    done = subprocess.run(
        command,
        cwd=where or HOME,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=MOST_S,
        check=False,
        input=said,
    )
    if check and done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-1500:]} {done.stdout[-1500:]}")
    return done.stdout + ("" if check else done.stderr)


def workplace() -> Path:
    return Path(tempfile.mkdtemp(dir=HOME))


def program(name: str) -> str:
    for place in (FOLDER / "node_modules/.bin" / name, FOLDER / "venv/bin" / name):
        if place.exists():
            return str(place)
    raise FileNotFoundError(name)


def wrote(where: Path) -> None:
    same((where / "told.txt").read_text().strip(), WORDS)


# ── Claude Code ─────────────────────────────────────────────────────────────────────


def claude(
    prompt: str, *more: str, url: str = URL, key: str = "ollama", model: str = ECHO, check: bool = True
) -> str:
    env = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    command = (program("claude"), "-p", prompt, "--model", model, "--output-format", "json", *more)
    return ran(*command, env=env, check=check)


def claude_features() -> str:
    @feature("chat")
    def chat() -> None:
        assert WORDS in json.loads(claude(f"Say: {WORDS}"))["result"]

    @feature("stream")
    def stream() -> None:
        told = claude(
            f"Say: {WORDS}", "--output-format", "stream-json", "--verbose", "--include-partial-messages"
        )
        kinds = [
            json.loads(line).get("event", {}).get("type")
            for line in told.splitlines()
            if line.startswith("{")
        ]
        assert "content_block_delta" in kinds, kinds

    @feature("tools")
    def tools() -> None:
        where = workplace()
        call = json.dumps({"file_path": str(where / "told.txt"), "content": WORDS})
        claude(f"call Write {call}\n", "--permission-mode", "acceptEdits", "--add-dir", str(where))
        wrote(where)

    @feature("usage")
    def usage() -> None:
        told = json.loads(claude("Say it."))["usage"]
        assert told["input_tokens"] > 100
        assert told["output_tokens"] > 1

    @feature("errors")
    def errors() -> None:
        told = claude("Say it.", model=ABSENT, check=False)
        assert ABSENT in told, told[-500:]
        told = claude("Say it.", url=KEYED_URL, key=WRONG_KEY, check=False)
        assert "401" in told or "key" in told, told[-500:]

    @feature("key")
    def key() -> None:
        assert WORDS in json.loads(claude(f"Say: {WORDS}", url=KEYED_URL, key=KEY))["result"]

    return "@anthropic-ai/claude-code"


# ── Codex ───────────────────────────────────────────────────────────────────────────


def codex(
    prompt: str, *more: str, url: str = URL, key: str = "ollama", model: str = ECHO, check: bool = True
) -> str:
    home = HOME / "codex"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'model = "{model}"\nmodel_provider = "node"\n'
        f'[model_providers.node]\nname = "node"\nbase_url = "{url}/v1"\n'
        'env_key = "NODE_KEY"\nwire_api = "responses"\n'
    )
    return ran(
        program("codex"), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
        "--json", *more, prompt, env={"CODEX_HOME": str(home), "NODE_KEY": key}, check=check,
    )  # fmt: skip


def codex_features() -> str:
    @feature("chat")
    def chat() -> None:
        assert WORDS in codex(f"Say: {WORDS}")

    @feature("tools")
    def tools() -> None:
        where = workplace()
        call = json.dumps({"cmd": f"printf '{WORDS}' > {where / 'told.txt'}"})
        codex(f"call exec_command {call}")
        wrote(where)

    @feature("custom tools")
    def custom_tools() -> None:
        where = workplace()
        patch = f"*** Begin Patch\n*** Add File: {where / 'told.txt'}\n+{WORDS}\n*** End Patch\n"
        codex(f"call apply_patch {json.dumps({'input': patch})}", model=KNOWN)
        wrote(where)

    @feature("oss")
    def oss() -> None:
        home = HOME / "codex-oss"
        home.mkdir(exist_ok=True)
        told = ran(
            program("codex"), "exec", "--oss", "--local-provider", "ollama", "-m", ECHO,
            "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", f"Say: {WORDS}",
            env={"CODEX_HOME": str(home), "CODEX_OSS_BASE_URL": f"{URL}/v1"},
        )  # fmt: skip
        assert WORDS in told

    @feature("usage")
    def usage() -> None:
        told = codex("Say it.")
        rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        (used,) = [row["usage"] for row in rows if row["type"] == "turn.completed"]
        assert used["input_tokens"] > 100

    @feature("errors")
    def errors() -> None:
        assert ABSENT in codex("Say it.", model=ABSENT, check=False)
        assert "401" in codex("Say it.", url=KEYED_URL, key=WRONG_KEY, check=False)

    @feature("key")
    def key() -> None:
        assert WORDS in codex(f"Say: {WORDS}", url=KEYED_URL, key=KEY)

    return "@openai/codex"


# ── opencode ────────────────────────────────────────────────────────────────────────


def opencode(
    prompt: str, where: Path, url: str = URL, key: str = "ollama", model: str = ECHO, check: bool = True
) -> str:
    settings = {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "permission": {"edit": "allow", "bash": "allow"},
        "provider": {
            "node": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "node",
                "options": {"baseURL": f"{url}/v1", "apiKey": key},
                "models": {
                    model: {"name": model, "tool_call": True, "limit": {"context": 200000, "output": 8000}}
                },
            }
        },
        "model": f"node/{model}",
        "small_model": f"node/{model}",
    }
    (where / "opencode.json").write_text(json.dumps(settings))
    # As an argument it would come in quotes.
    return ran(program("opencode"), "run", "-m", f"node/{model}", said=prompt, where=where, check=check)


def opencode_features() -> str:
    @feature("chat")
    def chat() -> None:
        assert WORDS in opencode(f"Say: {WORDS}", workplace())

    @feature("tools")
    def tools() -> None:
        where = workplace()
        call = json.dumps({"filePath": str(where / "told.txt"), "content": WORDS})
        opencode(f"call write {call}", where)
        wrote(where)

    @feature("errors")
    def errors() -> None:
        told = opencode("Say it.", workplace(), model=ABSENT, check=False)
        assert "not found" in told, told[-500:]

    @feature("key")
    def key() -> None:
        assert WORDS in opencode(f"Say: {WORDS}", workplace(), url=KEYED_URL, key=KEY)

    return "opencode-ai"


# ── Qwen Code ───────────────────────────────────────────────────────────────────────


def qwen(prompt: str, *, url: str = URL, key: str = "ollama", model: str = ECHO, check: bool = True) -> str:
    env = {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": model}
    command = (program("qwen"), "--auth-type", "openai", "--approval-mode", "yolo", "-p", prompt)
    return ran(*command, env=env, check=check)


def qwen_features() -> str:
    @feature("chat")
    def chat() -> None:
        assert WORDS in qwen(f"Say: {WORDS}")

    @feature("tools")
    def tools() -> None:
        where = workplace()
        call = json.dumps({"file_path": str(where / "told.txt"), "content": WORDS})
        qwen(f"call write_file {call}")
        wrote(where)

    @feature("errors")
    def errors() -> None:
        assert ABSENT in qwen("Say it.", model=ABSENT, check=False)
        assert "401" in qwen("Say it.", url=KEYED_URL, key=WRONG_KEY, check=False)

    @feature("key")
    def key() -> None:
        assert WORDS in qwen(f"Say: {WORDS}", url=KEYED_URL, key=KEY)

    return "@qwen-code/qwen-code"


# ── aider ───────────────────────────────────────────────────────────────────────────


def aider(model: str, env: dict[str, str], prompt: str, where: Path, check: bool = True) -> str:
    return ran(
        program("aider"), "--model", model, "--message", prompt, "--yes-always", "--no-git",
        "--no-check-update", "--no-analytics", "--no-show-model-warnings", "--edit-format", "whole",
        "--map-tokens", "0", "told.txt",
        env=env, where=where, check=check,
    )  # fmt: skip


def aider_features() -> str:
    ways = {
        "ollama_chat": lambda url, key: {"OLLAMA_API_BASE": url, "OLLAMA_API_KEY": key},
        "openai": lambda url, key: {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": key},
        "anthropic": lambda url, key: {"ANTHROPIC_API_BASE": url, "ANTHROPIC_API_KEY": key},
    }

    def edits(url: str, key: str) -> None:
        for way, env in ways.items():
            where = workplace()
            (where / "told.txt").write_text("nothing yet\n")
            aider(f"{way}/{ECHO}", env(url, key), f"told.txt\n```\n{WORDS}\n```\n", where)
            wrote(where)

    @feature("chat")
    def chat() -> None:
        edits(URL, "ollama")

    @feature("key")
    def key() -> None:
        edits(KEYED_URL, KEY)

    @feature("errors")
    def errors() -> None:
        where = workplace()
        told = aider(f"openai/{ABSENT}", ways["openai"](URL, "ollama"), "Say it.", where, check=False)
        assert "not found" in told, told[-500:]

    return "aider-chat"


AGENTS = {
    "claude": claude_features,
    "codex": codex_features,
    "opencode": opencode_features,
    "qwen": qwen_features,
    "aider": aider_features,
}


def main() -> None:
    package = AGENTS[sys.argv[1]]()
    if (FOLDER / "venv").exists():
        python = str(FOLDER / "venv/bin/python")
        told = ran(python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))").strip()
    else:
        told = json.loads((FOLDER / "node_modules" / package / "package.json").read_text())["version"]
    print(json.dumps({"versions": {package: told}}), flush=True)
    run()


main()
