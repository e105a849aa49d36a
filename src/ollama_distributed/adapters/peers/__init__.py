"""Node to node: the door that serves forwarded requests, the pool that forwards them."""
