"""Audit chains on this node's disk."""
