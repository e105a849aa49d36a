"""Sign-in in a browser for a program (RFC 8252): the browser comes back to a port of this machine with
a code that only this process can use."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from ollama_distributed.cli import output
from ollama_distributed.cli.asking import ask
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Target

if TYPE_CHECKING:
    from ollama_distributed.base.users import LoginAnswer
    from ollama_distributed.client.sync import SyncClient

START_S = 30.0
"""The server may have to look its provider up first."""
WAIT_S = 300.0
"""For a password and a second factor at the provider."""
_DONE = b"You are signed in. You may close this page and go back to the command line.\n"
_OTHER = b"Nothing is here.\n"


def sign_in_by_browser(client: SyncClient, target: Target) -> LoginAnswer:
    """
    Raises:
        Problem: nobody came back in time.
        ClientError: the server takes no sign-in by browser, or not this one.
    """
    verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
    digest = hashlib.sha256(verifier.encode()).digest()
    challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
    with _Waiting(state) as waiting:
        query = urlencode({"port": waiting.server_port, "challenge": challenge, "state": state})
        path = f"/api/v1/auth/oidc/start?{query}"
        ask(target._replace(api_key=None), path, timeout_s=START_S, redirects=True)
        start = target.url + path
        output.note(f"Sign in there, in a browser on this machine:\n  {start}")
        webbrowser.open(start)
        return client.auth.redeem(waiting.code(), verifier)


class _Waiting(HTTPServer):
    def __init__(self, state: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state
        self.found = ""
        self.timeout = 1.0

    def code(self) -> str:
        deadline = time.monotonic() + WAIT_S
        while not self.found:
            if time.monotonic() > deadline:
                raise Problem(f"nobody came back from the browser within {WAIT_S:.0f} s")
            self.handle_request()
        return self.found


class _Handler(BaseHTTPRequestHandler):
    server: _Waiting
    timeout = 5.0
    """A connection that says nothing holds up the next one no longer."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        code, state = query.get("code", [""])[0], query.get("state", [""])[0]
        ours = bool(code) and hmac.compare_digest(state.encode(), self.server.state.encode())
        if ours:
            self.server.found = code
        self.send_response(200 if ours else 404)
        self.send_header("content-type", "text/plain; charset=utf-8")
        self.send_header("cache-control", "no-store")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(_DONE if ours else _OTHER)

    def log_message(self, *_: object) -> None:
        """Requests hold codes."""
