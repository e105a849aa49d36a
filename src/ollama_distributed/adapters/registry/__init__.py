"""Registries: Ollama's own, hf.co, and any that speaks the distribution protocol (docker-registry)."""
