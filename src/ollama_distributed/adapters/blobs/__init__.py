"""Models on disk, in Ollama's own layout."""
