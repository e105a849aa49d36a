"""Makes a tiny llama model that answers with exactly one chosen text, then ends.

For the self-test of engines and for tests through the *real* engine: failover, tool
calls, reasoning and partial characters become exact and take milliseconds.

How it works. Every token of the script has its own vocabulary entry, even where words
repeat, so the last token alone says where in the script we are. All layers are zero:
the residual stream at the end is the embedding of the last token. That embedding is a
±1 code; the output row of the token that follows holds the same code, scaled so that
its logit beats all others by thousands: exact at any temperature and penalty in use.

All tokens that can occur in a prompt (control tokens, plain bytes, the space) share one
code, which leads to the first word. Prompts never contain script tokens: the tokenizer builds
a piece of three or more characters only out of known smaller pieces, and there are none;
shorter pieces are byte tokens. A byte token is read by characters 3 and 4 of its text
(`<0x41>`), so `<0x41>#7` is a second entry for the same byte. Continuing from the
prompt and the emitted ids therefore goes on with the next word.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

from ollama_distributed.models.gguf_writer import (
    U32,
    F32Array,
    I32Array,
    StringArray,
    Tensor,
    TensorType,
    Value,
    write_gguf,
)

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Plain ChatML, without tools and reasoning."""

TOOLS_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n" }}
{{- "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and " }}
{{- "arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls or [] %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Hermes / Qwen 2.5 style: calls as JSON in `<tool_call>` tags."""

THINKING_TEMPLATE = """\
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
"""Qwen 3 style: the model opens `<think>` itself; `enable_thinking: false` closes it for it."""

_WIDTH = 128
"""Bits of a code, and the embedding length. Two of n random codes agree in more than 80 %
of the bits with odds below n² · 1e-18, and each factor of two here doubles the file."""
_HEAD = 32
"""Length of an attention head: one block of a quantised KV cache."""
_FEED_FORWARD = 32
_LOGIT = 20_000.0
"""Logit of the right token. Others stay below its half: a gap of 40 nats at temperature 200.
Below the largest half-precision number, for GPUs that sum in it."""

_SPECIAL = (b"<unk>", b"<s>", b"</s>", b"<|im_start|>", b"<|im_end|>")
_BOS, _EOS, _UNKNOWN = 1, 4, 0
_SPACE = "\u2581"
"""What the tokenizer makes of a space; without its own token it would not come back as one."""
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_BYTE = 1, 2, 3, 6
_SHORTEST_PIECE = 3
"""Characters. Two characters next to each other in a prompt would be merged into a piece."""

_BITS = tuple(
    b"".join(b"\x00\x3c" if byte >> bit & 1 else b"\x00\xbc" for bit in range(8)) for byte in range(256)
)
"""Byte -> its eight bits as half-precision +1 or -1."""


def scripted_model(
    script: str | Sequence[str | bytes],
    *,
    chat_template: str = CHATML_TEMPLATE,
    context_tokens: int = 2048,
    name: str = "scripted",
    endless: bool = False,
) -> bytes:
    """A GGUF file whose only answer is `script`, then the end of the turn.

    A string is cut into words with the space before them; a sequence says the words
    itself, and `bytes` in it come one token a byte. Characters outside ASCII always come
    as byte tokens, so they arrive in parts. `chat_template` "": none in the file.
    `endless`: begin again instead of ending, for tests that cancel.
    """
    script_tokens = list(_tokens(script))
    if not script_tokens:
        raise ValueError("a script needs at least one character")
    texts = [*_SPECIAL, *(b"<0x%02X>" % byte for byte in range(256)), _SPACE.encode()]
    types = [_TYPE_UNKNOWN, *[_TYPE_CONTROL] * (len(_SPECIAL) - 1), *[_TYPE_BYTE] * 256, _TYPE_NORMAL]
    first = len(texts)
    texts += [text for text, _ in script_tokens]
    types += [kind for _, kind in script_tokens]
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": U32(1),
        "llama.context_length": U32(context_tokens),
        "llama.embedding_length": U32(_WIDTH),
        "llama.block_count": U32(1),
        "llama.feed_forward_length": U32(_FEED_FORWARD),
        "llama.attention.head_count": U32(_WIDTH // _HEAD),
        "llama.attention.head_count_kv": U32(1),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": U32(_HEAD),
        "llama.vocab_size": U32(len(texts)),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": StringArray(texts),
        "tokenizer.ggml.scores": F32Array([0.0] * len(texts)),
        "tokenizer.ggml.token_type": I32Array(types),
        "tokenizer.ggml.bos_token_id": U32(_BOS),
        "tokenizer.ggml.eos_token_id": U32(_EOS),
        "tokenizer.ggml.unknown_token_id": U32(_UNKNOWN),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if chat_template:
        metadata["tokenizer.chat_template"] = chat_template
    return write_gguf(metadata, list(_tensors(first, len(script_tokens), endless=endless)))


def script_pieces(script: str | Sequence[str | bytes]) -> list[bytes]:
    """What each token of the answer says, in order: one entry per generated token."""
    return [_spoken(text, kind) for text, kind in _tokens(script)]


def _spoken(text: bytes, kind: int) -> bytes:
    if kind == _TYPE_BYTE:
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE.encode(), b" ")


def _tokens(script: str | Sequence[str | bytes]) -> Iterator[tuple[bytes, int]]:
    """Vocabulary text and type of each token of the script, all different."""
    taken: set[str] = set()
    for position, piece in enumerate(_cut(script, taken)):
        if isinstance(piece, int):
            yield b"<0x%02X>#%d" % (piece, position), _TYPE_BYTE
        else:
            yield piece.replace(" ", _SPACE).encode(), _TYPE_NORMAL


def _cut(script: str | Sequence[str | bytes], taken: set[str]) -> Iterator[str | int]:
    """Pieces (at least three ASCII characters, none twice) and single bytes."""
    for word in _words(script) if isinstance(script, str) else script:
        if isinstance(word, bytes):
            yield from word
            continue
        rest = word
        while rest:
            # "<" stands alone so that no piece looks like a control token (`<|end|>`),
            # which llama.cpp would take for the end of the answer.
            length = next((i for i, c in enumerate(rest) if c == "<" or not c.isascii()), len(rest))
            piece = rest[:length]
            if length >= _SHORTEST_PIECE and piece not in taken:
                taken.add(piece)
                yield piece
                rest = rest[length:]
            else:
                yield from rest[0].encode()
                rest = rest[1:]


def _words(text: str) -> Iterator[str]:
    """Words with the white space before them; joined, they are the text again."""
    start = 0
    for i in range(1, len(text)):
        if text[i].isspace() and not text[i - 1].isspace():
            yield text[start:i]
            start = i
    yield text[start:]


def _code(state: int) -> bytes:
    """The ±1 code of a state as half-precision numbers; state 0 is "before the first word"."""
    digest = hashlib.shake_128(b"scripted %d" % state).digest(_WIDTH // 8)
    return b"".join(_BITS[byte] for byte in digest)


def _tensors(first: int, count: int, *, endless: bool) -> Iterator[Tensor]:
    zeros = bytes(2 * _WIDTH)
    codes = [_code(state) for state in range(count + 1)]
    if endless:
        codes[count] = codes[0]
    embedding = codes[:1] * first + codes[1:]
    output = [zeros] * first + codes[:count]
    if not endless:
        output[_EOS] = codes[count]
    vocabulary = first + count
    yield Tensor("token_embd.weight", (_WIDTH, vocabulary), TensorType.F16, b"".join(embedding))
    yield Tensor("output.weight", (_WIDTH, vocabulary), TensorType.F16, b"".join(output))
    yield _vector("output_norm", _LOGIT / _WIDTH)
    yield _vector("blk.0.attn_norm", 1.0)
    yield _vector("blk.0.ffn_norm", 1.0)
    for layer, inner, outer in (
        ("attn_q", _WIDTH, _WIDTH),
        ("attn_k", _WIDTH, _HEAD),
        ("attn_v", _WIDTH, _HEAD),
        ("attn_output", _WIDTH, _WIDTH),
        ("ffn_gate", _WIDTH, _FEED_FORWARD),
        ("ffn_up", _WIDTH, _FEED_FORWARD),
        ("ffn_down", _FEED_FORWARD, _WIDTH),
    ):
        yield Tensor(f"blk.0.{layer}.weight", (inner, outer), TensorType.F16, bytes(2 * inner * outer))


def _vector(name: str, value: float) -> Tensor:
    return Tensor(f"{name}.weight", (_WIDTH,), TensorType.F32, struct.pack("<f", value) * _WIDTH)
