"""Fuzzers of what strangers send before anything of it is believed: `python -m tests.fuzz --help`."""
