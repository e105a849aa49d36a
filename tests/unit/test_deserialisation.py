"""S-05: nothing that comes from outside is ever turned into code or objects of its own choice.

vLLM CVE-2025-32444, CVE-2025-29783, CVE-2025-47277, CVE-2025-30165, CVE-2025-66448, LMDeploy
CVE-2025-66455, BentoML CVE-2025-27520, CVE-2025-32375, CVE-2024-2912: pickle from the network. Bodies
are JSON or msgpack into typed structs here, models GGUF, settings YAML by its safe loader.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ollama_distributed

SOURCE = Path(ollama_distributed.__file__).parent

MODULES = frozenset({
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "copyreg"),
    *("torch", "tensorflow", "keras", "safetensors", "imp", "code", "codeop", "jinja2", "multiprocessing"),
})  # fmt: skip
"""Turn bytes into objects or text into code, or pass objects on that way."""
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
METHODS = frozenset({
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("yaml.FullLoader", "numpy.load", "np.load", "types.CodeType", "types.FunctionType"),
})  # fmt: skip
IMPORTERS = frozenset(
    {"import_module", "spec_from_file_location", "SourceFileLoader", "run_path", "run_module"}
)
REASONED = {
    "__init__.py: import_module()": "the SDK's names, of a list of the package's own",
    "client/__init__.py: import_module()": "likewise",
    "cli/node.py: import_module()": "one of our modules, named where it is called",
    "adapters/hardware/gpus.py: import_module()": "a library for GPUs that may be missing, named there",
    "testing/simulation/many.py: multiprocessing": "simulations on several cores: our own results, no input",
}
WORDS = "|".join(sorted(MODULES | IMPORTERS | {"yaml", "numpy", "np", "types"}))
WORTH_READING = re.compile(rf"\b(?:{WORDS})\b|(?<![.\w])(?:{'|'.join(BUILTINS)})\(")
"""A file without any of these words need not be taken apart."""


def found(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if not WORTH_READING.search(text):
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (one.name for one in names if one.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] in MODULES:
                    yield module
                yield from (f"{module}.{one.name}" for one in names if f"{module}.{one.name}" in METHODS)
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield f"{name}()"
            case ast.Attribute(value=ast.Name(id=left), attr=right) if f"{left}.{right}" in METHODS:
                yield f"{left}.{right}"
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in IMPORTERS:
                yield f"{name}()"
            case _:
                pass


def test_s05_no_module_makes_objects_or_code_of_bytes() -> None:
    told = {
        f"{path.relative_to(SOURCE)}: {what}" for path in sorted(SOURCE.rglob("*.py")) for what in found(path)
    }
    assert told <= set(REASONED)
    assert told >= set(REASONED), "a reason that nobody needs any more"


def test_s05_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import pickle\nfrom torch import load\nimport yaml\nfrom yaml import unsafe_load\n"
        "yaml.load('x')\neval('1')\nexec('1')\nimport os.path\n"
    )
    assert {*found(planted)} == {"pickle", "torch", "yaml.unsafe_load", "yaml.load", "eval()", "exec()"}
