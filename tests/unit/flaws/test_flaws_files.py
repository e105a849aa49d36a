"""Published flaws of other products, each tried on ours in its own way: names, archives, pickles (S-01, S-02,
S-05). Those of GGUF headers are in `test_models_gguf.py`."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, gateway

from ollama_distributed.adapters.peers import wire
from ollama_distributed.base.errors import InvalidModel, InvalidName, OllamaDistributedError
from ollama_distributed.cluster.load import decode_load
from ollama_distributed.distribution.exchange import PieceAsk
from ollama_distributed.models import tar
from ollama_distributed.models.gguf import read_header
from ollama_distributed.models.manifest import parse_config, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.testing.inference import ScriptedInference

HEX = "ab" * 32
_gone_off: list[str] = []


def go_off(where: str) -> str:
    """What a pickle in these tests runs, if anybody opens it."""
    _gone_off.append(where)
    return where


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], str], tuple[str]]:
        return go_off, ("it ran",)


BOMBS = [pickle.dumps(_Bomb(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


def test_the_pickles_of_these_tests_would_run() -> None:
    for bomb in BOMBS:
        assert pickle.loads(bomb) == "it ran"
    assert len(_gone_off) == len(BOMBS)
    _gone_off.clear()


# ── names that are paths (S-01) ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "digest",
    [
        # Ollama, pull: the digest of a rogue registry's manifest was joined to the folder of blobs.
        pytest.param("sha256:../../../../../../etc/ld.so.preload", id="CVE-2024-37032"),
        # Ollama, pull: a file that was named so was deleted when its pull was given up.
        pytest.param("sha256:" + "0" * 58 + "/../..", id="CVE-2025-44779"),
        # Ollama, transfer: `digestToPath` of the newer code took the other spelling without a look.
        pytest.param("sha256-../../../../tmp/x", id="CVE-2026-7020"),
    ],
)
def test_a_digest_of_a_registry_is_no_path(digest: str) -> None:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1}
    config = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": f"sha256:{HEX}",
        "size": 1,
    }
    for document in ({"config": config, "layers": [layer]}, {"config": layer, "layers": []}):
        with pytest.raises(InvalidModel):
            parse_manifest(json.dumps({"schemaVersion": 2, **document}).encode())
    with pytest.raises(InvalidName):
        BlobId.parse(digest)


@pytest.mark.parametrize(
    "name",
    [
        # LocalAI, delete: `model` was joined to the folder of models.
        pytest.param("../../../../etc/passwd", id="CVE-2024-5182"),
        # Ollama, push: another error for a name that leads to a file than for one that does not.
        pytest.param("../../../../../../etc/hostname", id="CVE-2024-39722"),
        # Kraken: the encoded slash of a name was decoded behind the check.
        pytest.param("library/..%2f..%2f..%2fetc%2fpasswd:latest", id="CVE-2022-47747"),
    ],
)
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidName) as there:
        ModelName.parse(name)
    with pytest.raises(InvalidName) as nowhere:
        ModelName.parse(name.replace("etc", "nil"))
    assert str(nowhere.value).replace("nil", "etc") == str(there.value)


def test_cve_2025_59352_a_peer_asks_for_a_blob_not_for_a_file() -> None:
    """Dragonfly: a peer's request named the file that it wanted to read or write."""
    blob = "../../../../etc/shadow"
    ask = msgspec.msgpack.decode(
        wire.encode({"blob": blob, "table_id": b"", "offered": b"", "path": blob, "output": blob}),
        type=PieceAsk,
    )
    assert {field.name for field in msgspec.structs.fields(PieceAsk)} == {"blob", "table_id", "offered"}
    with pytest.raises(InvalidName):
        BlobId.parse(ask.blob)


# ── archives (S-02) ──────────────────────────────────────────────────────────────────


def archive(*members: tuple[str, bytes, Mapping[str, Any]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writer:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as writer:
        writer.writestr(name, b"x" * 2048)
    return out.getvalue()


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc"}


@pytest.mark.parametrize(
    "data",
    [
        # Ollama, create: a member of the archive climbed out and became a library of every program.
        pytest.param(archive(("../../../../../../etc/ld.so.preload", b"/tmp/e.so", {})), id="CVE-2024-45436"),
        # LocalAI, model gallery: out of the folder by way of one inside it.
        pytest.param(archive(("models/x/../../../../build/main", b"x", {})), id="CVE-2024-6868"),
        # k3s: the zip file of a snapshot.
        pytest.param(zipped("../../../../etc/cron.d/x"), id="CVE-2026-54250"),
        # Nomad, migration of an allocation: two members of one name, the first a link.
        pytest.param(archive(("f", b"", LINK), ("f", b"x", {})), id="CVE-2024-7625"),
        # Nomad, the same: a link to a folder, then a file below it.
        pytest.param(archive(("a", b"", LINK), ("a/cron.d/x", b"x", {})), id="CVE-2024-6717"),
    ],
)
def test_an_archive_leads_nowhere(data: bytes) -> None:
    def read() -> None:
        reader = tar.TarReader()
        list(reader.feed(data))
        reader.end()

    with pytest.raises(InvalidModel):
        read()


# ── bytes that become objects (S-05) ─────────────────────────────────────────────────

Door = Callable[[bytes], object]


@pytest.mark.parametrize(
    "door",
    [
        # vLLM with Mooncake: whatever came on the socket between nodes was unpickled.
        pytest.param(wire.decode_events, id="CVE-2025-32444"),
        # vLLM with Mooncake: and what came back.
        pytest.param(wire.decode_reply, id="CVE-2025-29783"),
        # vLLM: nodes subscribed to one another, and believed what was published.
        pytest.param(decode_load, id="CVE-2025-30165"),
        # vLLM, PyNcclPipe: what one node hands to another that goes on.
        pytest.param(lambda data: msgspec.msgpack.decode(data, type=wire.HandedAsk), id="CVE-2025-47277"),
        # LMDeploy: weights were read with torch.load.
        pytest.param(lambda data: read_header(data), id="CVE-2025-66455"),
    ],
)
def test_nobody_opens_a_pickle(door: Door) -> None:
    for bomb in BOMBS:
        for data in (bomb, wire.frame(bomb), bomb + b"\0" * 4096):
            with pytest.raises((OllamaDistributedError, msgspec.DecodeError)):
                door(data)
    assert not _gone_off


ENCODED = base64.b64encode(BOMBS[2]).decode()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        # BentoML: the body of a call was unpickled.
        pytest.param("/v1/embeddings", {}, BOMBS[2], id="CVE-2024-2912"),
        # BentoML: a media type said that it is a pickle.
        pytest.param(
            "/api/generate", {"content-type": "application/vnd.bentoml+pickle"}, BOMBS[4], id="CVE-2025-27520"
        ),
        # BentoML, runners: a header said what the body is.
        pytest.param(
            "/v1/chat/completions",
            {
                "args-number": "1",
                "payload-container": "NdarrayContainer",
                "payload-meta": '{"format":"pickle5"}',
            },
            BOMBS[4],
            id="CVE-2025-32375",
        ),
    ],
)
async def test_no_request_says_that_it_is_a_pickle(path: str, headers: dict[str, str], body: bytes) -> None:
    inference = ScriptedInference(HELLO)
    status, _, _ = await exchanged(gateway(inference), "POST", path, headers, body=body)
    assert status in (400, 415)
    assert not inference.requests
    assert not _gone_off


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        # vLLM, completions: vectors in place of a prompt went through torch.load.
        pytest.param({"prompt_embeds": ENCODED}, id="CVE-2025-62164"),
        # vLLM: the mend was a switch, and beside a prompt it was not asked.
        pytest.param({"prompt": "p", "prompt_embeds": [ENCODED]}, id="CVE-2026-56340"),
    ],
)
async def test_a_prompt_is_a_text(fields: dict[str, Any]) -> None:
    inference = ScriptedInference(HELLO)
    body = json.dumps({"model": "m", **fields}).encode()
    await exchanged(gateway(inference), "POST", "/v1/completions", {}, body=body)
    assert ENCODED not in repr(inference.requests)
    assert not _gone_off


def test_cve_2025_66448_a_model_names_no_code() -> None:
    """vLLM: `auto_map` of a model's config named code to be loaded, from another repository too."""
    code = "evil/repo--modeling.Evil"
    told = {
        "model_format": "gguf",
        "auto_map": {"AutoConfig": code},
        "vision_config": {"auto_map": {"A": code}},
    }
    config = parse_config(json.dumps(told).encode())
    assert code not in repr(config)
