"""llama.cpp's own tests of its server, unchanged, against a node: `python -m bench.llama_suite`.

They are in the sdist that the pinned wheel was made of, which pip fetches; no file of theirs is kept
here. `bench.llama_node` takes the place of their `ServerProcess`: where a test starts llama-server, the
node that runs gets the test's model under the names that the test uses. `bench.llama_judged` says
which tests are about llama-server alone, and which a node answers otherwise, and why: every other one must
pass, and those must fail.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.nodes import running_node
from tests.registries import free_port

from ollama_distributed.adapters.engines.build import plan, source

TESTS = Path("tools/server/tests")
FOLDER = Path(".venv/llama-suite") / plan.SOURCE_VERSION


def tree(folder: Path, archive: Path | None) -> Path:
    """llama.cpp's source, unpacked once."""
    target = folder / "llama.cpp"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = archive or asyncio.run(source.download(folder))
        source.check(archive)
        source.unpack(archive, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="", help="only tests whose names match, as pytest -k")
    parser.add_argument("--file", default="unit", help="only this file of theirs, e.g. unit/test_rerank.py")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the source")
    parser.add_argument("--archive", type=Path, help="the sdist, where no package index is reached")
    chosen = parser.parse_args()
    tests = tree(chosen.folder.resolve(), chosen.archive) / TESTS
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as nodes:
        env = os.environ | {"PYTHONPATH": str(root), "LLAMA_SUITE_FOLDER": folder}
        both = free_port()
        closed = ("--require-key", "--listen", f"[::1]:{both}")
        for name, port, arguments in (("open", 0, ()), ("closed", both, closed)):
            node = nodes.enter_context(
                running_node(Path(folder) / name, *arguments, listen=f"127.0.0.1:{port}")
            )
            env[f"LLAMA_SUITE_{name.upper()}"] = node.url
        admin = json.loads((Path(folder) / "closed" / "admin.json").read_text())
        env["LLAMA_SUITE_KEY"] = admin["key"]
        command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "bench.llama_node", "-q"]
        command += ["-p", "no:cacheprovider", "--timeout=120", "--tb=short", chosen.file]
        if chosen.run:
            command += ["-k", chosen.run]
        return subprocess.run(command, cwd=tests, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
