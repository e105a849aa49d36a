"""A whole cluster in one process and in virtual time, with faults from a seed."""

from ollama_distributed.testing.simulation.world import Failed, Plan, Report, simulate

__all__ = ["Failed", "Plan", "Report", "simulate"]
