"""Manifests and configs: byte-equal to Ollama's, strict with everyone else's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models import manifest as media
from ollama_distributed.models.manifest import (
    Layer,
    Manifest,
    ModelConfig,
    encode_config,
    encode_manifest,
    go_json,
    named_blobs,
    parse_config,
    parse_manifest,
)
from ollama_distributed.models.names import BlobId

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64

# As `ollama create` wrote it (Go's encoder: field order, no spaces, a line end).
GOLDEN = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
    b'"config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"' + ONE.encode() +
    b'","size":412},"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"' + TWO.encode() +
    b'","size":91739,"from":"m.gguf"}]}\n'
)  # fmt: skip


def layer(digest: str = TWO, size: int = 1) -> dict[str, object]:
    return {"mediaType": media.MODEL, "digest": digest, "size": size}


def document(**changes: object) -> bytes:
    fields = {
        "schemaVersion": 2,
        "mediaType": media.MANIFEST_TYPE,
        "config": layer(ONE),
        "layers": [layer()],
    }
    return json.dumps(fields | changes).encode()


def test_reads_and_writes_ollamas_bytes() -> None:
    manifest = parse_manifest(GOLDEN)
    assert encode_manifest(manifest) == GOLDEN
    assert manifest.size_bytes == 412 + 91739
    assert manifest.blobs() == named_blobs(GOLDEN) == {BlobId("1" * 64), BlobId("2" * 64)}


digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda hex_: f"sha256:{hex_}")
layers = st.builds(
    Layer,
    media_type=st.sampled_from([media.MODEL, media.PARAMS, media.TEMPLATE]),
    digest=digests,
    size=st.integers(0, 1 << 50),
    from_=st.text(max_size=20),
    name=st.text(max_size=20),
)


@given(st.builds(Manifest, config=layers, layers=st.lists(layers, max_size=8).map(tuple)))
def test_what_is_written_reads_back(manifest: Manifest) -> None:
    written = encode_manifest(manifest)
    assert parse_manifest(written) == manifest
    assert json.loads(written)["layers"] is not None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"[" * 100_000, document(schemaVersion=1), document(config=None),
        document(layers=[layer("sha256:../../x")]), document(layers=[layer("1" * 64)]),
        document(layers=[layer(size=-1)]), document(layers=[layer(size=1 << 60)]), document(layers=[1]),
        document(layers=[layer()] * 20_000), document(x="y" * (5 << 20)),
    ],
    ids=str,
)  # fmt: skip
def test_cve_2025_1975_hostile_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidModel):
        parse_manifest(data)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for read in (parse_manifest, parse_config):
        try:
            read(noise)
        except InvalidModel:
            continue


def test_the_config_keeps_gos_omissions() -> None:
    config = ModelConfig(model_format="gguf", model_family="llama", model_families=("llama",))
    assert encode_config(config) == (
        b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"",'
        b'"file_type":"","architecture":"amd64","os":"linux"}\n'
    )
    assert parse_config(encode_config(config)) == config
    assert parse_config(b'{"model_families":null,"rootfs":{"type":"layers"}}').model_families is None


def test_a_digest_that_is_written_with_escapes_is_named() -> None:
    """Else what it needs would be taken for unused, and deleted."""
    escaped = GOLDEN.replace(b"sha256:1", b"sha256\\u003a1")
    assert escaped != GOLDEN
    assert named_blobs(escaped) == parse_manifest(escaped).blobs() == named_blobs(GOLDEN)


def test_html_is_escaped_as_go_does() -> None:
    assert go_json({"stop": ["<|im_end|>", "a&b\u2028"]}) == (
        b'{"stop":["\\u003c|im_end|\\u003e","a\\u0026b\\u2028"]}\n'
    )
