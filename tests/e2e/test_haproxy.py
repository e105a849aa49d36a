"""deploy/haproxy in front of three nodes: one address, TLS on both sides, a dead node unnoticed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.lab import Machine, available, network
from tests.limits import SOON_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / ".venv" / "debian"
HAPROXY = DEBIAN / "usr" / "sbin" / "haproxy"
NAME = "llm.example.org"
WORDS = "One address is enough for everyone."
WAIT_S = 2 * SOON_S

_CLIENT = """
import json, ssl, sys, urllib.request
ca, key, method, path, body = sys.argv[1:6]
context = ssl.create_default_context(cafile=ca)
context.check_hostname = False  # the name is a documentation one; the CA is checked
request = urllib.request.Request(
    f"https://10.77.4.2:8443{path}", method=method, data=body.encode() or None,
    headers={"Host": "llm.example.org", "Content-Type": "application/json",
             **({"Authorization": f"Bearer {key}"} if key else {})})
try:
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:
        print(answer.status); print(answer.read().decode())
except urllib.error.HTTPError as refused:
    print(refused.code); print(refused.read().decode())
"""


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        with suppress(httpx.HTTPError):  # not yet
            if true():
                return
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.1)


class Node:
    def __init__(self, machine: Machine, folder: Path, *command: str) -> None:
        self.machine = machine
        self.data_dir = folder / f"node{machine.number}"
        self.log = folder / f"node{machine.number}.log"
        environment = {name: text for name, text in os.environ.items() if not name.startswith("OLLAMA_")}
        environment |= {
            "OLLAMA_DISTRIBUTED_ALLOWED_HOSTS": NAME,
            "OLLAMA_DISTRIBUTED_ENGINE": "wheel",
            "OLLAMA_DISTRIBUTED_MDNS": "false",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*machine.prefix(), sys.executable, "-m", "ollama_distributed", *command,
                 "--data-dir", str(self.data_dir), "--name", f"node{machine.number}",
                 "--listen", "127.0.0.1:8080", "--listen", f"{machine.address}:8443",
                 "--cluster-listen", machine.address,
                 "--advertise", machine.address, "--advertise", f"node{machine.number}.example.org"],
                stdout=subprocess.DEVNULL, stderr=log, env=environment,
            )  # fmt: skip
        try:
            until(self._ready, f"node {machine.number} is ready")
        except AssertionError:
            self.stop()
            raise AssertionError(self.log.read_text()[-6000:]) from None

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-6000:]
        if not (self.data_dir / "admin.json").exists() or '"node.listening"' not in self.log.read_text():
            return False
        with self.machine.http() as http:
            return http.get("/readyz").status_code == 200

    @property
    def key(self) -> str:
        key: str = json.loads((self.data_dir / "admin.json").read_text())["key"]
        return key

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(WAIT_S)


def self_signed(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@contextmanager
def haproxy(machine: Machine, folder: Path, ca: Path) -> Iterator[Path]:
    """The shipped configuration with this network's addresses; gives the CA of its certificate."""
    certificate = self_signed(folder / "api.pem")
    text = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    text = text.replace("/etc/haproxy/api.pem", str(certificate)).replace(
        "/etc/haproxy/cluster-ca.pem", str(ca)
    )
    text = text.replace("bind :443", f"bind {machine.address}:8443")
    # A node of a busy machine is slow, not gone: who is gone refuses the connection at once.
    text = text.replace(
        "    timeout connect 2s\n", f"    timeout connect 2s\n    timeout check {SOON_S:g}s\n"
    )
    for number in (1, 2, 3):
        text = text.replace(f"192.0.2.1{number}:", f"10.77.{number}.2:")
    (folder / "haproxy.cfg").write_text(text)
    libraries = [str(DEBIAN / part / "x86_64-linux-gnu") for part in ("usr/lib", "lib")]
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(
            [*machine.prefix(), str(HAPROXY), "-db", "-f", str(folder / "haproxy.cfg")],
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield certificate
    finally:
        process.kill()
        process.wait(WAIT_S)


@pytest.mark.skipif(bool(available()), reason=available() or "-")
@pytest.mark.skipif(not HAPROXY.exists(), reason="no haproxy here (make .venv/.debian brings Debian's)")
def test_clients_know_one_address_and_never_see_a_dead_node(tmp_path: Path) -> None:
    nodes: list[Node] = []
    with network(tmp_path, 4) as lab:
        try:
            nodes.append(Node(lab.machines[0], tmp_path, "serve"))
            token = tmp_path / "token"
            token.write_text(make_token(nodes[0]))
            for machine in lab.machines[1:3]:
                joined = Node(machine, tmp_path, "serve", "--join-file", str(token))
                nodes.append(joined)
            for node in nodes:
                add_model(node)
            until(lambda: all(members(node) == 3 for node in nodes), "three nodes everywhere")
            with haproxy(lab.machines[3], tmp_path, nodes[0].data_dir / "identity" / "ca.pem") as ca:

                def ask(key: str, path: str = "/api/tags", body: str = "") -> tuple[int, str]:
                    method = "POST" if body else "GET"
                    done = subprocess.run(
                        [*lab.machines[3].prefix(), sys.executable, "-c", _CLIENT, str(ca), key, method,
                         path, body],
                        capture_output=True, text=True, timeout=WAIT_S, check=False,
                    )  # fmt: skip
                    status, _, text = done.stdout.partition("\n")
                    return (int(status), text) if status else (0, done.stderr)

                until(lambda: ask(nodes[0].key)[0] == 200, "the proxy finds a node")
                assert ask("")[0] == 401  # nobody is local behind a proxy
                chat = json.dumps({"model": "scripted", "prompt": "?", "stream": False})
                answers = [ask(nodes[0].key, "/api/generate", chat) for _ in range(6)]
                assert [status for status, _ in answers] == [200] * 6, answers
                assert all(json.loads(text)["response"] == WORDS for _, text in answers)

                nodes[1].stop(signal.SIGKILL)
                answers = [ask(nodes[0].key, "/api/generate", chat) for _ in range(8)]
                assert [status for status, _ in answers] == [200] * 8, answers
        finally:
            for node in nodes:
                node.stop()


def make_token(node: Node) -> str:
    with node.machine.http(headers={"Authorization": f"Bearer {node.key}"}) as http:
        hosts = ["node2.example.org", "node3.example.org"]
        asked = {"role": "server", "uses": 2, "hosts": hosts}

        made: list[str] = []

        def make() -> bool:
            answer = http.post("/api/v1/cluster/tokens", json=asked)
            if answer.is_success:
                made.append(answer.json()["token"])
            return answer.is_success

        until(make, "a token can be made")
        return made[0]


def members(node: Node) -> int:
    with node.machine.http(headers={"Authorization": f"Bearer {node.key}"}) as http:
        online: int = http.get("/api/v1/cluster/status").json().get("nodes", {}).get("online", 0)
        return online


def add_model(node: Node) -> None:
    gguf = scripted_model(WORDS, chat_template=CHATML_TEMPLATE)
    digest = f"sha256:{hashlib.sha256(gguf).hexdigest()}"
    with node.machine.http(headers={"Authorization": f"Bearer {node.key}"}) as http:
        http.post(f"/api/blobs/{digest}", content=gguf).raise_for_status()
        made = http.post(
            "/api/create", json={"model": "scripted", "files": {"s.gguf": digest}, "stream": False}
        )
        assert made.json() == {"status": "success"}, made.text
