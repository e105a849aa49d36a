"""The scripted model's file: every token different, the text whole, no piece a prompt could form."""

from __future__ import annotations

import io
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.models.gguf_writer import (
    U32,
    F32Array,
    I32Array,
    StringArray,
    Tensor,
    TensorType,
    write_gguf,
)
from ollama_distributed.models.scripted import script_pieces, scripted_model

WORDS = st.lists(st.text(min_size=1), min_size=1)


def read(path: Path, data: bytes) -> gguf.GGUFReader:
    path.write_bytes(data)
    return gguf.GGUFReader(path)


def strings(reader: gguf.GGUFReader, key: str) -> list[bytes]:
    field = reader.fields[key]
    return [bytes(field.parts[i]) for i in field.data]


@given(st.one_of(st.text(min_size=1), WORDS))
def test_the_pieces_are_the_script(script: str | list[str]) -> None:
    assert b"".join(script_pieces(script)) == "".join(script).encode()


@given(st.text(alphabet="ab <\u00e9", min_size=1, max_size=60))
def test_no_piece_can_be_formed_by_a_prompt(script: str) -> None:
    pieces = script_pieces(script)
    long = [piece for piece in pieces if len(piece) > 1]
    assert len(set(long)) == len(long)
    assert all(len(piece) >= 3 and piece.isascii() and b"<" not in piece for piece in long)


@pytest.mark.parametrize(
    ("script", "pieces"),
    [
        ("Hello big world", [b"Hello", b" big", b" world"]),
        ("the the", [b"the", b" the"]),
        ("no no", [b"n", b"o", b" no"]),
        (" the the the", [b" the", b" ", b"the", b" ", b"t", b"h", b"e"]),
        ("caf\u00e9", [b"caf", b"\xc3", b"\xa9"]),
        ("<think>", [b"<", b"think>"]),
        (["New York", " is"], [b"New York", b" is"]),
        ([b"abc"], [b"a", b"b", b"c"]),
    ],
)
def test_pieces(script: str | list[str | bytes], pieces: list[bytes]) -> None:
    assert script_pieces(script) == pieces


def test_the_vocabulary_has_no_text_twice(tmp_path: Path) -> None:
    reader = read(
        tmp_path / "m.gguf", scripted_model("the the the <s> <0x41> <|im_end|> \U0001f600\U0001f600")
    )
    tokens = strings(reader, "tokenizer.ggml.tokens")
    assert len(set(tokens)) == len(tokens)


def test_the_same_script_gives_the_same_bytes() -> None:
    assert scripted_model("stable text") == scripted_model("stable text")
    assert scripted_model("stable text") != scripted_model("stable test")


def test_small() -> None:
    assert len(scripted_model("a short answer")) < 300_000


def test_without_template(tmp_path: Path) -> None:
    assert (
        "tokenizer.chat_template"
        not in read(tmp_path / "m.gguf", scripted_model("x", chat_template="")).fields
    )


@pytest.mark.parametrize("script", ["", []])
def test_an_empty_script_is_refused(script: str | list[str]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        scripted_model(script)


def test_written_file_is_read_by_the_reference_reader(tmp_path: Path) -> None:
    data = write_gguf(
        {
            "general.architecture": "llama",
            "a.flag": True,
            "a.count": U32(7),
            "a.ratio": 0.5,
            "a.names": StringArray([b"x", b"\xff"]),
            "a.types": I32Array([1, -2]),
            "a.scores": F32Array([0.25, -1.0]),
        },
        [
            Tensor("one", (3,), TensorType.F32, bytes(12)),
            Tensor("two", (2, 3), TensorType.F16, bytes(range(12))),
        ],
    )
    reader = read(tmp_path / "m.gguf", data)
    assert reader.fields["a.count"].contents() == 7
    assert reader.fields["a.flag"].contents() is True
    assert reader.fields["a.ratio"].contents() == 0.5
    assert strings(reader, "a.names") == [b"x", b"\xff"]
    assert reader.fields["a.types"].contents() == [1, -2]
    assert reader.fields["a.scores"].contents() == [0.25, -1.0]
    assert [t.name for t in reader.tensors] == ["one", "two"]
    assert [list(t.shape) for t in reader.tensors] == [[3], [2, 3]]
    assert io.BytesIO(reader.tensors[1].data.tobytes()).read() == bytes(range(12))
