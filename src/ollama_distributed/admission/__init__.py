"""Who waits for a slot of this node, in which order, for how long, and who is refused."""
