"""The examples in deploy/ are what their own programs accept."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DEBIAN = ROOT / ".venv" / "debian"
BIN = Path(sys.executable).parent
UNIT = DEPLOY / "systemd" / "ollama-distributed.service"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    libraries = [str(DEBIAN / folder / "x86_64-linux-gnu") for folder in ("usr/lib", "lib")]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def debian(program: str) -> Path:
    for folder in ("usr/sbin", "usr/bin"):
        if (path := DEBIAN / folder / program).exists():
            return path
    pytest.skip(f"no {program} on this system (make .venv/.debian brings Debian's)")


def edited(source: Path, target: Path, changes: Sequence[tuple[str, str]]) -> Path:
    text = source.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    target.write_text(text)
    return target


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with key and certificate, as HAProxy wants it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "llm.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "api.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


def test_dockerfile_is_clean() -> None:
    run(BIN / "hadolint", DEPLOY / "docker" / "Dockerfile")


def test_compose_file_fits_its_schema() -> None:
    run(
        BIN / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        ROOT / "docker-compose.dev.yml",
    )


def test_kubernetes_manifest_fits_its_schema() -> None:
    output = run(BIN / "kubernetes-validate", "--strict", DEPLOY / "kubernetes" / "ollama-distributed.yaml")
    assert "statefulset/ollama-distributed" in output


def test_systemd_unit_is_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd on this system")
    changes = [("/opt/ollama-distributed/bin/ollama-distributed", "/bin/true")]
    assert "warning" not in run(
        "systemd-analyze", "verify", "--man=no", edited(UNIT, tmp_path / UNIT.name, changes)
    )


def test_haproxy_accepts_its_configuration(tmp_path: Path, certificate: Path) -> None:
    changes = [("/etc/haproxy/api.pem", str(certificate)), ("/etc/haproxy/cluster-ca.pem", str(certificate))]
    config = edited(DEPLOY / "haproxy" / "haproxy.cfg", tmp_path / "haproxy.cfg", changes)
    assert "valid" in run(debian("haproxy"), "-c", "-f", config)


def test_caddy_accepts_its_configuration(tmp_path: Path, certificate: Path) -> None:
    changes = [("/etc/caddy/cluster-ca.pem", str(certificate))]
    config = edited(DEPLOY / "caddy" / "Caddyfile", tmp_path / "Caddyfile", changes)
    output = run(debian("caddy"), "validate", "--adapter", "caddyfile", "--config", config)
    assert "Valid configuration" in output


def test_nginx_accepts_its_configuration(tmp_path: Path, certificate: Path) -> None:
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = "access_log off; " + " ".join(f"{path}_temp_path {tmp_path / path};" for path in paths)
    changes = [(f"/etc/nginx/{name}", str(certificate)) for name in ("api.pem", "api.key", "cluster-ca.pem")]
    source = DEPLOY / "nginx" / "nginx.conf"
    config = edited(source, tmp_path / "nginx.conf", [*changes, ("http {", f"http {{ {own}")])
    output = run(debian("nginx"), "-e", "stderr", "-t", "-g", f"pid {tmp_path / 'pid'};", "-c", config)
    assert "test is successful" in output
    assert "warn" not in output


def test_keepalived_accepts_its_configuration(tmp_path: Path) -> None:
    # 2.2.7 ends itself while it checks a script's user other than its own.
    changes = [("script_user nobody", "script_user root")]
    config = edited(DEPLOY / "keepalived" / "keepalived.conf", tmp_path / "keepalived.conf", changes)
    run(debian("keepalived"), f"--config-test={tmp_path / 'complaints'}", "-f", config)
