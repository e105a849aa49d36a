"""Decides what to load, evict, queue and refuse (pure)."""
