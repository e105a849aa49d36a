"""Names and digests: Ollama's rules, and nothing hostile gets through."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import InvalidName
from ollama_distributed.models.names import BlobId, ModelName

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full", "display"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest", "llama3:latest"),
        ("llama3:8b", "registry.ollama.ai/library/llama3:8b", "llama3:8b"),
        ("me/llama3", "registry.ollama.ai/me/llama3:latest", "me/llama3:latest"),
        ("hf.co/me/m.gguf:Q4_K_M", "hf.co/me/m.gguf:Q4_K_M", "hf.co/me/m.gguf:Q4_K_M"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b:latest"),
        ("http://h:1/a/b:c", "h:1/a/b:c", "h:1/a/b:c"),
        ("Registry.Ollama.AI/Library/X:Y", "Registry.Ollama.AI/Library/X:Y", "X:Y"),
        ("_a", "registry.ollama.ai/library/_a:latest", "_a:latest"),
    ],
)
def test_names_are_read_as_ollama_reads_them(text: str, full: str, display: str) -> None:
    name = ModelName.parse(text)
    assert (str(name), name.display) == (full, display)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "a:", ":a", "/a", "a/", "a//b", "h//b", "/a/b", "//a", "-a", ".a", "a b", "a\n", "a\x00",
        "..", "../a", "a/../b", "a:../b", "a:..", "ns.dot/a", "a:b:c", "a@sha256:" + HEX,
        "@sha256:" + HEX,
        "sha256:" + HEX, "sha256-" + HEX, "x" * 81, "a:" + "t" * 81, "n" * 81 + "/a", "h" * 351 + "/n/a",
        "x" * 10_000, "é", "a%2e%2e", "a\\b", "a\u2024b", "://h/n/m", "http:///n/m", "a/b/c/d",
        "/etc/passwd", "file:///etc/passwd", "\u212a",
    ],
)  # fmt: skip
def test_hostile_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidName, match="invalid model name"):
        ModelName.parse(text)


@given(st.text(max_size=700) | st.text(string.ascii_letters + "./:@-_~%\\\x00", max_size=60))
def test_whatever_parses_is_four_safe_path_parts(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except InvalidName:
        return
    assert all(
        part and part[0] not in ".-/" and "/" not in part and "\x00" not in part for part in name.parts
    )
    assert ModelName.parse(str(name)).key == name.key
    assert ModelName.parse(name.display).key == name.key


def test_names_compare_without_case() -> None:
    assert ModelName.parse("LLaMA3:8B").key == ModelName.parse("llama3:8b").key


@pytest.mark.parametrize("separator", [":", "-"])
def test_both_spellings_of_a_digest(separator: str) -> None:
    blob = BlobId.parse(f"sha256{separator}{HEX}")
    assert (blob.digest, blob.filename) == (f"sha256:{HEX}", f"sha256-{HEX}")


# CVE-2024-37032: `../` in the place of a digest became a path.
@pytest.mark.parametrize(
    "text",
    ["sha256:../../etc/passwd", f"sha256:{HEX}/..", f"sha256:{HEX[:-1]}", f"sha256:{HEX}0", f"sha256:{HEX}\n",
     f"sha256_{HEX}", HEX, "sha256:" + HEX.upper(), f"md5:{HEX}", "", "sha256:" + "g" * 64],
)  # fmt: skip
def test_cve_2024_37032_only_a_digest_becomes_a_blob(text: str) -> None:
    with pytest.raises(InvalidName, match="invalid digest format"):
        BlobId.parse(text)


@given(st.text(max_size=80))
def test_no_other_door_makes_a_blob_id(text: str) -> None:
    try:
        blob = BlobId(text)
    except InvalidName:
        return
    assert len(blob.hex) == 64
    assert set(blob.hex) <= set("0123456789abcdef")
