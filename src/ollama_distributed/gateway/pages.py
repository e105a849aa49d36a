"""The pages for people: sign-in, who one is, API documentation, what went wrong. Scripts and styles are
files of this node, nothing is inline and nothing comes from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ollama_distributed.gateway.gate import Head

HOME, SIGN_IN = "/ui/", "/ui/sign-in"
ASSETS: Mapping[str, str] = {
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    "sign-in.js": "text/javascript",
    "account.js": "text/javascript",
}
"""Files below `/ui/` that pages load: name -> media type."""
_FOR_PEOPLE = frozenset({"/", "/docs", "/api/v1/auth/oidc/start", "/api/v1/auth/oidc/callback"})
"""Paths that a person opens in a browser, and so should be told in words what went wrong."""
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Even a page with a mistake runs no text as a script: CSP level 3, and Trusted Types."""


def page_headers() -> dict[str, str]:
    return {
        "content-security-policy": _POLICY,
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "same-origin",
        "cache-control": "no-cache",
    }


def asset(name: str) -> str:
    """A file of this package's `ui` folder."""
    return files(__package__).joinpath("ui", name).read_text("utf-8")


def wants_page(head: Head) -> bool:
    """Whether a person asks, in a browser."""
    path = head.path
    return (path in _FOR_PEOPLE or path.startswith("/ui/")) and accepts_html(head)


def accepts_html(head: Head) -> bool:
    """Only browsers say so; Ollama's clients look for its plain text."""
    return "text/html" in head.headers.get("accept", "")


def sign_in_page(template: str, provider: str) -> str:
    """`provider`: who signs people in beside passwords; empty: nobody."""
    link = ""
    if provider:
        link = (
            '<p><a class="button other" href="/api/v1/auth/oidc/start">'
            f"Sign in with {html.escape(provider)}</a></p>"
        )
    return template.replace("<!--oidc-->", link)


def problem_page(message: str, request_id: str) -> str:
    said = html.escape(message[:1].upper() + message[1:])
    return _page(
        "That did not work",
        f'<h1>That did not work</h1><p class="problem" role="alert">{said}.</p>'
        f'<p><a href="{SIGN_IN}">Sign in</a> · <a href="{HOME}">Start</a></p>'
        f'<p class="quiet">Request {html.escape(request_id)}</p>',
    )


def docs_page(document: Mapping[str, Any]) -> str:
    """The OpenAPI document as a list of routes, each with the schema of its body."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    schemas = "".join(
        f'<details id="{html.escape(name)}"><summary><code>{html.escape(name)}</code></summary>'
        f"<pre>{html.escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre></details>"
        for name, schema in document["components"]["schemas"].items()
    )
    sections = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(rows)}" for tag, rows in by_tag.items())
    title = html.escape(document["info"]["title"])
    return _page(
        f"{title}: API",
        f'<h1>{title}: API</h1><p>Machine-readable: <a href="/openapi.json">/openapi.json</a></p>'
        f"{sections}<h2>Bodies</h2>{schemas}",
    )


def to_program_page(url: str) -> str:
    """A person must say yes: a page elsewhere could have started this sign-in."""
    return _page(
        "Sign in a program",
        "<h1>Sign in a program?</h1><p>A program on this computer wants to be signed in as you. "
        "If you have just run <code>ollama-distributed login --browser</code>, go on; else close this page."
        f'</p><p><a href="{html.escape(url)}" rel="noreferrer">Sign the program in</a></p>',
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = ""
    content = operation.get("requestBody", {}).get("content", {})
    for kind, media in content.items():
        name = media["schema"].get("$ref", "").rpartition("/")[2]
        link = f'<a href="#{html.escape(name)}"><code>{html.escape(name)}</code></a>' if name else "bytes"
        body = f"<p>Body: {link} as <code>{html.escape(kind)}</code></p>"
    return (
        f"<details><summary><b>{html.escape(method.upper())}</b> <code>{html.escape(path)}</code> "
        f"{html.escape(operation['summary'])}</summary>{body}</details>"
    )


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/ui/icon.svg" type="image/svg+xml">'
        f'<link rel="stylesheet" href="/ui/style.css"></head><body><main>{body}</main></body></html>'
    )
