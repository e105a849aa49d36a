"""Ids, units, errors, clock, codec and wire types. Imports nothing else of ours."""
