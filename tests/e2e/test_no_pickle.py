"""S-05 at run time: a whole node imports everything, serves, and never looks up a class by a pickle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ollama_distributed.models.scripted import scripted_model
from tests.e2e.conftest import add_model
from tests.nodes import environment, running_node

pytestmark = pytest.mark.e2e

HOOK = """
import os, sys

def _watch(event, arguments, write=os.write, told=os.open({told!r}, os.O_WRONLY | os.O_APPEND)):
    if event == "pickle.find_class":
        write(told, ("%s\\n" % (arguments,)).encode())

sys.addaudithook(_watch)
_watch("pickle.find_class", "a hook is on")
"""
EVERYTHING = """
import importlib, pkgutil, ollama_distributed
for one in pkgutil.walk_packages(ollama_distributed.__path__, "ollama_distributed."):
    if not one.name.endswith("__main__"):
        importlib.import_module(one.name)
"""


def test_s05_no_pickle_is_read_by_a_node_or_by_any_of_its_modules(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.touch()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK.format(told=str(told)))
    watched = {"PYTHONPATH": str(tmp_path / "hook")}
    subprocess.run(
        [sys.executable, "-c", EVERYTHING], env=environment(tmp_path, watched), timeout=120, check=True
    )
    with running_node(tmp_path / "node", env=watched) as node:
        add_model(node.url, "scripted", scripted_model("Hello."))
        with node.http() as http:
            answer = http.post("/api/generate", json={"model": "scripted", "prompt": "x", "stream": False})
            assert answer.json()["response"] == "Hello."
    lines = told.read_text().splitlines()
    assert set(lines) == {"a hook is on"}
    assert len(lines) >= 2, "the hook was on in both"
