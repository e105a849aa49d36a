"""What fuzzing begins with: `python -m tests.fuzz.seeds` writes it to `corpus/`.

One file for each flaw that readers of the same formats had (security table, row C), small good ones,
and `mutants`: good files with one field of each place replaced by each number that arithmetic fears.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ollama_distributed.models.gguf_writer import U32, F32Array, I32Array, StringArray, TensorType, write_gguf
from ollama_distributed.models.gguf_writer import Tensor as Written
from ollama_distributed.models.gguf_writer import Value as Writable
from tests.fuzz.callers import KEY, KEY_TOKEN, SESSION, STALE_TOKENS, TOKEN

CORPUS = Path(__file__).parent / "corpus"
_U8, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 0, 4, 5, 6, 7, 8, 9, 10
_FEARED = (0, 1, 0x7F, 0x80, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

# ── GGUF ────────────────────────────────────────────────────────────────────────────


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _pair(key: bytes, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _u32(key: bytes, value: int) -> bytes:
    return _pair(key, _U32, struct.pack("<I", value))


def _array(key: bytes, kind: int, count: int, values: bytes) -> bytes:
    return _pair(key, _ARRAY, struct.pack("<IQ", kind, count) + values)


def _tensor(name: bytes, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_LLAMA = (
    _pair(b"general.architecture", _STRING, _text(b"llama")),
    _u32(b"llama.block_count", 2),
    _u32(b"llama.context_length", 128),
    _u32(b"llama.embedding_length", 64),
    _u32(b"llama.attention.head_count", 4),
)
_TENSORS = (_tensor(b"a", (32, 4), 8), _tensor(b"b", (8,), 0, 160))


def _gguf(
    pairs: Sequence[bytes] = _LLAMA,
    tensors: Sequence[bytes] = _TENSORS,
    *,
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    data: int = 192,
) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def _model() -> bytes:
    """As a converter writes one, with a vocabulary and a template."""
    metadata: dict[str, Writable] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": U32(1),
        "llama.context_length": U32(64),
        "llama.embedding_length": U32(32),
        "llama.attention.head_count": U32(2),
        "llama.attention.head_count_kv": U32(1),
        "llama.rope.freq_base": 10000.0,
        "general.file_type": U32(1),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": StringArray((b"<unk>", b"<0xF0>", "Ġé".encode(), b"a")),
        "tokenizer.ggml.scores": F32Array((0.0, -1.0, -2.0, -3.0)),
        "tokenizer.ggml.token_type": I32Array((2, 6, 1, 1)),
        "tokenizer.chat_template": "{{ messages[0].content }}<think></think>{% if tools %}x{% endif %}",
        "tokenizer.ggml.add_bos_token": True,
    }
    return write_gguf(metadata, [Written("token_embd.weight", (32, 1), TensorType.F32, bytes(128))])


GGUF_GOOD: Mapping[str, bytes] = {
    "good-llama": _gguf(),
    "good-version-2": _gguf(version=2),
    "good-model": _model(),
    "good-projector": _gguf(
        [
            _pair(b"general.architecture", _STRING, _text(b"clip")),
            _pair(b"clip.has_audio_encoder", _BOOL, b"\1"),
            _u32(b"clip.vision.block_count", 2),
        ]
    ),
    "good-embedder": _gguf(
        [
            _pair(b"general.architecture", _STRING, _text(b"bert")),
            _u32(b"bert.block_count", 1),
            _u32(b"bert.pooling_type", 1),
            _u32(b"bert.attention.head_count", 0),
            _array(b"bert.attention.head_count_kv", _I32, 2, struct.pack("<2i", 1, 2)),
        ]
    ),
}
GGUF_HOSTILE: Mapping[str, bytes] = {
    # Ollama
    "cve-2024-39720-four-bytes": b"GGUF",
    "cve-2024-12055-out-of-bounds": _gguf()[:200],
    "cve-2025-0312-no-architecture": _gguf([_u32(b"llama.block_count", 2)]),
    "cve-2025-0315-huge-count-of-tensors": _gguf(tensor_count=1 << 40),
    "cve-2025-0315-huge-array": _gguf([*_LLAMA, _array(b"a", _U32, 1 << 60, b"")]),
    "cve-2025-0317-no-blocks": _gguf([_LLAMA[0], _u32(b"llama.block_count", 0), *_LLAMA[2:]]),
    "cve-2024-8063-alignment-zero": _gguf([*_LLAMA, _u32(b"general.alignment", 0)]),
    # llama.cpp
    "cve-2024-21802-five-dimensions": _gguf(tensors=[_tensor(b"a", (1, 1, 1, 1, 1))]),
    "cve-2024-23605-count-of-pairs": _gguf(pair_count=(1 << 64) - 1),
    "cve-2024-23605-elements-wrap": _gguf(tensors=[_tensor(b"a", (1 << 32, 1 << 32))]),
    "cve-2025-53630-sizes-wrap": _gguf(
        tensors=[_tensor(b"a", ((1 << 61) - 8,), 0), _tensor(b"b", ((1 << 61) - 8,), 0, (1 << 63) - 32)]
    ),
    "cve-2026-33298-bytes-wrap": _gguf(tensors=[_tensor(b"a", (1 << 62,), 28)]),
    "oss-sec-2026-05-alignment-2-31": _gguf([*_LLAMA, _u32(b"general.alignment", 1 << 31)]),
    # by kind
    "offset-past-the-end": _gguf(tensors=[_tensor(b"a", (8,), 0, 1 << 40)]),
    "offset-wraps": _gguf(tensors=[_tensor(b"a", (8,), 0, (1 << 64) - 32)]),
    "offset-not-aligned": _gguf(tensors=[_tensor(b"a", (8,), 0, 8)]),
    "tensors-overlap": _gguf(tensors=[_tensor(b"a", (32,)), _tensor(b"b", (8,), 0, 32)]),
    "tensor-twice": _gguf(tensors=[_tensor(b"a", (8,)), _tensor(b"a", (8,), 0, 32)]),
    "dimension-zero": _gguf(tensors=[_tensor(b"a", (0, 8))]),
    "block-does-not-fit": _gguf(tensors=[_tensor(b"a", (31,), 8)]),
    "tensor-of-no-type": _gguf(tensors=[_tensor(b"a", (8,), 999)]),
    "tensor-name-too-long": _gguf(tensors=[_tensor(b"a" * 64, (8,))]),
    "tensor-name-claims-more": _gguf(tensors=[struct.pack("<Q", 1 << 63)]),
    "alignment-not-a-power": _gguf([*_LLAMA, _u32(b"general.alignment", 48)]),
    "alignment-of-text": _gguf([*_LLAMA, _pair(b"general.alignment", _STRING, _text(b"32"))]),
    "huge-string": _gguf([_pair(b"general.architecture", _STRING, struct.pack("<Q", (1 << 64) - 1))]),
    "huge-key": _gguf([struct.pack("<Q", 1 << 62)]),
    "array-in-array": _gguf([*_LLAMA, _array(b"a", _ARRAY, 1, struct.pack("<IQ", _U8, 1) + b"\0")]),
    "array-of-no-type": _gguf([*_LLAMA, _array(b"a", 99, 1, b"\0")]),
    "strings-claim-more": _gguf([*_LLAMA, _array(b"a", _STRING, 1, struct.pack("<Q", 1 << 63))]),
    "value-of-no-type": _gguf([_pair(b"a", 99, b"")]),
    "key-twice": _gguf([*_LLAMA, _LLAMA[1]]),
    "key-with-control-characters": _gguf([_u32(b"a\x1b[2J", 1)]),
    "key-not-utf-8": _gguf([_u32(b"\xff\xfe", 1)]),
    "bool-of-two": _gguf([*_LLAMA, _pair(b"a", _BOOL, b"\2")]),
    "big-endian": _gguf(version=3 << 24),
    "version-1": _gguf(version=1),
    "another-format": b"GGML" + bytes(100),
    "empty": b"",
}
"""Refused, all of them, by the reader or by who reads the numbers of a model."""
GGUF_ODD: Mapping[str, bytes] = {
    "floats-that-are-none": _gguf([*_LLAMA, _pair(b"a", _F32, struct.pack("<f", float("nan")))]),
    "largest-numbers": _gguf(
        [
            _LLAMA[0],
            _u32(b"llama.block_count", 4096),
            _u32(b"llama.embedding_length", (1 << 31) - 1),
            _u32(b"llama.attention.head_count", (1 << 31) - 1),
            _u32(b"llama.attention.key_length", (1 << 31) - 1),
            _u32(b"llama.context_length", (1 << 31) - 1),
            _pair(b"general.parameter_count", _U64, struct.pack("<Q", (1 << 64) - 1)),
        ]
    ),
    "vocabulary-of-nonsense": _gguf(
        [
            *_LLAMA,
            _array(b"tokenizer.ggml.tokens", _STRING, 2, _text(b"zz") + _text(b"<0xZZ>")),
            _array(b"tokenizer.ggml.token_type", _F32, 2, struct.pack("<2f", float("inf"), 6.0)),
        ]
    ),
    "byte-tokens-of-nonsense": _gguf(
        [
            *_LLAMA,
            _array(b"tokenizer.ggml.tokens", _STRING, 2, _text(b"zz") + _text(b"<0xZZ>")),
            _array(b"tokenizer.ggml.token_type", _I32, 2, struct.pack("<2i", 6, 6)),
        ]
    ),
}
"""Read, whatever they say."""


def mutants(good: bytes) -> Iterator[bytes]:
    """The file cut short at each place, and each place with each feared number; the same each time."""
    for place in range(0, len(good), 8):
        yield good[:place]
    for place in range(4, len(good) - 8, 4):
        for number in _FEARED:
            yield good[:place] + struct.pack("<Q", number) + good[place + 8 :]
    chance = random.Random(0)
    for _ in range(200):
        changed = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        yield bytes(changed)


# ── manifests ───────────────────────────────────────────────────────────────────────

_DIGEST = "sha256:" + "0123456789abcdef" * 4
_CONFIG = (
    f'"config":{{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"{_DIGEST}","size":9}}'
)


def _manifest(layers: str = "", config: str = _CONFIG) -> bytes:
    return f'{{"schemaVersion":2,"mediaType":"m",{config},"layers":[{layers}]}}'.encode()


def _layer(digest: str = _DIGEST, size: str = "1", media: str = "application/vnd.ollama.image.model") -> str:
    return f'{{"mediaType":"{media}","digest":"{digest}","size":{size},"from":"/a"}}'


MANIFEST: Mapping[str, bytes] = {
    "good": _manifest(_layer()),
    "good-two": _manifest(f"{_layer()},{_layer(media='application/vnd.ollama.image.params')}"),
    "good-config": b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],'
    b'"model_type":"1B","file_type":"Q4_0","capabilities":["tools"],"context_length":4096,"os":"linux"}',
    "good-parameters": b'{"temperature":0.5,"stop":["a","b"],"num_ctx":4096,"use_mmap":true,"mirostat":1}',
    "good-messages": b'[{"role":"user","content":"hi"},{"role":"assistant","content":"\\u00e9"}]',
    "cve-2024-37032-digest-climbs": _manifest(_layer("sha256:../../../../etc/passwd")),
    "cve-2024-37032-digest-in-parts": _manifest(_layer(_DIGEST[:-4] + "/../")),
    "cve-2025-1975-no-layers": _manifest(),
    "cve-2025-1975-no-config": b'{"schemaVersion":2,"layers":[]}',
    "size-below-zero": _manifest(_layer(size="-1")),
    "size-of-2-70": _manifest(_layer(size=str(1 << 70))),
    "size-of-many-digits": _manifest(_layer(size="9" * 5000)),
    "size-of-half": _manifest(_layer(size="0.5")),
    "sizes-together": _manifest(",".join([_layer(size=str(1 << 50))] * 20)),
    "digest-escaped": _manifest(_layer("sha256\\u003a" + "0123456789abcdef" * 4)),
    "digest-in-capitals": _manifest(_layer(_DIGEST.upper())),
    "not-utf-8": _manifest(_layer(media="\xff")).replace("ÿ".encode(), b"\xff"),
    "half-a-surrogate": _manifest(_layer(media="\\ud800")),
    "nested": b"[" * 5000,
    "nested-parameters": b'{"stop":' + b"[" * 5000,
    "key-twice": _manifest(_layer()).replace(b'"layers"', b'"layers":[],"layers"'),
    "config-of-2-70": b'{"context_length":1180591620717411303424}',
    "parameters-of-2-70": b'{"num_ctx":1180591620717411303424,"x":1e308,"y":-9223372036854775809}',
    "parameters-not-utf-8": b'{"stop":"\xff\xfe"}',
    "empty": b"",
    "null": b"null",
}

# ── Modelfiles ──────────────────────────────────────────────────────────────────────

MODELFILE: Mapping[str, bytes] = {
    "good": b"FROM llama3\nPARAMETER temperature 0.5\nPARAMETER stop a\nPARAMETER stop b\nSYSTEM Be brief.\n",
    "good-long": b"# a model\nFROM ./a.gguf\nADAPTER ./b.gguf\n"
    b'TEMPLATE """{{ .Prompt }}\n{{ .Response }}"""\nLICENSE """one\n"two"\n"""\n'
    b'MESSAGE user "hi\nthere"\nMESSAGE assistant yes\nREQUIRES v0.1.2\n',
    "quotes-never-closed": b'FROM a\nSYSTEM """x\ny\n',
    "quotes-in-quotes": b'FROM a\nSYSTEM """x"""" \nSYSTEM """a\n""\n"\n"""\n',
    "quotes-at-the-end-of-a-line": 'FROM a\nSYSTEM """x"""\u200b\nFROM evil\n"""\n'.encode(),
    "from-over-lines": b'FROM """a\nSYSTEM b"""\n',
    "carriage-returns": b"FROM a\rSYSTEM b\r\nSYSTEM c\n",
    "byte-order-mark": "\ufeffFROM a\n".encode(),
    "unprintable": b"FROM a\x00\x1b[2Jb\nSYSTEM \xc2\xa0x\xe2\x80\x8b\n",
    "not-utf-8": b"FROM \xff\xfe\nSYSTEM \xed\xa0\x80\n",
    "numbers": b"FROM a\nPARAMETER top_p 1e999\nPARAMETER seed 0x10\n",
    "number-of-20-digits": b"FROM a\nPARAMETER num_ctx 99999999999999999999\n",
    "many-digits": b"FROM a\nPARAMETER num_ctx " + b"9" * 5000 + b"\n",
    "no-argument": b"FROM",
    "unknown-command": b"FROM a\nRUN rm -rf /\n",
    "unknown-role": b"FROM a\nMESSAGE tool x\n",
    "option-with-quotes": b'FROM a\nPARAMETER "stop" x\n',
    "empty": b"",
}

# ── Authorization ───────────────────────────────────────────────────────────────────

_UNSIGNED = "eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0." + TOKEN.split(".")[1]

AUTHORIZATION: Mapping[str, bytes] = {
    "key": f"Bearer {KEY}".encode(),
    "key-alone": KEY.encode(),
    "key-lower-case-scheme": f"bearer   {KEY} ".encode(),
    "key-mistyped": f"Bearer {KEY[:-1]}!".encode(),
    "key-not-ascii": f"Bearer {KEY[:-1]}".encode() + b"\xff",
    "key-with-newline": f"Bearer {KEY}\n".encode(),
    "key-with-zero": f"Bearer {KEY}\0".encode(),
    "session": f"Bearer {SESSION}".encode(),
    "session-alone": SESSION.encode(),
    "session-mistyped": f"Bearer {SESSION}A".encode(),
    "token": f"Bearer {TOKEN}".encode(),
    "token-alone": TOKEN.encode(),
    "token-of-a-key": f"Bearer {KEY_TOKEN}".encode(),
    **{f"token-stale-{number}": f"Bearer {token}".encode() for number, token in enumerate(STALE_TOKENS)},
    "token-unsigned": f"Bearer {_UNSIGNED}.".encode(),
    "token-with-no-signature": f"Bearer {_UNSIGNED}.{'A' * 86}".encode(),
    "token-of-four-parts": f"Bearer {TOKEN}.x".encode(),
    "token-padded": f"Bearer {TOKEN}==".encode(),
    "token-of-a-megabyte": b"Bearer eyJ" + b"A" * 4000 + b"." + b"A" * 4000 + b"." + b"A" * 86,
    "token-nested": f"Bearer eyJ{'W1tb' * 900}.e30.{'A' * 86}".encode(),
    "basic": b"Basic YWRtaW46YWRtaW4=",
    "digest": b'Digest username="a", realm="b", nonce="c", uri="/", response="d"',
    "bearer-alone": b"Bearer",
    "bearer-twice": f"Bearer Bearer {KEY}".encode(),
    "placeholder": b"Bearer ollama",
    "not-ascii": "Bearer ключ".encode(),
    "empty": b"",
}

SEEDS: Mapping[str, Mapping[str, bytes]] = {
    "gguf": {**GGUF_GOOD, **GGUF_HOSTILE, **GGUF_ODD},
    "manifest": MANIFEST,
    "modelfile": MODELFILE,
    "authorization": AUTHORIZATION,
}


def write() -> None:
    for target, files in SEEDS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    write()
