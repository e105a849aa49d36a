"""The usage ledger on this node's disk."""
