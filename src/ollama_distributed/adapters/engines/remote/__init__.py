"""Servers that run already on this machine as engines: vLLM, SGLang, llama-server, Ollama."""

from ollama_distributed.adapters.engines.remote.ollama import OllamaEngine as OllamaEngine
from ollama_distributed.adapters.engines.remote.openai import OpenAIEngine as OpenAIEngine
