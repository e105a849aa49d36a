"""Ollama's own integration tests, unchanged, against a node: `python -m bench.ollama_suite`.

They drive a running server through Ollama's own client in Go. The models that they name are brought under
those names: SmolLM2 for those that talk, all-MiniLM for those that embed (the tests hold the very numbers
that Ollama got), a scripted one for tools. Left out is what needs large models (TestContextExhaustion:
SmolLM2 runs on for as long, but in emoji), images, a GPU, or to start Ollama's own server. Needs Go.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.conftest import add_model
from tests.models import SMOLLM2, Models
from tests.nodes import running_node

from ollama_distributed.models.scripted import TOOLS_TEMPLATE

MODULE = "github.com/ollama/ollama"
VERSION = "v0.17.4"
DEFAULT_MODEL = "smollm2"
TALKERS = (DEFAULT_MODEL, "llama3.2", "qwen3:0.6b")
CALLER = "qwen3"
EMBEDDER = "all-minilm"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco"}}\n</tool_call>'
TALK = (
    "TestAPIGenerate$|TestAPIChat$|TestAPIListModels|TestAPIShowModel|TestAPIGenerateLogprobs|TestAPIChatLogprobs"
    "|TestBlueSky|TestNumPredict|TestConcurrentChat|TestLongInputContext"
    "|TestGenerateWithHistory|TestChatWithHistory|TestAllMiniLM"
)
OF_A_MODEL = (
    "(TestEmbedTruncation|TestEmbedLargeInput|TestEmbedStatusCode|TestEmbedCosineDistanceCorrelation"
    f"|TestAPIToolCalling)/^({EMBEDDER}|{CALLER})$"
)
"""Of tests of many models those of the ones that are here."""
MOST_MINUTES = 30


def suite(folder: Path) -> Path:
    """The tests as a program, built once."""
    program = folder / "suite"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "go.mod").write_text(f"module suite\n\ngo 1.24\n\nrequire {MODULE} {VERSION}\n")
    go = shutil.which("go") or sys.exit("Go 1.21 or newer is needed to build the tests of Ollama")

    def run(*command: str) -> str:
        env = os.environ | {"GOFLAGS": "-mod=mod"}
        return subprocess.run(
            [go, *command], cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    run("mod", "download", MODULE)
    tests = folder / "integration"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(
        Path(run("list", "-m", "-f", "{{.Dir}}", MODULE).strip()) / "integration",
        tests,
        copy_function=shutil.copyfile,
        ignore=shutil.ignore_patterns("imagegen_test.go"),  # it imports packages in C++
    )
    tests.chmod(0o755)
    run("mod", "tidy")
    run("test", "-c", "-tags=integration", "-o", str(program), "./integration")
    return program


@contextlib.contextmanager
def node(host: str) -> Iterator[str]:
    """The node at `host`, or one that is started for it."""
    if host:
        yield host
        return
    with tempfile.TemporaryDirectory() as folder, running_node(Path(folder) / "node") as started:
        yield started.url


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", default="", help="URL of a node that runs already, which is given the models"
    )
    parser.add_argument("--run", default="", help="only tests whose names match, as go test -run")
    parser.add_argument(
        "--folder", type=Path, default=Path(".venv/ollama-suite") / VERSION, help="for the program"
    )
    chosen = parser.parse_args()
    program = suite(chosen.folder.resolve())
    with node(chosen.host) as url, tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        for name in TALKERS:
            add_model(url, name, SMOLLM2.read_bytes(), license="Apache-2.0", parameters={"temperature": 0.8})
        add_model(url, CALLER, models.scripted(CALL, template=TOOLS_TEMPLATE).read_bytes())
        add_model(url, EMBEDDER, models.minilm().read_bytes())
        env = os.environ | {
            "OLLAMA_HOST": url,
            "OLLAMA_TEST_EXISTING": "1",
            "OLLAMA_TEST_DEFAULT_MODEL": DEFAULT_MODEL,
        }
        failed = 0
        for tests in (chosen.run,) if chosen.run else (OF_A_MODEL, TALK):
            command = [str(program), "-test.v", f"-test.timeout={MOST_MINUTES}m", f"-test.run={tests}"]
            failed |= subprocess.run(
                command, cwd=program.parent / "integration", env=env, check=False
            ).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
