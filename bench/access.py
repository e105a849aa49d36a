"""Keys and doors of three whole nodes: `python -m bench.access`, `make accept-access`.

1. Every route of the live OpenAPI document x every kind of caller, at each of three nodes.
2. Every listening socket of the three nodes and their children: which answer somebody without a
   node certificate, and what. A socket that is not on the list below fails.
3. Every listening socket that speaks TLS x {no certificate, of a foreign CA, expired, of a node that was
   removed, of a node, of a server}: every route of the API, every route between nodes, the bus.
4. A key that is revoked at one node is refused by all within 5 s.

Exits 1 where one of these does not hold. What a key's look-up costs and tells: `bench.side_channels`.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil
from tests.callers import CALLERS, LOGINS, REFUSED, STRANGERS, Caller, Line, contexts, said
from tests.nodes import NodeProcess, Nodes, until

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.roles import MAY, Right
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.tls import trusting_nobody
from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.rights import ROWS
from ollama_distributed.base.identity import Role
from ollama_distributed.cluster.identity.wire import JOIN_PATH
from ollama_distributed.gateway.rights import PUBLIC, resource_of

REVOKED_S = 5.0
KEYED: tuple[Role, ...] = ("admin", "operator", "user", "viewer")

failures: list[str] = []


def check(held: bool, text: str) -> None:
    if not held:
        failures.append(text)
        print("FAILED:", text)


# ── routes ──────────────────────────────────────────────────────────────────────────


def routes_of(client: httpx.Client) -> list[tuple[str, str]]:
    """Of the live document; `{id}` in a path is filled in."""
    document = client.get("/openapi.json").json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def walk_routes(node: NodeProcess, keys: dict[str, str], routes: list[tuple[str, str]]) -> int:
    """Cells asked. What is allowed is asked only where it changes nothing."""
    asked = 0
    proxy = {"x-forwarded-for": "192.0.2.1"}  # as if from elsewhere: never the role `local`
    with httpx.Client(base_url=node.url, timeout=60, headers=proxy) as client:

        def ask(method: str, path: str, key: str) -> int:
            nonlocal asked
            asked += 1
            headers = {"authorization": f"Bearer {key}"} if key else {}
            body = "{}" if method in ("POST", "PUT", "PATCH") else None
            headers |= {"content-type": "application/json"} if body else {}
            real = re.sub(r"\{[^}]*\}", "zzz", path)
            with client.stream(method, real, headers=headers, content=body) as answer:
                return answer.status_code

        for method, path in routes:
            signing_in = path in PUBLIC and path.startswith("/api/v1/auth/")
            for kind in ("none", "malformed", "expired", "revoked", "stranger"):
                status = ask(method, path, keys.get(kind, ""))
                if not signing_in:
                    check((status == 401) == (path not in PUBLIC), f"{method} {path} by {kind}: {status}")
            if path in PUBLIC:
                continue
            shown = re.sub(r"\{(name|model)\}", r"{\1:path}", path)
            resource = resource_of(method, shown)
            for kind in (*KEYED, "other tenant"):
                role: Role = "user" if kind == "other tenant" else kind  # type: ignore[assignment]  # of KEYED
                verbs = {right.verb for right in MAY[role] if right.resource == resource}
                if not verbs:
                    status = ask(method, path, keys[kind])
                    check(status == 403, f"{method} {path} by {kind}: {status}")
                elif (
                    method == "GET"
                    and Right("read", resource) in MAY[role]
                    and not path.endswith(("/watch", "/bundle", "/bundles"))
                ):
                    status = ask(method, path, keys[kind])
                    check(status not in (401, 403), f"{method} {path} by {kind}: {status}")
    return asked


# ── sockets ─────────────────────────────────────────────────────────────────────────


def sockets_of(node: NodeProcess) -> dict[tuple[str, int], str]:
    """Listening address -> program."""
    own = psutil.Process(node.pid)
    found: dict[tuple[str, int], str] = {}
    for process in (own, *own.children(recursive=True)):
        for one in process.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                found[one.laddr.ip, one.laddr.port] = "node" if process is own else process.name()
    return found


def said_to_nobody(host: str, port: int, *, tls: bool, line: bytes) -> bytes:
    """What the socket answers to one line of somebody without a certificate."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((host, port), timeout=5) as plain:
            if not tls:
                plain.sendall(line)
                plain.settimeout(3)
                return plain.recv(4096)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(plain) as secure:
                secure.sendall(line)
                secure.settimeout(3)
                return secure.recv(4096)
    except OSError:
        return b""


def walk_sockets(node: NodeProcess) -> None:
    api = {httpx.URL(node.url).port, secure_port(node)}
    request = b"%b %b HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    for (host, port), program in sorted(sockets_of(node).items()):
        if port in api:
            print(f"  {host}:{port} {program}: the API, walked route by route")
            continue
        plain = said_to_nobody(host, port, tls=False, line=request % (b"GET", b"/"))
        secure = said_to_nobody(host, port, tls=True, line=request % (b"GET", b"/"))
        nats = said_to_nobody(host, port, tls=False, line=b"CONNECT {}\r\nPING\r\n")
        ok = not plain.startswith(b"HTTP/1.1 2") and not secure.startswith(b"HTTP/1.1 2")
        check(ok, f"{host}:{port} ({program}) answers somebody without a certificate")
        check(
            b"PONG" not in nats and b"+OK" not in nats, f"{host}:{port} ({program}) speaks NATS with anyone"
        )
        known = program.startswith("nats") or program == "node"
        check(known, f"{host}:{port} is opened by {program}, which is not on the list")
        print(f"  {host}:{port} {program}: plain {plain[:30]!r}, TLS {secure[:30]!r}")


# ── certificates ────────────────────────────────────────────────────────────────────


def secure_port(node: NodeProcess) -> int:
    """Of the API with TLS."""
    told = re.search(r"https://[^\"]*:(\d+)", node.log_file.read_text())
    assert told, "the node does not say where it listens"
    return int(told[1])


def certificates(lab: Nodes, folder: Path) -> Mapping[Caller, ssl.SSLContext]:
    """Of this cluster: by its own CA's key, and those of a node that was a member and is not any more."""
    keys, given = (files := IdentityFiles(lab["n1"].data_dir)).cluster_keys(), files.credentials()
    assert keys is not None
    assert given is not None
    made = dict(contexts(folder, keys, given.facts.cluster))
    gone = lab.join("gone", "n1", role="node")
    gone_files = IdentityFiles(gone.data_dir)
    made["revoked"] = trusting_nobody()
    made["revoked"].load_cert_chain(gone_files.certificate, gone_files.key)
    with lab["n1"].admin() as admin:

        def removed() -> bool:
            admin.nodes.remove(gone.id, force=True)
            return True

        until(removed, 30, "the removal of a node that is known")
    gone.kill()
    return made


async def walk_certificates(
    node: NodeProcess, made: Mapping[Caller, ssl.SSLContext], routes: list[tuple[str, str]]
) -> int:
    cells = 0
    for caller in CALLERS:
        line = Line(secure_port(node), made[caller])
        for method, path in routes:
            if path in PUBLIC and path.startswith("/api/v1/auth/"):
                continue
            real = re.sub(r"\{[^}]*\}", "zzz", path)
            status = await line.ask(method, real, body=b"{}", headers="x-forwarded-for: 192.0.2.1\r\n")
            cells += 1
            check((status == 401) == (path not in PUBLIC), f"{method} {path} by {caller} over TLS: {status}")
        line.close()
    for (_, port), program in sorted(sockets_of(node).items()):
        if program == "node" and port not in (httpx.URL(node.url).port, secure_port(node)):
            cells += await walk_door(port, made, routes)
        elif program.startswith("nats"):
            for caller in CALLERS:
                for login in LOGINS:
                    heard = await said(port, made[caller], login)
                    cells += 1
                    check(
                        b"PONG" not in heard and (b"INFO" in heard) <= (caller not in STRANGERS),
                        f"the bus at {port} says to {caller}: {heard[-100:]!r}",
                    )
    return cells


async def walk_door(port: int, made: Mapping[Caller, ssl.SSLContext], routes: list[tuple[str, str]]) -> int:
    """The door between nodes."""
    cells = 0
    for caller in CALLERS:
        line = Line(port, made[caller])
        refused = REFUSED if caller in ("foreign CA", "expired") else 403
        for route, callers in ROWS.items():
            may = caller == "server" or (caller == "node" and callers == "members")
            expected = 400 if may else refused  # an empty body says nothing
            status = await line.ask("POST", wire.PREFIX + route)
            cells += 1
            check(status == expected, f"{route} by {caller}: {status}, not {expected}")
        for method, path in routes:
            expected = 404 if caller in ("node", "server") else refused
            status = await line.ask(method, re.sub(r"\{[^}]*\}", "zzz", path), body=b"{}")
            cells += 1
            check(status == expected, f"{method} {path} at the door between nodes by {caller}: {status}")
        line.close()
    line = Line(port, made["none"])
    check(await line.ask("GET", JOIN_PATH) == 200, "the door does not show its CA to who wants to join")
    check(await line.ask("POST", JOIN_PATH, body=b"{}") == 400, "who joins without a token is let in")
    line.close()
    return cells + 2


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as lab:
        others = ("--listen", "0.0.0.0:0")  # as other machines reach it: with TLS
        nodes = [lab.serve("n1", *others)]
        nodes += [lab.join(name, "n1", *others) for name in ("n2", "n3")]
        with nodes[0].admin() as admin:
            keys: dict[str, str] = {role: admin.keys.create(name=role, role=role).key for role in KEYED}
            keys["other tenant"] = admin.keys.create(role="user", team="others").key
            keys["revoked"] = admin.keys.create(role="admin").key
            keys["expired"] = admin.keys.create(role="admin", ttl_s=0.5).key
            keys["stranger"] = make_key("admin", now=0.0)[0]
            keys["malformed"] = keys["admin"][:-1] + "!"
            admin.keys.revoke(keys["revoked"].split("_")[1])
            went = admin.keys.create(role="user").key

            def statuses(key: str) -> list[int]:
                headers = {"authorization": f"Bearer {key}"}
                return [
                    httpx.get(node.url + "/api/v1/auth/whoami", headers=headers).status_code for node in nodes
                ]

            until(lambda: statuses(went) == [200] * 3, 30, "a key that all know")
            began = time.monotonic()
            admin.keys.revoke(went.split("_")[1])
            until(lambda: statuses(went) == [401] * 3, 30, "a key that nobody takes")
            took = time.monotonic() - began
            print(f"revoked at n1, refused by all three after {took:.2f} s")
            check(took <= REVOKED_S, f"a revoked key was taken for {took:.1f} s")
            until(lambda: statuses(keys["expired"]) == [401] * 3, 30, "the end of a key")
        headers = {"authorization": f"Bearer {keys['admin']}"}
        with httpx.Client(base_url=nodes[0].url, headers=headers) as client:
            routes = routes_of(client)
        for node in nodes:
            cells = walk_routes(node, keys, routes)
            print(f"{node.data_dir.name}: {len(routes)} routes, {cells} cells")
            walk_sockets(node)
        made = certificates(lab, Path(folder))
        for node in nodes:
            cells = asyncio.run(walk_certificates(node, made, routes))
            print(f"{node.data_dir.name}: {cells} cells with certificates of {len(CALLERS)} kinds")
    print("FAILED" if failures else "all held")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
