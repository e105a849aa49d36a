"""Which models this node has: resolve, list, show, create, copy, delete."""
