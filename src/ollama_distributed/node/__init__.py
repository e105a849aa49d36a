"""Builds one node from its settings, owns the root task group, connects the ports."""
