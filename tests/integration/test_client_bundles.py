"""Both clients write bundles to files and send them without what the server has."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.server_double import Asked, Double, Reply, server_double
from tests.integration.test_client_sdk import Either

from ollama_distributed import client as sdk
from ollama_distributed.client.bundles import ASKED_BYTES

pytestmark = pytest.mark.integration

LARGE, OTHER = b"a" * (ASKED_BYTES + 7), b"b" * (2 * ASKED_BYTES)
DONE = {"models": [{"name": "x:latest", "digest": "d", "size": 5, "state": "imported"}]}


@pytest.fixture
def server() -> Iterator[Double]:
    with server_double() as double:
        yield double


@pytest.fixture(params=[sdk.Client, sdk.SyncClient], ids=["async", "sync"])
def either(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def bundle(*, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as writer:
        for name, data in (
            ("oci-layout", b"{}"),
            ("index.json", b"{}"),
            (f"blobs/sha256/{digest(LARGE)}", LARGE),
            ("blobs/sha256/" + "0" * 64, b"small"),
            (f"blobs/sha256/{digest(OTHER)}", OTHER),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_a_bundle_is_written_as_it_comes(server: Double, either: Either, tmp_path: Path) -> None:
    server.on("GET", "/api/v1/models/me/x:v1/bundle", Reply(body=LARGE))
    seen: list[tuple[int, int]] = []
    file = tmp_path / "x.tar"
    file.write_bytes(b"an older one")
    size = either(
        lambda client: client.models.export_bundle(
            "me/x:v1", file, on_progress=lambda done, total: seen.append((done, total))
        ),
        server.url,
    )
    assert size == len(LARGE)
    assert file.read_bytes() == LARGE
    assert seen[-1] == (len(LARGE), len(LARGE))
    assert list(tmp_path.iterdir()) == [file]
    server.on("GET", "/api/v1/bundles?model=a&model=b%2Fc", Reply(body=OTHER))
    into = io.BytesIO()
    assert either(lambda client: client.models.export_bundle(["a", "b/c"], into), server.url) == len(OTHER)
    assert into.getvalue() == OTHER


@pytest.mark.parametrize(
    "reply",
    [Reply(body=LARGE, drop=True), Reply(404, {"error": {"code": "model_not_found", "message": "no"}})],
)
def test_what_did_not_come_as_a_whole_leaves_nothing(
    server: Double, either: Either, tmp_path: Path, reply: Reply
) -> None:
    server.on("GET", "/api/v1/models/x/bundle", reply)
    file = tmp_path / "x.tar"
    file.write_bytes(b"an older one")
    error = sdk.ConnectionLost if reply.drop else sdk.ModelNotFound
    with pytest.raises(error):
        either(lambda client: client.models.export_bundle("x", file), server.url, retries=0)
    assert file.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_what_the_server_has_is_not_sent(server: Double, either: Either, tmp_path: Path, form: int) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(bundle(form=form))
    server.on("HEAD", f"/api/blobs/sha256:{digest(LARGE)}", Reply(200))
    server.on("HEAD", f"/api/blobs/sha256:{digest(OTHER)}", Reply(404))
    server.on("POST", "/api/v1/bundles?name=y%3Av2&replace=true", Reply(body=DONE))
    (one,) = either(lambda client: client.models.import_bundle(file, name="y:v2", replace=True), server.url)
    assert (one.name, one.state) == ("x:latest", "imported")
    (sent,) = [asked for asked in server.asked if asked.method == "POST"]
    with tarfile.open(fileobj=io.BytesIO(sent.body)) as archive:
        names = archive.getnames()
        found = archive.extractfile(f"blobs/sha256/{digest(OTHER)}")
        assert found is not None
        assert found.read() == OTHER
    assert f"blobs/sha256/{digest(LARGE)}" not in names
    assert len(names) == 4


def test_what_is_no_archive_goes_as_it_is(server: Double, either: Either, tmp_path: Path) -> None:
    """The server says what is wrong with it."""
    file = tmp_path / "x.tar"
    torn = bundle()[:-1_500_000]
    for content in (b"", b"no archive", torn):
        file.write_bytes(content)
        server.on("POST", "/api/v1/bundles", Reply(body=DONE))
        either(lambda client: client.models.import_bundle(str(file)), server.url)
        assert server.asked[-1].body == content


def test_a_stream_is_sent_without_a_length(server: Double, either: Either) -> None:
    def reply(asked: Asked) -> Reply:
        assert asked.headers["transfer-encoding"] == "chunked"
        return Reply(body=DONE)

    server.on("POST", "/api/v1/bundles", reply)

    def use(client: Any) -> Any:
        return client.models.import_bundle(io.BytesIO(b""))

    assert either(use, server.url, retries=0)[0].state == "imported"
