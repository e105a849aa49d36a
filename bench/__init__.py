"""Ratios against a peer or a limit, measured in one run. `python -m bench --help`."""
