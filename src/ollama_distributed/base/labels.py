"""What a label of a node may be, wherever it is written. Pure."""

from __future__ import annotations

import re

from ollama_distributed.base.errors import Invalid

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_VALUE = re.compile(r"[A-Za-z0-9._/-]{0,63}", re.ASCII)


def check_node_label(name: str, value: str) -> None:
    """
    Raises:
        Invalid: it breaks the rule.
    """
    if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        raise Invalid(
            f"{name[:80]}={value[:80]}: a label's name and value are 1-63 of letters, digits and ._/-; "
            "the name begins with a letter or digit, the value may be empty",
            param="labels",
        )
