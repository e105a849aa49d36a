"""Usage on this node: counted, written down, copied, told."""

from ollama_distributed.node.usage.service import usage_of as usage_of
