"""`make bench` in short: it runs, and its ratios are of the right size.

The limits themselves are asserted by `make accept-bench` on a quiet machine; here others
work beside it, so only a gross loss fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parents[2]
GROSS_LOSS = 0.5


def bench(*arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_overhead() -> None:
    printed = bench("overhead", "--pairs", "2", "--tokens", "16")
    ratios = [float(ratio) for ratio in re.findall(r"│ (\d+\.\d{3}) │[^│]+│ >= 0\.97", printed)]
    assert len(ratios) == 3, printed
    assert max(ratios) > GROSS_LOSS, printed
    assert "added time to first token" in printed


def test_gateway() -> None:
    printed = bench("gateway", "--seconds", "0.5")
    assert len(re.findall(r"│ [\d,]+ +│ \d+ ", printed)) == 3, printed
