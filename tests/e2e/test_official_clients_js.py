"""The unmodified official JavaScript clients (`ollama`, `openai` from npm) against a node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import ANSWER
from tests.nodes import NodeProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

JS = Path(__file__).parent / "js"
LIMIT_S = 280


def test_official_javascript_clients(node: NodeProcess, embedder: str) -> None:
    assert (JS / "node_modules/ollama").is_dir(), "run `make test` (or npm ci --prefix tests/e2e/js) first"
    ran = subprocess.run(
        ["node", "--test", "clients.test.mjs"],
        cwd=JS,
        env={**os.environ, "NODE_URL": node.url, "ANSWER": ANSWER, "EMBEDDER": embedder},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "# fail 0" in ran.stdout
