"""Finds clusters on the local network."""
