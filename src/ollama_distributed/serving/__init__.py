"""Runs engines on this node: load, keep alive, slots, drain, quarantine."""
