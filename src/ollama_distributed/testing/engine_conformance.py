"""The suite that every engine passes: what `serving/ports.py` promises, checked from outside.

For the author of an engine: make a `Subject` (your engine, models it can load, what it is
able to do) and await each of `CHECKS` on a fresh one, as `tests/conformance/` does with
pytest. A check that needs an ability the subject does not claim raises `NotApplicable`.
Only `assert` is used, so any test runner will do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ollama_distributed.testing import engine_answer_checks, engine_life_checks
from ollama_distributed.testing.engine_subject import Ability as Ability
from ollama_distributed.testing.engine_subject import NotApplicable as NotApplicable
from ollama_distributed.testing.engine_subject import Subject as Subject

Check = Callable[[Subject], Awaitable[None]]

CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for part in (engine_life_checks, engine_answer_checks)
    for name, check in vars(part).items()
    if name.startswith("check_")
}
"""Every check by name."""
