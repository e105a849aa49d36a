"""Decides which tokens become text (pure)."""
