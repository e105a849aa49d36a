"""How urgent a request is: the class in which it waits for a slot."""

from __future__ import annotations

from typing import Literal

Priority = Literal["interactive", "normal", "batch"]
"""interactive: somebody watches the words come · normal: a program · batch: whenever there is room."""

PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")
"""The most urgent first."""
