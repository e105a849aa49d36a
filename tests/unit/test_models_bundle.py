"""Tar streams and the OCI layout of bundles: read by others, cut anywhere, hostile."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models import bundle, tar
from ollama_distributed.models.manifest import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MODEL,
    Layer,
    Manifest,
    encode_manifest,
)
from ollama_distributed.models.names import ModelName

HEX = "ab" * 32


def archive(*files: tuple[str, bytes], form: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    """As the library's `tarfile` writes it; `fields`: of every member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as writer:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            writer.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read(data: bytes, cuts: Sequence[int] = ()) -> list[tuple[str, bytes]]:
    reader, found = tar.TarReader(), list[tuple[str, bytes]]()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        for event in reader.feed(data[begin:end]):
            if isinstance(event, tar.Member):
                found.append((event.name, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + bytes(event))
    reader.end()
    return found


# ── tar ─────────────────────────────────────────────────────────────────────────────

names = st.from_regex(r"[a-z]{1,9}(/[a-z0-9.]{1,8}[a-z]){0,3}", fullmatch=True)
files = st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5)


@given(files, st.lists(st.integers(0, 20_000), max_size=8))
def test_what_tarfile_writes_is_read_however_it_is_cut(
    given: list[tuple[str, bytes]], cuts: list[int]
) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        assert read(archive(*given, form=form), cuts) == given


@given(files)
def test_tarfile_reads_what_is_written(given: list[tuple[str, bytes]]) -> None:
    data = b"".join(
        tar.head(name, len(text)) + text + bytes(tar.padding_bytes(len(text))) for name, text in given
    )
    data += bytes(tar.ending_bytes(len(data)))
    assert len(data) == tar.length((name, len(text)) for name, text in given)
    assert len(data) % tar.RECORD_BYTES == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        found = [(info.name, reader.extractfile(info).read()) for info in reader]  # type: ignore[union-attr]
    assert found == given


def test_sizes_over_8_gib_are_said_in_an_extended_head() -> None:
    size = 70 << 30
    head = tar.head("blobs/sha256/" + HEX, size)
    assert tarfile.TarInfo.frombuf(head[-512:], "ascii", "strict").size == 0
    assert list(tar.TarReader().feed(head)) == [tar.Member("blobs/sha256/" + HEX, size)]
    assert tar.length([("x", size)]) > size


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_archive_is_refused_or_read(data: st.DataObject) -> None:
    """Nothing but `InvalidModel` ever comes of it."""
    whole = bytearray(archive(("oci-layout", b"{}"), ("a/" + "b" * 120, b"x" * 700), ("c", b"")))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except InvalidModel:
        return
    for name, _ in found:
        assert name.isprintable()
        assert not name.startswith("/")
        assert ".." not in name.split("/")


@given(st.binary(max_size=3000))
def test_noise_is_refused(noise: bytes) -> None:
    try:
        read(noise)
    except InvalidModel:
        return
    assert not noise or not any(noise[:512])


@pytest.mark.parametrize(
    "name",
    [
        "../oci-layout", "/oci-layout", "blobs/../../x", "blobs//x", "a/./b", "..", "a\\b", "a\nb", "ü",
        "a" * 300, "blobs/sha256/..", "\x00", "./../x",
    ],
)  # fmt: skip
def test_names_that_lead_outside(name: str) -> None:
    block = tarfile.TarInfo("x")
    block.size = 0
    data = bytearray(block.tobuf(tarfile.USTAR_FORMAT))
    if len(name) < 100 and name != "\x00":
        raw = name.encode()
        data[:100] = raw.ljust(100, b"\0")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
    else:
        data = bytearray(archive((name, b"")))
    with pytest.raises(InvalidModel, match="no plain name"):
        read(bytes(data) + bytes(1024))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "unknown kind"),
        (b"Z", "unknown kind"),
    ],
)
def test_links_and_devices(kind: bytes, says: str) -> None:
    info = tarfile.TarInfo("blobs/sha256/" + HEX)
    info.type, info.linkname = kind, "/etc/ld.so.preload"
    with pytest.raises(InvalidModel, match=says):
        read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_folders_and_a_leading_dot_are_as_tar_writes_them() -> None:
    folder = tarfile.TarInfo("./blobs/")
    folder.type = tarfile.DIRTYPE
    data = folder.tobuf(tarfile.GNU_FORMAT) + archive(("./oci-layout", b"{}"))
    assert read(data) == [("oci-layout", b"{}")]


def test_more_members_than_any_bundle_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 3)
    with pytest.raises(InvalidModel, match="over 3 members"):
        read(archive(*((f"f{number}", b"") for number in range(4))))


def test_a_compressed_one() -> None:
    with pytest.raises(InvalidModel, match="decompress it first"):
        read(gzip.compress(archive(("oci-layout", b"x" * 4000))).ljust(600, b"x"))


@pytest.mark.parametrize("keep", [100, 511, 513, 600, 1023, 1024 + 512 + 1])
def test_one_that_is_cut_short(keep: int) -> None:
    data = archive(("oci-layout", b"x" * 200), ("index.json", b"y" * 900))
    with pytest.raises(InvalidModel, match="cut short"):
        read(data[:keep]) if keep != 1023 else read(data[: 512 + 150])


@pytest.mark.parametrize(
    "extra",
    [b"12 path=../a\n", b"9 size=-1\n", b"30 size=99999999999999999999\n", b"4 xx", b"99 path=x\n",
     b"22 GNU.sparse.major=1\n", b"0 a=b\n"],
)  # fmt: skip
def test_extended_heads_that_lie(extra: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(extra)
    data = info.tobuf(tarfile.USTAR_FORMAT) + extra.ljust(512, b"\0") + archive(("y", b"z"))
    with pytest.raises(InvalidModel):
        read(data)


def test_a_huge_extended_head_is_not_kept() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(InvalidModel, match="extended head of"):
        read(info.tobuf(tarfile.GNU_FORMAT))


# ── the layout ──────────────────────────────────────────────────────────────────────


def manifest(content: bytes = b"weights", config: bytes = b"{}") -> bytes:
    def layer(kind: str, data: bytes) -> Layer:
        return Layer(media_type=kind, digest=bundle.digest_of(data).digest, size=len(data))

    return encode_manifest(Manifest(config=layer(CONFIG_TYPE, config), layers=(layer(MODEL, content),)))


def test_a_layout_has_each_blob_once_small_files_first() -> None:
    one, two = ModelName.parse("smollm2:135m"), ModelName.parse("hf.co/me/x:v1")
    data, other = manifest(), manifest(config=b"{ }")
    pieces = bundle.pieces([(one, data), (two, other)])
    assert [piece.name for piece in pieces[:2]] == ["oci-layout", "index.json"]
    assert [piece.content for piece in pieces[2:4]] == [data, other]
    assert len(pieces) == 7  # the weights once
    assert pieces == bundle.pieces([(one, data), (two, other)])
    index = json.loads(pieces[1].content)  # type: ignore[arg-type]
    assert [row["mediaType"] for row in index["manifests"]] == [MANIFEST_TYPE] * 2
    assert [row["annotations"]["org.opencontainers.image.ref.name"] for row in index["manifests"]] == [
        "135m",
        "v1",
    ]
    listed = bundle.read_index(pieces[1].content)  # type: ignore[arg-type]
    assert [one.name for one in listed] == [one, two]
    assert [one.size for one in listed] == [len(data), len(other)]


def test_models_of_one_tag_are_told_apart() -> None:
    models = [(ModelName.parse(name), manifest()) for name in ("a", "b")]
    index = json.loads(bundle.pieces(models)[1].content)  # type: ignore[arg-type]
    refs = [row["annotations"]["org.opencontainers.image.ref.name"] for row in index["manifests"]]
    assert refs == ["registry.ollama.ai/library/a:latest", "registry.ollama.ai/library/b:latest"]


def index(*rows: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": rows}).encode()


def row(**more: Any) -> dict[str, Any]:
    return {"mediaType": MANIFEST_TYPE, "digest": "sha256:" + HEX, "size": 10, **more}


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({"io.containerd.image.name": "reg:5000/me/x:v1"}, "reg:5000/me/x:v1"),
        ({"org.opencontainers.image.ref.name": "me/x:v1"}, "registry.ollama.ai/me/x:v1"),
        ({"org.opencontainers.image.ref.name": "v1"}, None),
        ({}, None),
    ],
)
def test_how_other_programs_name_models(annotations: dict[str, str], name: str | None) -> None:
    (listed,) = bundle.read_index(index(row(annotations=annotations)))
    assert (None if listed.name is None else str(listed.name)) == name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "not valid"),
        (b"\xff", "not valid"),
        (b"[" * 100_000, "not valid"),
        (index(), "no model"),
        (index(row(mediaType="application/vnd.oci.image.index.v1+json")), "is no model"),
        (index(row(digest="sha256:../../etc/passwd")), "no digest"),
        (index(row(digest="sha512:" + HEX)), "no digest"),
        (index(row(size=-1)), "impossible size"),
        (index(row(size=1 << 40)), "impossible size"),
        (index(*(row() for _ in range(1025))), "over 1024 models"),
        (index(*(row(digest=f"sha256:{n:064x}", size=4 << 20) for n in range(9))), "over 32 MiB"),
        (index(row(annotations={"io.containerd.image.name": "../../etc/passwd"})), "no name of a model"),
        (index(row(annotations={"io.containerd.image.name": "a/" * 400})), "no name of a model"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(data: bytes, says: str) -> None:
    with pytest.raises(InvalidModel, match=says):
        bundle.read_index(data)


def test_the_layouts_version() -> None:
    bundle.read_layout(b'{"imageLayoutVersion":"1.0.0"}')
    for wrong in (b'{"imageLayoutVersion":"2.0.0"}', b"{}", b"x"):
        with pytest.raises(InvalidModel):
            bundle.read_layout(wrong)
