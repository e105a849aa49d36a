"""The GGUF reader: reads what is true, refuses every lie, never allocates by one."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.gguf import (
    Array,
    Header,
    NeedMore,
    architecture_of,
    capabilities_of,
    chat_template_of,
    human_number,
    kind_of,
    model_info,
    pooling_of,
    read_header,
    tensor_list,
    thinking_tags_of,
)
from ollama_distributed.models.gguf.types import TENSOR_TYPES, file_type_name

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def string(key: str, value: str) -> bytes:
    return pair(key, STRING, text(value))


def strings(key: str, values: Sequence[str], *, count: int | None = None) -> bytes:
    claimed = len(values) if count is None else count
    return pair(key, ARRAY, struct.pack("<IQ", STRING, claimed) + b"".join(text(value) for value in values))


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return text(name) + packed


LLAMA = [
    string("general.architecture", "llama"),
    u32("llama.block_count", 2),
    u32("llama.context_length", 128),
    u32("llama.embedding_length", 64),
    u32("llama.attention.head_count", 4),
    u32("llama.attention.head_count_kv", 2),
    u32("general.file_type", 15),
]
TENSORS = [tensor("a", (32, 4), 8, 0), tensor("b", (8,), 0, 160)]


def gguf(
    pairs: Sequence[bytes] = LLAMA,
    tensors: Sequence[bytes] = TENSORS,
    *,
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    data: int = 192,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)


def test_reads_a_header() -> None:
    file = gguf([*LLAMA, strings("tokenizer.ggml.tokens", ["x", "y"])])
    header = read_header(file)
    assert (header.version, header.alignment, header.file_size) == (3, 32, len(file))
    assert [(t.name, t.type.name, t.shape, t.size) for t in header.tensors] == [
        ("a", "Q8_0", (32, 4), 136),
        ("b", "F32", (8,), 32),
    ]
    assert header.data_offset + 192 == len(file)
    architecture = architecture_of(header)
    assert (architecture.name, architecture.layers, architecture.context_tokens) == ("llama", 2, 128)
    assert (architecture.heads, architecture.kv_heads, architecture.key_length) == (4, 2, 16)
    assert (architecture.parameters, architecture.file_type, architecture.vocabulary) == (136, "Q4_K_M", 2)
    assert tensor_list(header)[0] == {"name": "a", "type": "Q8_0", "shape": [32, 4]}


def test_version_2_is_read_and_others_are_not() -> None:
    assert read_header(gguf(version=2)).version == 2
    with pytest.raises(InvalidModel, match="version 1 is not supported"):
        read_header(gguf(version=1))
    with pytest.raises(InvalidModel, match="big-endian"):
        read_header(gguf(version=3 << 24))


def test_long_arrays_are_walked_and_kept_only_when_asked() -> None:
    tokens = [f"token{i}" for i in range(5_000)]
    file = gguf([*LLAMA, strings("tokenizer.ggml.tokens", tokens)])
    assert read_header(file).metadata["tokenizer.ggml.tokens"] == Array(5_000, None)
    kept = read_header(file, verbose=True)
    assert kept.metadata["tokenizer.ggml.tokens"] == Array(5_000, tuple(tokens))
    assert model_info(read_header(file))["tokenizer.ggml.tokens"] is None
    assert model_info(kept, verbose=True)["tokenizer.ggml.tokens"] == tokens


def test_a_prefix_of_the_file_is_enough_once_it_holds_the_header() -> None:
    file = gguf()
    whole = read_header(file)
    for cut in range(4, len(file)):
        if cut >= whole.data_offset:
            assert read_header(file[:cut], len(file)) == whole
            break
        try:
            assert read_header(file[:cut], len(file)) == whole
        except NeedMore:
            continue


def test_every_truncation_is_refused() -> None:
    file = gguf()
    for cut in range(len(file) - 1):
        if cut < read_header(file).data_offset + 160 + 32:
            with pytest.raises(InvalidModel):
                read_header(file[:cut])


# ── one for each CVE of the security table, row C, that has the form of a header ───────

CVES = {
    "CVE-2024-39720 four bytes only": b"GGUF",
    "CVE-2024-39720 magic and version only": b"GGUF\x03\0\0\0",
    "CVE-2024-12055 string longer than the file": gguf(
        [pair("general.architecture", STRING, struct.pack("<Q", 1 << 20) + b"llama")]
    ),
    "CVE-2024-12055 key of 2^64-1 bytes": gguf([struct.pack("<Q", (1 << 64) - 1) + b"k"]),
    "CVE-2025-0315 tensor count that allocates": gguf(tensor_count=(1 << 60)),
    "CVE-2025-0315 array count that allocates": gguf([*LLAMA, strings("x", ["y"], count=1 << 61)]),
    "CVE-2025-0312 null architecture": gguf([u32("general.architecture", 0), *LLAMA[1:]]),
    "CVE-2025-0312 no architecture": gguf(LLAMA[1:]),
    "CVE-2025-0317 zero blocks": gguf([LLAMA[0], u32("llama.block_count", 0), *LLAMA[2:]]),
    "CVE-2024-8063 zero in a shape": gguf(tensors=[tensor("a", (0, 4))]),
    "CVE-2024-8063 alignment zero": gguf([*LLAMA, u32("general.alignment", 0)]),
    "CVE-2026-7482 tensor past the end": gguf(tensors=[tensor("a", (32, 4), 8, 1 << 20)]),
    "CVE-2026-7482 tensor larger than the file": gguf(tensors=[tensor("a", (32, 1 << 30), 8, 0)]),
    "CVE-2026-7482 offset that wraps round": gguf(tensors=[tensor("a", (8,), 0, (1 << 64) - 32)]),
    "CVE-2024-21802 unknown tensor type": gguf(tensors=[tensor("a", (32,), 4, 0)]),
    "CVE-2024-21802 tensor type out of the table": gguf(tensors=[tensor("a", (32,), 0xFFFFFFFF, 0)]),
    "CVE-2024-23605 metadata count": gguf(pair_count=(1 << 61) + 1),
    "CVE-2024-23605 shape product wraps to a small one": gguf(tensors=[tensor("a", (1 << 32, 1 << 32, 32))]),
    "CVE-2026-33298 byte count overflows": gguf(tensors=[tensor("a", (1 << 62,), 0)]),
    "CVE-2025-53630 sizes that wrap when padded": gguf(tensors=[tensor("a", ((1 << 61) - 1, 2), 24)]),
    "oss-sec-2026-05 alignment overflow": gguf([*LLAMA, u32("general.alignment", 1 << 31)]),
    "oss-sec-2026-05 alignment no power of two": gguf([*LLAMA, u32("general.alignment", 48)]),
    "CVE-2025-49847 token longer than 2 GiB": gguf(
        [*LLAMA, pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 31))]
    ),
    "CVE-2025-52566 token count negative": gguf(
        [*LLAMA, pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 1 << 63))]
    ),
    "row C: tensors overlap": gguf(tensors=[tensor("a", (32, 4), 8, 0), tensor("b", (8,), 0, 128)]),
    "row C: tensor twice": gguf(tensors=[tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)]),
    "row C: key twice": gguf([*LLAMA, LLAMA[-1]]),
    "row C: nested array": gguf([*LLAMA, pair("x", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
    "row C: unknown value type": gguf([*LLAMA, pair("x", 13, b"\0" * 8)]),
    "row C: five dimensions": gguf(tensors=[tensor("a", (1, 1, 1, 1, 1))]),
    "row C: 2^32 dimensions": gguf(tensors=[text("a") + struct.pack("<I", 0xFFFFFFFF)]),
    "row C: offset not aligned": gguf(tensors=[tensor("a", (8,), 0, 4)]),
    "row C: row is no multiple of the block": gguf(tensors=[tensor("a", (31, 4), 8)]),
    "row C: bool that is none": gguf([*LLAMA, pair("x", BOOL, b"\2")]),
    "row C: tensor name too long": gguf(tensors=[tensor("a" * 64, (8,))]),
    "row C: no tensors": gguf(tensors=[]),
    "row C: not GGUF": b"PK\3\4" + bytes(100),
    "row C: empty": b"",
    "row C: head count is a text": gguf([*LLAMA[:4], string("llama.attention.head_count", "4")]),
    "row C: head count is negative": gguf(
        [*LLAMA[:4], pair("llama.attention.head_count", 5, struct.pack("<i", -1))]
    ),
    "row C: key is not UTF-8": gguf([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("file", CVES.values(), ids=[name.replace(" ", "_") for name in CVES])
def test_hostile_headers_are_refused_with_a_reason(file: bytes) -> None:
    """S-03: each by its CVE, before any runner sees the file."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidModel) as refused:
            architecture_of(read_header(file))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) > 10
    assert peak < 1 << 20, "a lying count allocated"


def test_a_count_that_fits_the_file_but_not_a_header_is_refused() -> None:
    """A 'file' of 1 TiB may claim 2^36 strings: the header's own limit stops it."""
    file = gguf([*LLAMA, strings("x", ["y"], count=1 << 36)])
    with pytest.raises(InvalidModel, match="elements, more than the header can hold"):
        read_header(file, 1 << 40)


def test_a_token_of_megabytes_is_refused_also_when_it_is_only_walked_over() -> None:
    file = gguf([*LLAMA, strings("tokenizer.ggml.tokens", ["x" * (5 << 20), *["y"] * 2_000])])
    with pytest.raises(InvalidModel, match="has a string that claims"):
        read_header(file)


def _use(header: Header) -> None:
    """Everything that the node does with a header."""
    kind_of(header)
    architecture_of(header)
    pooling_of(header)
    capabilities_of(header, chat_template=chat_template_of(header))
    model_info(header, verbose=True)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_mutants_are_read_or_refused_never_worse(data: st.DataObject) -> None:
    file = bytearray(gguf([*LLAMA, strings("tokenizer.ggml.tokens", ["a", "b"])]))
    header_end = len(file) - 192
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(4, header_end - 1))
        match data.draw(st.sampled_from(["byte", "u32", "u64", "delete", "insert"])):
            case "byte":
                file[where] = data.draw(st.integers(0, 255))
            case "u32":
                file[where : where + 4] = struct.pack("<I", data.draw(st.integers(0, (1 << 32) - 1)))
            case "u64":
                file[where : where + 8] = struct.pack("<Q", data.draw(st.integers(0, (1 << 64) - 1)))
            case "delete":
                del file[where : where + data.draw(st.integers(1, 16))]
            case "insert":
                file[where:where] = data.draw(st.binary(min_size=1, max_size=16))
        header_end = max(5, min(header_end, len(file) - 1))
    try:
        header = read_header(bytes(file), verbose=True)
        _use(header)
    except InvalidModel:
        return
    for one in header.tensors:
        assert header.data_offset + one.offset + one.size <= len(file)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_noise_behind_the_magic_is_refused(noise: bytes) -> None:
    try:
        _use(read_header(b"GGUF\x03\0\0\0" + noise))
    except InvalidModel:
        return
    pytest.fail("noise was taken for a model")


def test_a_vocabulary_of_150k_tokens_is_read_as_fast_as_a_plain_loop() -> None:
    """Less than ten times as slow; a ratio, since machines differ and coverage slows Python down.
    `gguf.GGUFReader` takes a hundred times as long."""
    file = gguf(
        [
            *LLAMA,
            strings("tokenizer.ggml.tokens", [f"tok{i}" for i in range(150_000)]),
            strings("tokenizer.ggml.merges", [f"a{i} b" for i in range(150_000)]),
        ]
    )
    reading, looping = [], []
    for _ in range(3):
        began = time.thread_time()
        read_header(file)
        reading.append(time.thread_time() - began)
        began = time.thread_time()
        for at in range(300_000):
            struct.unpack_from("<Q", file, at)
        looping.append(time.thread_time() - began)
    assert min(reading) < 10 * min(looping)


# ── facts ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "shown"),
    [(134_515_008, "134.52M"), (8_030_261_248, "8.0B"), (7_000_000_000, "7B"), (999, "999"), (1_500, "2K"),
     (1_000_000, "1M"), (0, "0")],
)  # fmt: skip
def test_sizes_print_as_ollama_prints_them(count: int, shown: str) -> None:
    assert human_number(count) == shown


@pytest.mark.parametrize(
    ("number", "name"), [(0, "F32"), (1, "F16"), (2, "Q4_0"), (15, "Q4_K_M"), (18, "Q6_K"), (32, "BF16"),
                         (38, "MXFP4_MOE"), (4, "unknown"), (-1, "unknown"), (1024, "unknown")]
)  # fmt: skip
def test_file_types(number: int, name: str) -> None:
    assert file_type_name(number) == name


def test_tensor_types_agree_with_the_format() -> None:
    constants = pytest.importorskip("gguf.constants")
    for kind, (block, size) in constants.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # gguf-py counts 40 bytes; ggml's block_q8_1 is two halves and 32 bytes
            assert (TENSOR_TYPES[int(kind)].block, TENSOR_TYPES[int(kind)].size) == (block, size), kind


def header_of(*pairs: bytes) -> Header:
    return read_header(gguf(list(pairs)))


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ messages }}", {"completion"}),
        ("{% if tools %}", {"completion", "tools"}),
        ("{% if message.tool_calls %}", {"completion", "tools"}),
        ("<think>{{ x }}</think>", {"completion", "thinking"}),
        ("content.split('</think>')[-1]", {"completion", "thinking"}),
        ("{% if enable_thinking %}", {"completion", "thinking"}),
    ],
)
def test_capabilities_by_template(template: str, found: set[Any]) -> None:
    assert capabilities_of(header_of(*LLAMA), chat_template=template) == found


def test_capabilities_by_header() -> None:
    fill_in = [u32(f"tokenizer.ggml.fim_{part}_token_id", 1) for part in ("pre", "suf", "mid")]
    assert "insert" in capabilities_of(header_of(*LLAMA, *fill_in), chat_template="")
    assert "insert" in capabilities_of(header_of(*LLAMA), chat_template="", go_template="{{ .Suffix }}")
    mean, rank = u32("llama.pooling_type", 1), u32("llama.pooling_type", 4)
    assert capabilities_of(header_of(*LLAMA, mean), chat_template="") == {"embedding"}
    assert capabilities_of(header_of(*LLAMA, rank), chat_template="") == {"rerank"}
    projector = header_of(string("general.architecture", "clip"), pair("clip.has_audio_encoder", BOOL, b"\1"))
    assert kind_of(projector) == "projector"
    assert capabilities_of(header_of(*LLAMA), chat_template="", projectors=(projector,)) == {
        "completion",
        "vision",
        "audio",
    }
    assert kind_of(header_of(*LLAMA, string("general.type", "adapter"))) == "adapter"
    assert pooling_of(header_of(string("general.architecture", "bert"))) == "mean"


def test_thinking_tags() -> None:
    assert thinking_tags_of("<think>..</think>") == ("<think>", "</think>")
    assert thinking_tags_of("[THINK]..[/THINK]") == ("[THINK]", "[/THINK]")
    assert thinking_tags_of("plain") is None


def test_numbers_per_layer_count_by_their_largest() -> None:
    per_layer = pair("llama.attention.head_count_kv", ARRAY, struct.pack("<IQII", U32, 2, 1, 4))
    assert architecture_of(header_of(*LLAMA[:5], per_layer)).kv_heads == 4


def test_not_a_number_becomes_null() -> None:
    header = header_of(*LLAMA, pair("x", F32, struct.pack("<f", float("nan"))))
    assert model_info(header)["x"] is None
