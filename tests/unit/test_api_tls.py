"""The API's certificate follows its files: a renewed one is shown to the next client, a bad one is not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import socket
import ssl
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.gateway_bench import HELLO, gateway
from tests.limits import SOON_S

from ollama_distributed.base.errors import Invalid
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.node.alerts import OwnAlerts
from ollama_distributed.node.api_tls import ApiTLS, CertificateFiles
from ollama_distributed.node.doors import Stop, serve
from ollama_distributed.testing.inference import ScriptedInference

HOST = "models.example"
DAY_S = 86_400.0


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def write(files: CertificateFiles, serial: int, *, at: int, hours: int = 1) -> None:
    """A certificate that signs itself and holds so long; `at`: when the files changed, for file systems with
    coarse clocks."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=hours))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, serialization.NoEncryption()))
    for path in (files.certificate, files.key):
        os.utime(path, ns=(at * 10**9, at * 10**9))


def shown(front: ssl.SSLContext, *, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int:
    """The serial number of what a new client gets to see."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode, client.maximum_version = False, ssl.CERT_NONE, most
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(down, up, server_hostname=HOST)
    other = front.wrap_bio(up, down, server_side=True)
    for _ in range(8):
        for side in (one, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = one.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    files = CertificateFiles(tmp_path / "tls.crt", tmp_path / "tls.key")
    write(files, 1, at=1_000)
    return files


def test_a_renewed_certificate_is_shown_without_a_restart(files: CertificateFiles) -> None:
    tls = ApiTLS(files)
    front = tls.front  # what the listener has, for its whole life
    assert shown(front) == 1
    write(files, 2, at=2_000)
    assert shown(front) == 1  # until it is looked for
    tls.reload()
    assert shown(front) == 2
    tls.reload()
    assert shown(front, most=ssl.TLSVersion.TLSv1_2) == 2


def test_one_that_cannot_be_used_is_not(files: CertificateFiles) -> None:
    tls = ApiTLS(files)
    key = files.key.read_bytes()
    write(files, 2, at=2_000)
    files.key.write_bytes(key)  # half of the renewal
    with pytest.raises(Invalid):
        tls.reload()
    assert shown(tls.front) == 1
    files.certificate.unlink()
    with pytest.raises(Invalid):
        tls.reload()
    assert shown(tls.front) == 1
    write(files, 3, at=3_000)
    tls.reload()
    assert shown(tls.front) == 3


def test_old_protocols_are_refused(files: CertificateFiles) -> None:
    tls = ApiTLS(files)
    assert tls.front.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_its_end_is_told_in_time(files: CertificateFiles) -> None:
    clock = Clock()
    own = OwnAlerts("gpu1", Overload(), list, clock)
    write(files, 1, at=1_000, hours=24 * 90)
    tls = ApiTLS(files)
    own.know_api(tls)
    begins, ends = tls.holds
    assert 90 * DAY_S < ends - begins < 91 * DAY_S
    clock.now = ends - 15 * DAY_S
    assert own.now() == []
    clock.now = ends - 13 * DAY_S
    (soon,) = own.now()
    assert (soon.level, soon.code) == ("warning", "certificate_ends")
    assert str(files.certificate) in soon.message
    clock.now = ends + 1
    (over,) = own.now()
    assert over.level == "error"
    assert "ended at 2" in over.message
    # A node's own holds for a day, and is renewed when half of it is over.
    write(files, 2, at=2_000, hours=23)
    tls = ApiTLS(msgspec.structs.replace(files, renewed=True))
    own.know_api(tls)
    ends = tls.holds[1]
    clock.now = ends - 12 * 3600
    assert own.now() == []
    clock.now = ends - 7 * 3600
    (late,) = own.now()
    assert "it should have been renewed" in late.message


async def health(port: int, context: ssl.SSLContext) -> bytes:
    """Empty: the handshake took too long."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=HOST)
    except (OSError, ssl.SSLError):
        return b""
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


async def test_who_does_not_finish_the_handshake_is_cut_and_others_are_not_kept(
    files: CertificateFiles,
) -> None:
    """uvicorn gives it a minute; a connection costs nothing to open."""
    limits = Limits(handshake_deadline_s=0.3)
    listener = socket.create_server(("0.0.0.0", 0))
    port, stop, started = listener.getsockname()[1], Stop(), asyncio.Event()
    held: list[ApiTLS] = []
    serving = asyncio.create_task(
        serve(
            gateway(ScriptedInference(HELLO)),
            [listener],
            limits=limits,
            drain_s=1,
            certificate=files,
            stop=stop,
            on_started=started.set,
            on_tls=held.append,
        )
    )
    try:
        async with asyncio.timeout(SOON_S):
            await started.wait()
            assert [tls.files for tls in held] == [files]
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
            for number, (_, writer) in enumerate(silent):
                writer.write(b"\x16\x03\x01\x02\x00"[:number])  # the begin of a ClientHello, or nothing
            context = ssl.create_default_context(cafile=str(files.certificate))
            while not (answer := await health(port, context)):  # a busy machine may be too slow once
                pass
            assert answer.startswith(b"HTTP/1.1 200")
            for reader, writer in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
    finally:
        stop.all()
        await serving
