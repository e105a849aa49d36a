"""What the person at the command line can put right: told as one message, without a traceback."""

from __future__ import annotations


class Problem(Exception):
    """A file, address or option that cannot be used; the message says what to do."""
