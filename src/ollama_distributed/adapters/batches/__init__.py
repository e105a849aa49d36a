"""Files and batches on this node's disk."""
