"""Engines: ways to run a model."""
