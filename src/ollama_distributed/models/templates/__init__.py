"""Modelfile TEMPLATEs (Go syntax) as Jinja twins. Go templates are never rendered by us."""

from ollama_distributed.models.templates.known import PASSTHROUGH, RAW, detect, of_a_model, refusal, twin

__all__ = ["PASSTHROUGH", "RAW", "detect", "of_a_model", "refusal", "twin"]
