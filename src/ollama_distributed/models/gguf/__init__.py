"""GGUF files: a strict header reader and the facts that the node needs from a header."""

from ollama_distributed.models.gguf.facts import (
    Kind,
    architecture_of,
    capabilities_of,
    chat_template_of,
    kind_of,
    numbers_of,
    pooling_of,
    tells_numbers,
    thinking_tags_of,
)
from ollama_distributed.models.gguf.header import (
    MAX_HEADER_BYTES,
    Array,
    Header,
    NeedMore,
    Tensor,
    Value,
    read_header,
)
from ollama_distributed.models.gguf.listing import human_number, model_info, tensor_list

__all__ = [
    "MAX_HEADER_BYTES",
    "Array",
    "Header",
    "Kind",
    "NeedMore",
    "Tensor",
    "Value",
    "architecture_of",
    "capabilities_of",
    "chat_template_of",
    "human_number",
    "kind_of",
    "model_info",
    "numbers_of",
    "pooling_of",
    "read_header",
    "tells_numbers",
    "tensor_list",
    "thinking_tags_of",
]
