"""Whole nodes in network namespaces, under load, while parts of them die, hang or are cut off."""
