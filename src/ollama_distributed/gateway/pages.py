"""The pages for people: front page, API documentation, the end of a sign-in. No script, nothing from
elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

from ollama_distributed.gateway.ports import VersionInfo

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1a1a1a;background:#fff}code,pre{font:14px/1.45 ui-monospace,monospace}"
    "pre{overflow-x:auto;padding:.75rem;background:#f4f4f5;border-radius:6px}"
    "details{border-bottom:1px solid #ddd;padding:.35rem 0}summary{cursor:pointer}"
    "b{display:inline-block;min-width:4.5rem}h2{margin-top:2rem}"
    "@media(prefers-color-scheme:dark){body{color:#eee;background:#18181b}pre{background:#27272a}"
    "details{border-color:#3f3f46}a{color:#93c5fd}}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def page_headers() -> dict[str, str]:
    return {
        "content-security-policy": (
            f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def front_page(version: VersionInfo) -> str:
    engines = "".join(
        f"<li>{html.escape(f'{one.name} {one.version} ({one.variant}) {one.instruction_set}'.strip())}</li>"
        for one in version.engines
    )
    return _page(
        "Ollama Distributed",
        f"<h1>Ollama is running</h1>"
        f"<p>Ollama Distributed {html.escape(version.version)}, node {html.escape(version.node or '?')}. "
        f"It speaks the Ollama, OpenAI and Anthropic APIs and its own under <code>/api/v1</code>.</p>"
        f"<ul>{engines}</ul>"
        '<p><a href="/docs">API documentation</a> · <a href="/openapi.json">OpenAPI document</a> · '
        '<a href="/api/tags">Models</a> · <a href="/api/ps">Models in memory</a> · '
        '<a href="/metrics">Metrics</a></p>',
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


def signed_in_page(name: str) -> str:
    """Leads to the front page by itself: a link of this site, so the new cookie goes along (it would
    not with a redirect, which still counts as the provider's)."""
    return _page(
        "Signed in",
        f'<h1>Signed in</h1><p>You are signed in as <b>{html.escape(name)}</b>. <a href="/">Go on</a></p>',
        head='<meta http-equiv="refresh" content="0;url=/">',
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


def _page(title: str, body: str, head: str = "") -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{head}'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{body}</body></html>"
    )
