"""The SDK: a client of a node, async and sync. Imports nothing of the node."""
