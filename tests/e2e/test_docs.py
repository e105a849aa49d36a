"""The examples of README and docs, run as they stand against a real node.

A fence after `<!-- run -->` is run; `<!-- run, prints: TEXT -->` also wants TEXT in its output.
`127.0.0.1:8080` becomes the session's node, which has a model `mymodel`; `model.gguf` lies in
the folder where the example runs; the programs of `.venv` come first on PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.conftest import MODELS, add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEADLINE_S = 4 * SOON_S
"""Of one example, which may start the program many times."""
_EXAMPLE = re.compile(
    r"^<!-- run(?:, prints: (?P<prints>.+?))? -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_MARK = "<!-- run"


class Example(NamedTuple):
    where: str
    language: str
    code: str
    prints: str


def examples_of(page: Path) -> list[Example]:
    text = page.read_text()
    found = [
        Example(
            f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}",
            match["language"],
            match["code"],
            match["prints"] or "",
        )
        for match in _EXAMPLE.finditer(text)
    ]
    assert len(found) == text.count(_MARK), f"{page.name}: a mark without a fence right below"
    return found


EXAMPLES = [
    example
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for example in examples_of(page)
]


@pytest.fixture(scope="module")
def mymodel(node: NodeProcess) -> None:
    add_model(node.url, "mymodel", MODELS["scripted"])


@pytest.mark.usefixtures("mymodel")
@pytest.mark.parametrize("example", EXAMPLES, ids=[example.where for example in EXAMPLES])
def test_example(example: Example, node: NodeProcess, tmp_path: Path) -> None:
    address = node.url.removeprefix("http://")
    code = example.code.replace("127.0.0.1:8080", address).replace(".venv/bin/", "")
    (tmp_path / "model.gguf").write_bytes(MODELS["scripted"])
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
    if example.language == "sh":
        if "curl" in code and shutil.which("curl") is None:
            pytest.skip("there is no curl")
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        assert example.language == "python"
        command = [sys.executable, "-W", "error", "-c", code]
    env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    env |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "CURL_HOME": str(tmp_path),
        "OLLAMA_HOST": node.url,
        "OLLAMA_DISTRIBUTED_DATA_DIR": str(node.data_dir),
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert example.prints in done.stdout, f"{code}\n{done.stdout}"


def test_there_are_examples_to_run() -> None:
    """Nothing above fails when the marks are lost."""
    pages = {example.where.partition(":")[0] for example in EXAMPLES}
    assert pages >= {"README.md", "api.md", "cli.md", "sdk.md"}
