"""The program's commands against a loopback server: what they send, print and answer to the shell."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest
import yaml
from tests.integration.server_double import Asked, Double, Reply, closed_port_url, server_double
from tests.limits import SOON_S
from typer.testing import CliRunner, Result

from ollama_distributed.cli.main import app
from ollama_distributed.client import attempts

pytestmark = pytest.mark.integration

PROGRAM = [sys.executable, "-m", "ollama_distributed"]
INFO = {
    "name": "smollm2:135m",
    "digest": "51f8396217e070bf",
    "size": 98_000_000,
    "modified_at": "2020-01-01T00:00:00Z",
}
DONE = {"response": "", "done": True, "done_reason": "stop", "eval_count": 3, "eval_duration": 1_500_000_000}
Run = Callable[..., Result]


@pytest.fixture
def server() -> Iterator[Double]:
    with server_double() as double:
        double.on("POST", "/api/show", Reply(body={"capabilities": ["completion"]}))
        yield double


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BASE_WAIT_S", 0.001)
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "OLLAMA_DISTRIBUTED_API_KEY", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def run(server: Double, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("OLLAMA_HOST", server.url)

    def invoke(*arguments: str, text: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_list(server: Double, run: Run) -> None:
    old = {**INFO, "name": "a\x1b[2Jb", "modified_at": "2019-01-01T00:00:00Z"}
    server.on("GET", "/api/v1/models", Reply(body={"models": {"old": old, "new": INFO}}))
    result = run("list")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert lines[1].startswith("smollm2:135m    51f8396217e0    98 MB    ")
    assert lines[1].endswith("years ago")
    assert "\x1b" not in result.stdout
    assert [row["name"] for row in json.loads(run("ls", "SMOL", "-o", "json").stdout)] == ["smollm2:135m"]
    assert yaml.safe_load(run("--output", "yaml", "list").stdout)[0]["name"] == "smollm2:135m"


def test_an_empty_list_says_how_to_bring_a_model(server: Double, run: Run) -> None:
    server.on("GET", "/api/v1/models", Reply(body={"models": {}}))
    result = run("list")
    assert result.stdout.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert "pull NAME" in result.stderr
    assert json.loads(run("list", "-o", "json").stdout) == []


def test_plain_http_to_a_port_with_tls_has_a_hint(server: Double, run: Run) -> None:
    server.on("GET", "/api/ps", Reply(drop=True))
    result = run("ps")
    assert result.exit_code == 1
    assert "https://" in result.stderr


def test_run_pulls_what_is_not_there(server: Double, run: Run) -> None:
    missing = Reply(404, {"error": {"code": "model_not_found", "message": "model 'm' not found"}})
    server.on("POST", "/api/show", missing, Reply(body={"capabilities": ["completion"]}))
    server.on("POST", "/api/v1/generate", Reply(lines=[{"response": "yes", "done": False}, DONE]))
    server.on("POST", "/api/pull", Reply(lines=[{"status": "pulling manifest"}, {"status": "success"}]))
    result = run("run", "m", "q", text="")
    assert result.stdout == "yes\n"
    assert "'m' is not here; pulling it" in result.stderr
    assert "pulling manifest" in result.stderr
    # Who may not pull is told what they asked for.
    server.on("POST", "/api/show", missing)
    server.on("POST", "/api/pull", Reply(403, {"error": {"code": "forbidden", "message": "no"}}))
    refused = run("run", "m", "q", text="")
    assert refused.exit_code == 1
    assert "model 'm' not found" in refused.stderr


def test_ps(server: Double, run: Run) -> None:
    engine = {"name": "llama.cpp", "variant": "built", "version": "b1", "instruction_set": "AMX"}
    loaded = {**INFO, "size": 100, "size_vram": 40, "context_length": 4096, "engine": engine}
    loaded["expires_at"] = "2318-01-01T00:00:00Z"
    server.on("GET", "/api/ps", Reply(body={"models": [loaded]}))
    header, row = run("ps").stdout.splitlines()
    assert header.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL", "ENGINE"]
    assert [cell.strip() for cell in row.split("  ") if cell][2:] == [
        "100 B",
        "60%/40% CPU/GPU",
        "4096",
        "Forever",
        "llama.cpp built b1 AMX",
    ]


def test_show(server: Double, run: Run) -> None:
    shown = {
        "license": "Apache\nline 2\nline 3",
        "modelfile": "FROM x",
        "template": "{{ .Prompt }}",
        "parameters": 'stop "<|im_end|>"',
        "details": {"quantization_level": "Q4_1"},
        "model_info": {"general.architecture": "llama", "general.parameter_count": 134515008},
        "capabilities": ["completion"],
    }
    server.on("POST", "/api/show", Reply(body=shown))
    text = run("show", "m").stdout
    assert "architecture        llama" in text
    assert "134.5M" in text
    assert "line 3" not in text
    assert run("show", "m", "--license").stdout == "Apache\nline 2\nline 3\n"
    assert run("show", "--template", "m").stdout == "{{ .Prompt }}\n"
    assert run("show", "m", "--license", "--template").exit_code == 2
    assert "general.architecture" in run("show", "m", "-v").stdout


def test_run_answers_a_prompt_with_what_is_piped_in(server: Double, run: Run) -> None:
    server.on("POST", "/api/v1/generate", Reply(lines=[{"response": "Hel"}, {"response": "lo"}, DONE]))
    result = run(
        "run", "m", "sum", "up", "--verbose", "--think", "--format", "json", "--keepalive", "5m",
        "--option", "temperature=0", "--system", "brief", text="the text\n",
    )  # fmt: skip
    assert result.stdout == "Hello\n"
    assert "eval rate:            2.00 tokens/s" in result.stderr
    assert server.asked[-1].json == {
        "model": "m",
        "prompt": "sum up\n\nthe text",
        "system": "brief",
        "format": "json",
        "stream": True,
        "keep_alive": "5m",
        "options": {"temperature": 0.0},
        "think": True,
    }


def test_thinking_is_apart_or_hidden(server: Double, run: Run) -> None:
    lines = [{"thinking": "hm"}, {"response": "yes"}, DONE]
    server.on("POST", "/api/v1/generate", Reply(lines=lines))
    assert run("run", "m", "q", text="").stdout == "Thinking...\nhm\n...done thinking.\n\nyes\n"
    assert run("run", "m", "q", "--hidethinking", text="").stdout == "yes\n"


def test_run_sends_images_to_a_vision_model(server: Double, run: Run, tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(b"PNG")
    server.on("POST", "/api/show", Reply(body={"capabilities": ["completion", "vision"]}))
    server.on("POST", "/api/v1/generate", Reply(lines=[DONE]))
    run("run", "m", f"what is {image}", text="")
    assert server.asked[-1].json["images"] == ["UE5H"]
    assert server.asked[-1].json["prompt"] == "what is"


def test_run_of_an_embedding_model(server: Double, run: Run) -> None:
    server.on("POST", "/api/show", Reply(body={"capabilities": ["embedding"]}))
    server.on("POST", "/api/v1/embeddings", Reply(body={"embeddings": [[0.5, 1]]}))
    assert run("run", "m", "text", text="").stdout == "[0.5,1.0]\n"
    assert run("embed", "m", "--dimensions", "2", "--no-truncate", text="a\nb\n").exit_code == 0
    assert server.asked[-1].json == {"model": "m", "input": ["a", "b"], "dimensions": 2, "truncate": False}


def test_generate_prints_the_whole_answer(server: Double, run: Run) -> None:
    server.on("POST", "/api/v1/generate", Reply(body={"response": "x", "done": True, "eval_count": 1}))
    told = json.loads(run("generate", "m", "q", "--raw", "-o", "json", text="").stdout)
    assert told["response"] == "x"
    assert server.asked[-1].json == {"model": "m", "prompt": "q", "raw": True}


def test_an_error_in_the_answer_ends_with_code_1(server: Double, run: Run) -> None:
    failed = {"error": {"code": "runner_died", "message": "it \x1b[31mdied", "request_id": "r1"}}
    server.on("POST", "/api/v1/generate", Reply(lines=[{"response": "a"}, failed]))
    result = run("run", "m", "q", text="")
    assert result.exit_code == 1
    assert result.stdout == "a\n"
    assert "Error: it \u241b[31mdied" in result.stderr
    assert "r1" in result.stderr


def test_cp_rm_stop(server: Double, run: Run) -> None:
    server.on("POST", "/api/copy", Reply())
    server.on("DELETE", "/api/v1/models/b", Reply(204))
    server.on("POST", "/api/generate", Reply(body={"done": True}))
    assert run("cp", "a", "b").stderr == "copied 'a' to 'b'\n"
    result = run("rm", "b", "c")
    assert result.exit_code == 1
    assert "deleted 'b'" in result.stderr
    assert run("stop", "a").exit_code == 0
    assert server.asked[-1].json == {"model": "a", "keep_alive": 0, "stream": False}


def _gguf(path: Path, data: bytes = b"GGUF rest") -> str:
    path.write_bytes(data)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _takes_blobs(server: Double, *digests: str) -> None:
    for digest in digests:
        server.on("HEAD", f"/api/blobs/{digest}", Reply(404))
        server.on("POST", f"/api/blobs/{digest}", Reply(201))
    server.on("POST", "/api/create", Reply(lines=[{"status": "writing manifest"}, {"status": "success"}]))


def test_create_sends_the_files_of_a_modelfile(server: Double, run: Run, tmp_path: Path) -> None:
    weights = _gguf(tmp_path / "w.gguf")
    adapter = _gguf(tmp_path / "lora.gguf", b"GGUF lora")
    _takes_blobs(server, weights, adapter)
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(
        "FROM ./w.gguf\nADAPTER lora.gguf\nSYSTEM hi\nPARAMETER temperature 0.5\nPARAMETER stop a\n"
        "PARAMETER stop b\nMESSAGE user x\nLICENSE mine\n"
    )
    result = run("create", "new", "-f", str(modelfile))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines() == ["writing manifest", "success"]
    assert server.asked[-1].json == {
        "model": "new",
        "files": {"w.gguf": weights},
        "adapters": {"lora.gguf": adapter},
        "system": "hi",
        "parameters": {"temperature": 0.5, "stop": ["a", "b"]},
        "messages": [{"role": "user", "content": "x"}],
        "license": ["mine"],
    }


def test_create_from_a_model_by_stdin(server: Double, run: Run) -> None:
    _takes_blobs(server)
    assert run("create", "new", "-f", "-", text="FROM base:1b\n").exit_code == 0
    assert server.asked[-1].json == {"model": "new", "from": "base:1b"}


@pytest.mark.parametrize(
    ("modelfile", "told"),
    [
        ("FROM ./missing.gguf\n", "no such file"),
        ("FROM ./text.gguf\n", "is not a GGUF file"),
        ("FROM ./empty\n", "holds no GGUF file"),
        ("SYSTEM x\n", "no FROM line"),
    ],
)
def test_create_says_what_is_wrong_before_it_sends(
    server: Double, run: Run, tmp_path: Path, modelfile: str, told: str
) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "Modelfile").write_text(modelfile)
    result = run("create", "new", "-f", str(tmp_path / "Modelfile"))
    assert result.exit_code == 1
    assert told in result.stderr
    assert server.asked == []


def test_import(server: Double, run: Run, tmp_path: Path) -> None:
    digest = _gguf(tmp_path / "my.gguf")
    _takes_blobs(server, digest)
    assert run("import", str(tmp_path / "my.gguf"), "--name", "mine:1").exit_code == 0
    assert server.asked[-1].json == {"model": "mine:1", "files": {"my.gguf": digest}}
    assert run("import", str(tmp_path / "nothing.gguf")).exit_code == 2


def test_an_error_while_creating(server: Double, run: Run) -> None:
    server.on("POST", "/api/create", Reply(lines=[{"status": "parsing"}, {"error": "bad template"}]))
    result = run("create", "new", "-f", "-", text="FROM base\n")
    assert result.exit_code == 1
    assert "Error: bad template" in result.stderr


def test_version(server: Double, run: Run) -> None:
    engine = {"name": "llama.cpp", "variant": "wheel", "version": "b1", "instruction_set": "AVX2"}
    server.on("GET", "/api/v1/version", Reply(body={"version": "0.9", "engine": engine}))
    told = json.loads(run("version", "-o", "json").stdout)
    assert told["server"] == "0.9"
    assert told["engine"] == "llama.cpp wheel b1"
    assert told["instruction_set"] == "AVX2"
    result = run("--host", closed_port_url(), "version")
    assert result.exit_code == 0
    assert "no server" in result.stderr


def test_a_sign_in_that_is_refused_is_told_at_once(server: Double, run: Run) -> None:
    server.on(
        "POST", "/api/v1/auth/login", Reply(401, {"error": {"code": "unauthenticated", "message": "no"}})
    )
    result = run("login", "--user", "ann", "--password-stdin", text="wrong password\n")
    assert (result.exit_code, result.stderr) == (1, "Error: no\n")
    # Else it would wait for a browser that has nowhere to go.
    result = run("login", "--browser")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no route /api/v1/auth/oidc/start?port=")


def test_no_server_says_how_to_start_one(run: Run) -> None:
    result = run("list", "--host", closed_port_url())
    assert result.exit_code == 1
    assert "ollama-distributed serve" in result.stderr


def test_a_refused_answer_leaves_no_line(server: Double, run: Run) -> None:
    server.on("POST", "/api/generate", Reply(429, {"error": {"code": "rate_limited", "message": "no"}}))
    server.on("POST", "/api/chat", Reply(429, {"error": {"code": "rate_limited", "message": "no"}}))
    result = run("run", "m", "hi")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (404, "model_not_found", "import FILE.gguf"),
        (401, "unauthenticated", "--api-key"),
        (403, "forbidden", "admin"),
    ],
)
def test_errors_say_what_to_do_next(server: Double, run: Run, status: int, code: str, hint: str) -> None:
    server.on("GET", "/api/ps", Reply(status, {"error": {"code": code, "message": "no"}}))
    result = run("ps")
    assert (result.exit_code, result.stdout) == (1, "")
    assert hint in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nix"],
        ["list", "-o", "xml"],
        ["show"],
        ["run", "m", "x", "--option", "nope"],
        ["embed", "m", "x", "--dimensions", "0"],
    ],
)
def test_wrong_usage_is_code_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments, text="").exit_code == 2


def test_a_key_goes_with_every_request(server: Double, run: Run, tmp_path: Path) -> None:
    def ps(asked: Asked) -> Reply:
        return Reply(body={"models": [{"name": asked.headers.get("authorization", "none")}]})

    server.on("GET", "/api/ps", ps)
    assert json.loads(run("ps", "-o", "json", "--api-key", "k").stdout)[0]["name"] == "Bearer k"
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "admin.json").write_text(json.dumps({"url": server.url, "key": "odk_admin"}))
    assert (
        json.loads(run("ps", "-o", "json", "--data-dir", str(folder)).stdout)[0]["name"] == "Bearer odk_admin"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run: Run, shell: str) -> None:
    assert "_OLLAMA_DISTRIBUTED_COMPLETE" in run("completion", shell).stdout
    assert run("completion", "tcsh").exit_code == 2


@pytest.mark.parametrize(
    ("line", "found"), [("serve --data", ["--data-dir"]), ("engine build --f", ["--force"])]
)
def test_commands_that_are_passed_on_complete(server: Double, line: str, found: list[str]) -> None:
    words = f"ollama-distributed {line}"
    env = _environment(server, COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    env["_OLLAMA_DISTRIBUTED_COMPLETE"] = "complete_bash"
    done = subprocess.run(PROGRAM, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == found, done.stderr


def _environment(server: Double, **more: str) -> dict[str, str]:
    return {**os.environ, "OLLAMA_HOST": server.url, **more}


def test_model_names_complete(server: Double) -> None:
    server.on("GET", "/api/v1/models", Reply(body={"models": {"smollm2:135m": INFO, "other": {}}}))
    done = subprocess.run(
        PROGRAM,
        env=_environment(
            server,
            _OLLAMA_DISTRIBUTED_COMPLETE="complete_fish",
            _TYPER_COMPLETE_FISH_ACTION="get-args",
            _TYPER_COMPLETE_ARGS="ollama-distributed run smo",
        ),
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert done.stdout.strip() == "smollm2:135m"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run smollm2:1", ["135m"]),  # bash puts it behind the colon, where its last word begins
        ("run smo", ["smollm2:135m"]),
        ("show ", ["smollm2:135m", "other"]),
        ("sho", ["show"]),
    ],
)
def test_bash_completes_names_with_a_colon(
    server: Double, tmp_path: Path, typed: str, offered: list[str]
) -> None:
    server.on("GET", "/api/v1/models", Reply(body={"models": {"smollm2:135m": INFO, "other": {}}}))
    program = tmp_path / "ollama-distributed"
    program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    script = (
        'source <("$1" completion bash); COMP_LINE="$2"; COMP_POINT=${#COMP_LINE}; '
        '_ollama_distributed_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(program), f"ollama-distributed {typed}"],
        env=_environment(server),
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert done.stdout.split() == offered, done.stderr


def test_a_terminal_gets_no_escape_of_the_model(server: Double) -> None:
    server.on("POST", "/api/v1/generate", Reply(lines=[{"response": "\x1b]0;pwned\x07ok"}, DONE]))
    main, terminal = pty.openpty()
    with os.fdopen(main, "rb", buffering=0) as screen:
        done = subprocess.run(
            [*PROGRAM, "run", "m", "q"],
            env=_environment(server, TERM="xterm"),
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.PIPE,
            timeout=SOON_S,
        )
        os.close(terminal)
        seen = b""
        with suppress(OSError):  # the end of a terminal that nobody writes to any more
            while piece := screen.read(4096):
                seen += piece
    assert done.returncode == 0, done.stderr
    assert b"\x1b]" not in seen
    assert "\u241b]0;pwned\u2407ok".encode() in seen
    piped = subprocess.run(
        [*PROGRAM, "run", "m", "q"],
        env=_environment(server),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SOON_S,
    )
    assert piped.stdout == b"\x1b]0;pwned\x07ok\n", "data that goes into a file is not touched"


def test_ctrl_c_is_code_130_and_hangs_up(server: Double) -> None:
    hold = Event()
    server.on("POST", "/api/v1/generate", Reply(lines=[{"response": "begun\n"}], hold=hold))
    with subprocess.Popen(
        [*PROGRAM, "run", "m", "q"],
        env=_environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        program.send_signal(signal.SIGINT)
        _, told = program.communicate(timeout=SOON_S)
    assert program.returncode == 130, told
    assert server.hung_up.wait(SOON_S)
    hold.set()


def test_the_program_starts_without_the_node() -> None:
    code = (
        "import sys\n"
        "from ollama_distributed.cli.main import app\n"
        "from typer.main import get_command\n"
        "get_command(app).main(['--help'], standalone_mode=False)\n"
        "heavy = {'httpx', 'msgspec', 'prompt_toolkit', 'rich', 'pydantic', 'fastapi', 'uvicorn', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('ollama_distributed.')}\n"
        "assert rooms <= {'cli', 'client', '_version'}, rooms\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == 0, done.stderr
    assert "Node:" in done.stdout
    assert "serve" in done.stdout


def test_without_the_nodes_extra_serve_says_how_to_get_it() -> None:
    code = (
        "import sys\n"
        "sys.modules['uvicorn'] = sys.modules['pydantic_settings'] = sys.modules['fastapi'] = None\n"
        "sys.argv = ['ollama-distributed', 'engine', 'list']\n"
        "from ollama_distributed.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == 1
    assert "pip install 'ollama-distributed[node]'" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_the_shell(server: Double, tmp_path: Path, shell: str) -> None:
    done = subprocess.run(
        [*PROGRAM, "completion", shell, "--install"],
        env=_environment(server, HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert done.returncode == 0, done.stderr
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("_OLLAMA_DISTRIBUTED_COMPLETE" in text for text in written)


def test_engine_lists_and_tests_what_can_run(server: Double, tmp_path: Path) -> None:
    env = _environment(server, OLLAMA_DISTRIBUTED_CACHE_DIR=str(tmp_path), PATH=os.defpath)
    listed = subprocess.run(
        [*PROGRAM, "engine", "list", "-o", "json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert [row["variant"] for row in json.loads(listed.stdout)][-1] == "wheel"
    failed = subprocess.run(
        [*PROGRAM, "engine", "test", sys.executable],
        env=env,
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert failed.returncode == 1
    assert "Error:" in failed.stderr
    assert failed.stdout == ""


def test_the_base_install_is_enough_for_every_client_command(server: Double, tmp_path: Path) -> None:
    digest = _gguf(tmp_path / "m.gguf")
    _takes_blobs(server, digest)
    code = (
        "import sys\n"
        "extra = 'fastapi starlette uvicorn uvloop httptools psutil pydantic_settings structlog xllamacpp'\n"
        "sys.modules.update(dict.fromkeys(extra.split()))\n"
        "import ollama_distributed.cli.repl, ollama_distributed.cli.inference\n"
        "from ollama_distributed.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "import", str(tmp_path / "m.gguf"), "-n", "m"],
        env=_environment(server),
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert done.returncode == 0, done.stderr
    assert server.asked[-1].json == {"model": "m", "files": {"m.gguf": digest}}
