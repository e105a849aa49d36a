"""A model is looked at in its registry: a few bytes tell what its memory follows from."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.test_registry_pull import node
from tests.registries import Answer, Asked, RegistryDouble, ranged

from ollama_distributed.adapters.egress.client import EgressClient
from ollama_distributed.adapters.registry.service import Registries
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import (
    Forbidden,
    InvalidModel,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.distribution.looking import STEPS, Looking
from ollama_distributed.models.gguf import architecture_of, read_header
from ollama_distributed.models.gguf_writer import U32, StringArray, Tensor, TensorType, Value, write_gguf
from ollama_distributed.models.spec import ModelSpec

pytestmark = pytest.mark.integration

NUMBERS: dict[str, Value] = {
    "llama.block_count": U32(16),
    "llama.context_length": U32(131_072),
    "llama.embedding_length": U32(2048),
    "llama.attention.head_count": U32(32),
    "llama.attention.head_count_kv": U32(8),
}
WORDS = 120_000


def model(*, vocabulary_first: bool = False, behind: int = 1 << 20) -> bytes:
    """Its header takes 2 MB; `behind`: more bytes after it."""
    vocabulary: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": StringArray(b"token%06d" % number for number in range(WORDS)),
        "general.file_type": U32(15),
    }
    first, second = (vocabulary, NUMBERS) if vocabulary_first else (NUMBERS, vocabulary)
    tensor = Tensor("output.weight", (8,), TensorType.F32, struct.pack("<8f", *range(8)))
    gguf = write_gguf({"general.architecture": "llama", **first, **second}, [tensor])
    return gguf + random.Random(1).randbytes(behind)


MODEL = model()


@pytest.fixture
async def server() -> AsyncIterator[RegistryDouble]:
    async with RegistryDouble().listening() as double:
        yield double


async def look(server: RegistryDouble, name: str, folder: Path, **site: object) -> tuple[ModelSpec, int]:
    sites = Sites([RegistrySite(host=server.host, insecure=True, private=True, **site)])  # type: ignore[arg-type]

    async def take(_: int) -> None:
        return

    async with EgressClient(sites.for_egress()) as egress:
        registries = Registries(
            egress, sites, RequestSigner(folder / "key"), SystemClock(), streams=lambda: 1, take=take
        )
        return await Looking(registries).look(name)


async def test_a_few_bytes_tell_what_a_pull_would(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", MODEL, license=b"x" * 1000)
    name = f"{server.host}/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M"
    spec, count = await look(server, name, tmp_path)
    assert count <= 4096 + STEPS[0]
    assert len(MODEL) > 40 * STEPS[0]
    sent = sum(server.sent.values())
    assert sent <= 4096 + STEPS[0]
    assert (spec.name, spec.size_bytes, spec.weights_bytes) == (name, manifest.size_bytes, len(MODEL))
    whole = architecture_of(read_header(MODEL))
    numbers = spec.architecture
    assert (numbers.layers, numbers.heads, numbers.kv_heads, numbers.context_tokens, numbers.vocabulary) == (
        whole.layers,
        whole.heads,
        whole.kv_heads,
        whole.context_tokens,
        WORDS,
    )
    assert (numbers.key_length, numbers.embedding_length) == (whole.key_length, whole.embedding_length)
    async with node(tmp_path / "store", server) as one:
        await one.pull(name)
        assert (await one.catalog.resolve(name)).digest == spec.digest


async def test_numbers_behind_the_vocabulary_are_read_too(tmp_path: Path, server: RegistryDouble) -> None:
    """As far as it takes, and in few questions."""
    server.add("me/x:v1", model(vocabulary_first=True, behind=8 << 20))
    spec, count = await look(server, f"{server.host}/me/x:v1", tmp_path)
    assert (spec.architecture.layers, spec.architecture.vocabulary) == (16, WORDS)
    assert count < 4097 + (4 << 20)
    assert len([path for path in server.paths() if "/blobs/" in path]) == 3


async def test_a_server_without_ranges_is_left_in_the_middle(tmp_path: Path, server: RegistryDouble) -> None:
    manifest = server.add("me/x:v1", model(vocabulary_first=True, behind=30 << 20))
    server.hook = lambda asked: (
        Answer(200, server.blobs[asked.path.rpartition("/")[2]], pause_s=0.001)
        if "/blobs/" in asked.path
        else None
    )
    spec, _ = await look(server, f"{server.host}/me/x:v1", tmp_path)
    assert spec.architecture.layers == 16
    assert server.sent[manifest.layers[0].digest] < 24 << 20


async def test_the_file_lies_elsewhere(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/x:v1", MODEL)
    async with RegistryDouble().listening() as cdn:
        cdn.hook = lambda asked: ranged(MODEL, asked)
        server.hook = lambda asked: (
            Answer(307, headers={"location": f"http://{cdn.host}/file"}) if "/blobs/" in asked.path else None
        )
        spec, _ = await look(server, f"{server.host}/me/x:v1", tmp_path, auth_hosts=(cdn.host,))
    assert spec.architecture.layers == 16


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("evil.example/a/b", Forbidden, r"add `\{host: evil\.example\}`"),
        ("../x", InvalidName, "invalid model name"),
        ("{host}/me/none", ModelNotFound, "file does not exist"),
        ("{host}/me/adapter:v1", InvalidModel, "holds no model"),
        ("{host}/me/noise:v1", InvalidModel, "GGUF"),
        ("{host}/me/short:v1", InvalidModel, "cut short"),
    ],
)
async def test_what_cannot_be_looked_at(
    tmp_path: Path, server: RegistryDouble, name: str, error: type[OllamaDistributedError], says: str
) -> None:
    manifest = server.add("me/adapter:v1", MODEL)
    server.manifests["me/adapter:v1"] = server.manifests["me/adapter:v1"].replace(
        b"image.model", b"image.adapter"
    )
    assert manifest.layers
    server.add("me/noise:v1", random.Random(2).randbytes(100_000))
    server.add("me/short:v1", MODEL[:200])
    with pytest.raises(error, match=says):
        await look(server, name.format(host=server.host), tmp_path)


async def test_registries_that_lie_or_are_away(tmp_path: Path, server: RegistryDouble) -> None:
    server.add("me/x:v1", MODEL)

    def other_bytes(asked: Asked) -> Answer | None:
        if "/blobs/" not in asked.path:
            return None
        return Answer(206, MODEL[: STEPS[0]], {"content-range": f"bytes 5-{STEPS[0] + 4}/{len(MODEL)}"})

    server.hook = other_bytes
    with pytest.raises(RegistryError, match="other bytes"):
        await look(server, f"{server.host}/me/x:v1", tmp_path)
    server.hook = lambda asked: (
        Answer(206, b"GGUF", {"content-range": f"bytes 0-{STEPS[0] - 1}/{len(MODEL)}"})
        if "/blobs/" in asked.path
        else None
    )
    with pytest.raises(RegistryError, match="early"):
        await look(server, f"{server.host}/me/x:v1", tmp_path)
    server.hook = lambda _: Answer(503)
    with pytest.raises(Unavailable):
        await look(server, f"{server.host}/me/x:v1", tmp_path)
