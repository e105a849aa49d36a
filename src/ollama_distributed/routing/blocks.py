"""The prompt of a request as a chain of block keys, for `prefix.py` (pure).

Nothing is rendered: the chain is made of what templates are fed with (tools, system, messages, or
the text itself), in the order in which they put it. Each key covers a KiB and, through its seed,
all before it, so equal keys mean equal beginnings. The first seed holds tenant, model and template:
what one tenant sent tells nothing of what another's prompts would find cached.
"""

from __future__ import annotations

from array import array

import msgspec
import xxhash

from ollama_distributed.base.inference import ChatPrompt, InferenceRequest, TextPrompt, TokensPrompt

BLOCK_BYTES = 1024
MOST_BYTES = 128 * BLOCK_BYTES
"""Of a longer prompt the rest is not compared: 32,000 tokens decide."""
_IMAGE_BYTES = 4096
"""Of an image, for its key."""

_hash = xxhash.xxh3_64_intdigest
_tools = msgspec.json.Encoder().encode


class Chain(msgspec.Struct, frozen=True, gc=False):
    keys: tuple[int, ...] = ()
    """Of each whole block."""
    size_bytes: int = 0
    """Of all of it, the cut part included."""


NO_CHAIN = Chain()


def chain_of(request: InferenceRequest, key: str, digest: str, salt: int) -> Chain:
    """`key`, `digest`: of the model. `salt`: a secret of this gateway."""
    parts, prompt = _Parts(), request.prompt
    template = ""
    if isinstance(prompt, ChatPrompt):
        if prompt.tools and prompt.tool_choice != "none":
            parts.add(_tools(prompt.tools).decode())
        for message in prompt.messages:
            parts.add(message.role)
            for image in message.images:
                parts.add(_image(image))
            parts.add(message.content)
            for call in message.tool_calls:
                parts.add(call.name)
                parts.add(call.arguments)
    elif isinstance(prompt, TextPrompt):
        template = "raw" if prompt.raw else prompt.template or ""
        if prompt.context:
            parts.add_ids(prompt.context)
        if prompt.system:
            parts.add("system")
            parts.add(prompt.system)
        if not prompt.raw:
            parts.add("user")
        for image in prompt.images:
            parts.add(_image(image))
        parts.add(prompt.text)
    elif isinstance(prompt, TokensPrompt):
        parts.add_ids(prompt.ids)
    seed = _hash("\x1e".join((request.identity.tenant, key, digest, template)).encode(), salt)
    data = "\x1e".join(parts.texts).encode("utf-8", "surrogatepass")
    keys = []
    for at in range(0, min(len(data), MOST_BYTES) // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES):
        seed = _hash(data[at : at + BLOCK_BYTES], seed)
        keys.append(seed)
    return Chain(tuple(keys), len(data) + parts.cut)


class _Parts:
    __slots__ = ("cut", "left", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.left = MOST_BYTES
        self.cut = 0
        """Characters that were left out."""

    def add(self, text: str) -> None:
        length = len(text)
        if length > self.left:
            self.cut += length - self.left
            text = text[: self.left]
        self.left -= len(text)
        self.texts.append(text)

    def add_ids(self, ids: tuple[int, ...]) -> None:
        """Four bytes a token, which is what text takes on average."""
        data = array("q", ids[: MOST_BYTES // 4]).tobytes()
        self.add(data.decode("latin-1").replace("\0\0\0\0", ""))


def _image(data: bytes) -> str:
    return f"image {len(data)} {_hash(data[:_IMAGE_BYTES], 0):x}"
