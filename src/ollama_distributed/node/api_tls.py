"""TLS of the API on addresses that other machines can reach.

The certificate is the operator's own, or the node's: signed by the cluster's CA (`ca` in
admin.json), it names the hosts that the node advertises. Both are replaced while the node
runs; each handshake takes what was read last. Clients show keys, never certificates.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from cryptography import x509

from ollama_distributed.base.errors import Invalid, Unavailable

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

MADE_WITHIN_S = 30.0
"""The node's own certificate is there so soon after its first start; mostly in 0.1 s."""
POLL_S = 0.02
LOOK_AGAIN_S = 30.0
"""How soon a replaced certificate is used; node certificates are renewed 12 h before they end."""


class CertificateFiles(msgspec.Struct, frozen=True):
    certificate: Path
    """PEM, the server's own first, then those that lead to the root."""
    key: Path
    renewed: bool = False
    """By the node itself: they are its own."""

    def complete(self) -> bool:
        return self.certificate.is_file() and self.key.is_file()

    def stamp(self) -> tuple[int, int]:
        return self.certificate.stat().st_mtime_ns, self.key.stat().st_mtime_ns


class ApiTLS:
    """One context for a listener's whole life, whose certificate follows the files."""

    def __init__(self, files: CertificateFiles) -> None:
        """
        Raises:
            Invalid: the files cannot be read, or do not fit together.
        """
        self.files = files
        self.holds = (0.0, 0.0)
        """What clients are shown now: from when and until when, seconds since the Unix epoch."""
        self._stamp, self._current = self._read()
        self.front = _context(self.files)
        self.front.sni_callback = self._use_current

    @classmethod
    async def opened(cls, files: CertificateFiles, *, given_up: Callable[[], bool]) -> ApiTLS | None:
        """As soon as the files are there; None: `given_up` before that.

        Raises:
            Invalid: as the constructor.
            Unavailable: they do not come.
        """
        deadline = asyncio.get_running_loop().time() + MADE_WITHIN_S
        while not await asyncio.to_thread(files.complete):
            if given_up():
                return None
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"there is no certificate {files.certificate} after {MADE_WITHIN_S:g} s, so the API "
                    "cannot be served to other machines; see why in the log, or give one with the "
                    "setting tls_certificate"
                )
            await asyncio.sleep(POLL_S)
        return await asyncio.to_thread(cls, files)

    async def follow(self) -> None:
        """Look for a replaced certificate until cancelled. A bad one is logged and not used."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                await asyncio.to_thread(self.reload)
            except Invalid as failure:
                log.warning("api.certificate_not_used", reason=failure.message)

    def reload(self) -> None:
        """Use the files as they are now.

        Raises:
            Invalid: they cannot be used; what was read before stays.
        """
        try:
            changed = self.files.stamp() != self._stamp
        except OSError as failure:
            raise _unusable(self.files, failure) from failure
        if changed:
            self._stamp, self._current = self._read()
            log.info("api.certificate_replaced", path=str(self.files.certificate))

    def _read(self) -> tuple[tuple[int, int], ssl.SSLContext]:
        try:
            read = self.files.stamp(), _context(self.files)
            self.holds = _holds(self.files.certificate.read_bytes())
        except OSError as failure:
            raise _unusable(self.files, failure) from failure
        return read

    def _use_current(self, connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        connection.context = self._current


def _context(files: CertificateFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Not only 1.3: clients of the API are anyone's, and some corporate proxies end at 1.2.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as failure:
        raise _unusable(files, failure) from failure
    return context


def _holds(pem: bytes) -> tuple[float, float]:
    """Of the first in it, which OpenSSL has read: the server's own."""
    own = x509.load_pem_x509_certificates(pem)[0]
    return own.not_valid_before_utc.timestamp(), own.not_valid_after_utc.timestamp()


def _unusable(files: CertificateFiles, failure: OSError) -> Invalid:
    return Invalid(
        f"the certificate {files.certificate} with the key {files.key} cannot be used: "
        f"{failure.strerror or failure}; both must be PEM files that belong together"
    )
