"""Moves models: from and to registries, and between nodes."""
