"""S-01 at a whole node: whatever a request calls a model, a digest, a file, a user or anything else, no file
outside the node's folders is opened, and no answer tells whether one is there.

Ollama CVE-2024-37032, CVE-2025-44779, CVE-2026-7020 (a digest that was a path), CVE-2024-39722 and
CVE-2024-39719 (different errors tell whether a path exists), LocalAI CVE-2024-5182 (deleting by name),
Kraken CVE-2022-47747, Dragonfly CVE-2025-59352.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yaml

from tests.e2e.test_openapi import empty_registry
from tests.nodes import NodeProcess, running_node

pytestmark = pytest.mark.e2e

HOOK = """
import json, os, sys

_TOLD = os.open({told!r}, os.O_WRONLY | os.O_APPEND)
_EVENTS = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
     "os.chmod", "os.chown", "os.utime", "os.listdir", "os.scandir", "os.chdir", "shutil.rmtree")
)

def _watch(event, arguments):
    if event in _EVENTS:
        paths = [os.fsdecode(one) for one in arguments[:2] if isinstance(one, (str, bytes))]
        if event == "open":
            paths = paths[:1]  # then its mode
        os.write(_TOLD, (json.dumps([event, paths]) + "\\n").encode())

sys.addaudithook(_watch)
"""
"""Of a file that is reached from an open folder, the name in that folder."""
WORDS = (
    "model",
    "name",
    "from",
    "source",
    "destination",
    "digest",
    "id",
    "file",
    "input_file_id",
    "node",
    "key",
)
"""Fields of bodies, and words of queries."""
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr/lib", "/usr/share", "/lib")


_ID = re.compile(rb"[0-9a-f]{16}")


def ways_to(file: Path) -> list[str]:
    """Names that would lead to a file in the folder beside the node's, were they paths."""
    held = str(file)
    up = "/".join([".."] * 12)
    beside = f"{file.parent.name}/{file.name}"
    return [
        held,
        f"sha256:{up}{held}",
        f"../../{beside}",
        f"file://{held}",
        f"sha256-{up}{held}",
        f"library/../..{held}:latest",
        "%2e%2e%2f" * 3 + beside,
        f"..\\..\\{file.parent.name}\\{file.name}",
        f"{held}\0.gguf",
        f"\uff0e\uff0e\uff0f\u2025\u2215{beside}",
    ]


COMPARED = 2
"""Of these ways, asked with the file there and with none."""
OTHERS = ["../" * 12 + "etc/passwd", "a" * 300, ".."]


class Asking:
    """Requests whose paths nobody makes tidy on the way."""

    def __init__(self, node: NodeProcess) -> None:
        url = urlsplit(node.url)
        assert url.hostname is not None
        self._line = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
        key = json.loads((node.data_dir / "admin.json").read_text())["key"]
        self._headers = {"authorization": f"Bearer {key}"}
        self.asked = 0

    def close(self) -> None:
        self._line.close()

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        self.asked += 1
        self._line.putrequest(method, path, skip_accept_encoding=True)
        for name, value in self._headers.items():
            self._line.putheader(name, value)
        if body is not None:
            self._line.putheader("content-type", kind)
            self._line.putheader("content-length", str(len(body)))
        self._line.endheaders(body)
        answer = self._line.getresponse()
        return answer.status, answer.read()

    def all_routes(self) -> list[tuple[str, str]]:
        paths: dict[str, dict[str, Any]] = json.loads(self.ask("GET", "/openapi.json")[1])["paths"]
        return [
            (method.upper(), path)
            for path, operations in paths.items()
            for method in operations
            if not path.endswith("/watch")  # takes no names, and does not end
        ]

    def everywhere(self, value: str, routes: list[tuple[str, str]]) -> Iterator[tuple[str, int, bytes]]:
        """The answers of all routes that were asked for `value`: in the path, the query and the body."""
        quoted = quote(value, safe="")
        query = "&".join(f"{word}={quoted}" for word in WORDS)
        said: dict[str, Any] = dict.fromkeys(WORDS, value)
        body = json.dumps(said | {"files": {value: value}, "stream": False, "prompt": value}).encode()
        form = (
            f'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
            f'content-disposition: form-data; name="file"; filename="{value}"\r\n\r\n{{}}\r\n--b--\r\n'
        ).encode()
        for method, path in routes:
            before, brace, rest = path.partition("{")
            after = rest.partition("}")[2]
            # A name that is the rest of its path may hold slashes as they are.
            spellings = [quote(value, safe="/%")] if brace else [""]
            if path.endswith("}"):
                spellings.append(quoted)
            for inserted in spellings:
                asked = f"{before}{inserted}{after}?{query}"
                if method in ("GET", "HEAD"):
                    yield f"{method} {path}", *self.ask(method, asked)
                elif path == "/v1/files":
                    yield (
                        f"{method} {path}",
                        *self.ask(method, asked, form, "multipart/form-data; boundary=b"),
                    )
                else:
                    yield f"{method} {path}", *self.ask(method, asked, body)


def told_of(answer: tuple[str, int, bytes]) -> tuple[str, int, bytes]:
    """Without the request's id; of what was done, that it was done."""
    route, status, data = answer
    assert status != 500, answer
    return route, status, _ID.sub(b"", data) if status >= 400 else b""


@contextmanager
def watched(tmp_path: Path) -> Iterator[tuple[NodeProcess, Path]]:
    """A node that cannot leave this machine, and the file in which it tells what it opens."""
    told = tmp_path / "told"
    told.touch()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK.format(told=str(told)))
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
        env = {"PYTHONPATH": str(tmp_path / "hook")}
        with running_node(tmp_path / "node", "--config", str(config), env=env) as node:
            yield node, told


def test_s01_no_request_opens_a_file_outside_or_tells_of_one(tmp_path: Path) -> None:
    held = tmp_path / "outside" / "held.gguf"
    held.parent.mkdir()
    held.write_bytes(b"GGUF")
    roots = [tmp_path / "node", Path(sys.prefix), Path(sys.base_prefix), *map(Path, SYSTEM)]
    roots += [Path(path) for path in sysconfig.get_paths().values()] + [Path(__file__).parents[2] / "src"]
    with watched(tmp_path) as (node, told):
        begun = told.stat().st_size
        assert begun > 0, "the hook is on"
        asking = Asking(node)
        routes = asking.all_routes()
        assert len(routes) > 90
        named = [route for route in routes if "{" in route[1] or route[0] not in ("GET", "HEAD")]
        ways = ways_to(held)
        for value in ways[COMPARED:] + OTHERS:
            assert all(status != 500 for _, status, _ in asking.everywhere(value, named)), value
        for value in ways[:COMPARED]:
            there = [told_of(answer) for answer in asking.everywhere(value, routes)]
            held.unlink()
            assert there == [told_of(answer) for answer in asking.everywhere(value, routes)], value
            held.write_bytes(b"GGUF")
        asking.close()
        lines = told.read_bytes()[begun:].decode().splitlines()
    strays = set()
    for event, paths in map(json.loads, lines):
        for path in map(Path, paths):
            inside = any(path.is_relative_to(root) for root in roots) and ".." not in path.parts
            if not (inside if path.is_absolute() else path.parts in ((), (path.name,)) and path.name != ".."):
                strays.add((event, str(path)))
    print(f"{asking.asked} requests, {len(lines)} calls")
    assert not strays
    assert [path.name for path in held.parent.iterdir()] == ["held.gguf"]
    assert held.read_bytes() == b"GGUF"
