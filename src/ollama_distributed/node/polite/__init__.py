"""Leaves the machine to its owner: when a node rests, and how it stops its work for that."""
