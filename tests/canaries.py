"""Secrets that are planted, and everywhere that they must not turn up in (S-11)."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import psutil

ADDRESS = re.compile(rb"0x[0-9a-f]{6,}")
"""Of memory, in an error's text: tells where a process has what."""
OWN_FILES = {"admin.json"}
"""Where a secret is kept on purpose, for the program's user only."""


class Canaries:
    """Texts to plant; `found_in` looks for them plain, in base64 and in hex."""

    def __init__(self) -> None:
        self.prompt, self.password, self.query, self.field = (
            f"canary{secrets.token_hex(12)}" for _ in range(4)
        )
        self.secrets: dict[str, str] = {
            "prompt": self.prompt,
            "password": self.password,
            "query": self.query,
            "field": self.field,
        }
        self.bodies: list[bytes] = []

    def add(self, name: str, secret: str) -> None:
        self.secrets[name] = secret

    def provoke(self, http: httpx.Client, model: str) -> None:
        """Requests that work and requests that fail, in all dialects, each with a secret in it."""
        said = [{"role": "user", "content": self.prompt}]
        for path, body in (
            ("/api/generate", {"model": model, "prompt": self.prompt, "system": self.prompt}),
            ("/api/v1/chat", {"model": model, "messages": said}),
            ("/v1/chat/completions", {"model": model, "messages": said, "stream": True}),
            ("/v1/messages", {"model": model, "messages": said, "max_tokens": 5}),
            ("/v1/responses", {"model": model, "input": self.prompt}),
            ("/v1/embeddings", {"model": model, "input": self.prompt}),
            ("/api/generate", {"model": "nobody-has-this", "prompt": self.prompt}),
            ("/api/generate", {"model": model, "prompt": self.prompt, "options": {"num_predict": "many"}}),
            ("/api/generate", {"model": model, "prompt": self.prompt, "template": "{{ ." + self.field}),
            ("/api/chat", {"model": model, "messages": [{"role": self.field, "content": ""}]}),
            ("/api/chat", {"model": model, "messages": [{**said[0], "images": [self.prompt]}]}),
            ("/v1/chat/completions", {"model": model, "messages": self.prompt}),
            ("/v1/messages", {"model": model, "messages": [{"role": "user", "content": [self.prompt]}]}),
        ):
            self._keep(http.post(path, json=body))
        self._keep(http.post("/api/generate", content=f'{{"prompt": "{self.prompt}", "model": '.encode()))
        for headers in (
            {"authorization": f"Bearer odk_{self.password}"},
            {"authorization": f"Basic {self.password}"},
            {"x-api-key": f"odk_{self.password}"},
            {"cookie": f"session={self.password}"},
        ):
            self._keep(http.get("/api/v1/keys", headers=headers))
        self._keep(http.get(f"/api/tags?key={self.query}"))
        self._keep(http.get(f"/nothing/here?token={self.query}"))

    def _keep(self, answer: httpx.Response) -> None:
        """Errors only: an answer may well repeat what was asked. An error may name the value of a field
        that has a few values only, to who sent it."""
        if answer.status_code >= 400:
            self.bodies.append(answer.content.replace(self.field.encode(), b""))

    def found_in(self, data: bytes) -> Iterator[str]:
        for name, secret in self.secrets.items():
            plain = secret.encode()
            if (
                plain in data
                or base64.b64encode(plain).rstrip(b"=")[:-2] in data
                or plain.hex().encode() in data
            ):
                yield name


def processes(pids: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """Argument list and environment of all children of these."""
    for pid in pids:
        for child in psutil.Process(pid).children(recursive=True):
            where = Path(f"/proc/{child.pid}")
            for name in ("cmdline", "environ"):
                yield f"{child.name()} {name}", (where / name).read_bytes()


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What a node has on its disk, without models."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in OWN_FILES and "blobs" not in path.parts:
            yield str(path.relative_to(folder)), path.read_bytes()
