"""schemathesis over the whole OpenAPI document of a node: no server error, no answer that the document
does not tell of. The same requests each time; `make accept-api` makes many more."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from ollama_distributed.models.scripted import scripted_model
from tests.e2e.conftest import add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess, running_node, until

pytestmark = pytest.mark.e2e

EXAMPLES = int(os.environ.get("API_EXAMPLES", "2"))
"""Random requests for each operation, beside those at the bounds of its schema."""
SEED = int(os.environ.get("API_SEED", "1"))
FEW = 2
LIMIT_S = 580 if EXAMPLES <= FEW else 3500
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
CONFIG = Path(__file__).with_name("schemathesis.toml")
BATCH = (
    b'{"custom_id":"r1","method":"POST","url":"/v1/chat/completions",'
    b'"body":{"model":"echo","messages":[{"role":"user","content":"hi"}]}}\n'
)
NAMES = ("spare", "doomed")
PASSWORD = "correct horse battery"


class _EmptyRegistry(BaseHTTPRequestHandler):
    """It has nothing and takes nothing."""

    def _nothing(self) -> None:
        body = b'{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known"}]}'
        self.send_response(404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _nothing  # noqa: N815  # as the base class names them

    def log_message(self, *args: object) -> None:
        """Of what is asked here nothing is told."""


@contextmanager
def empty_registry() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EmptyRegistry)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def world_of(node: NodeProcess, registry: str) -> dict[str, object]:
    """Something of each kind, that requests can name. What may be destroyed can be made again, and
    the node's own model, key and place in its cluster cannot be destroyed by a request."""
    gguf = scripted_model("spare")
    digest = f"sha256:{hashlib.sha256(gguf).hexdigest()}"
    add_model(node.url, "spare", gguf)
    with node.admin() as client:
        until(client.cluster.create_token, SOON_S, "a cluster that takes changes")
        client.models.copy("spare", "doomed")
        key, doomed_key = (client.keys.create(name=name).row.id for name in NAMES)
        for name in NAMES:
            client.policies.create(name=name)
            client.users.create(name, PASSWORD)
        file, doomed_file = (client.files.upload(BATCH, filename=f"{name}.jsonl").id for name in NAMES)
        batch = client.batches.create(file, "/v1/chat/completions").id
    node_of_pin = {"node": node.id}
    return {
        "registry": registry,
        "short": EXAMPLES <= FEW,
        "model": "echo",
        "names": {
            "/api/v1/nodes": [node.id],
            "/api/v1/models": ["echo", "spare"],
            "/v1/models": ["echo", "spare"],
            "/api/blobs": [digest],
            "/api/v1/keys": [key],
            "/api/v1/policies": ["spare"],
            "/api/v1/users": ["spare"],
            "/v1/files": [file],
            "/v1/batches": [batch],
        },
        "doomed": {
            "/api/v1/nodes": [node.id],
            "/api/v1/models": ["doomed"],
            "/api/v1/keys": [doomed_key],
            "/api/v1/policies": ["doomed"],
            "/api/v1/users": ["doomed"],
            "/v1/files": [doomed_file],
        },
        "good": {
            "/api/pull": {"model": f"{registry}/library/none"},
            "/api/push": {"model": f"{registry}/library/none"},
            "/api/create": {"files": {"spare.gguf": digest}},
            "/v1/batches": {"input_file_id": file},
            "/api/v1/models/{name}/pin": node_of_pin,
            "/api/v1/models/{name}/unpin": node_of_pin,
        },
    }


@pytest.mark.timeout(LIMIT_S + 20)
def test_no_request_breaks_the_node_or_its_document(tmp_path: Path) -> None:
    with empty_registry() as registry:
        config = tmp_path / "node.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "engines": [{"name": "echo", "kind": "echo", "options": {"models": ["echo"]}}],
                    "registries": [{"host": registry, "insecure": True, "private": True}],
                    "cluster_listen": "127.0.0.1",
                    "mdns": False,
                }
            )
        )
        with running_node(tmp_path / "node", "--config", str(config)) as node:
            ran = _schemathesis(node, world_of(node, registry), tmp_path)
            with node.http() as http:
                assert http.get("/readyz").status_code == 200
            broken = [line for line in node.log_file.read_text().splitlines() if "request_broke" in line]
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2_000:]
    assert not broken, broken[:3]


def _schemathesis(
    node: NodeProcess, world: dict[str, object], folder: Path
) -> subprocess.CompletedProcess[str]:
    key = json.loads((node.data_dir / "admin.json").read_text())["key"]
    line = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{node.url}/openapi.json", "--url", node.url),
        *("--header", f"Authorization: Bearer {key}"),
        *("--checks", ",".join(CHECKS)),
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--seed", str(SEED)),
        *(["--generation-deterministic"] if EXAMPLES <= FEW else ["--generation-database", "none"]),
        *("--request-timeout", "30", "--workers", "1", "--no-color"),
    ]
    env = os.environ | {"API_WORLD": json.dumps(world), "SCHEMATHESIS_HOOKS": "tests.api_hooks"}
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        env=env,
        cwd=Path(__file__).parents[2],
    )
