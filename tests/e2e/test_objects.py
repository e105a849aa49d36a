"""Another's object is as one that is not there (S-07, BOLA): two teams, every place of every route where
the name of an object can stand.

Routes and places are those of the node's own OpenAPI document; one that `PLACES` does not tell of fails
the test. Each caller of the team blue asks for what is red's, and for what nobody has: status, headers
and body are the same. Left out are callers that see everybody's objects of a kind (`SEES`). No list that
blue reads names one. What is red's is as it was afterwards, and red itself is answered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import httpx
import pytest
import yaml

from ollama_distributed.base.identity import Role
from ollama_distributed.client.sync import SyncClient
from ollama_distributed.gateway.openapi import HOT_BODIES
from ollama_distributed.models.scripted import scripted_model
from tests.e2e.conftest import add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess, running_node, until

pytestmark = pytest.mark.e2e

PLACES = """
/api/blobs/*                path:digest                            blob
/api/create                 body:files,body:adapters,body:draft_files  blob
/api/create                 body:model,body:name,body:from         model
/api/create                 body:*                                 -
/api/copy                   body:*                                 model
/api/delete                 body:*                                 model
/api/pull                   body:*                                 model
/api/push                   body:*                                 model
/api/show                   body:*                                 model
/api/v1/audit               query:action,query:result,query:before -
/api/v1/audit               query:*                                record
/api/v1/auth/sessions/*     path:id                                session
/api/v1/auth/*              *                                      -
/api/v1/bundles             query:*                                model
/api/v1/cluster/join        body:token                             -
/api/v1/cluster/tokens      body:*                                 -
/api/v1/cluster/tokens/*    path:id                                token
/api/v1/cluster/*           body:*                                 node
/api/v1/config*             body:*                                 -
/api/v1/keys                body:name,body:team                    -
/api/v1/keys                body:policy                            policy
/api/v1/keys/*              path:id                                key
/api/v1/models/*            path:name                              model
/api/v1/models/*            body:labels                            -
/api/v1/models/*            body:node*,query:nodes                 node
/api/v1/nodes/*             path:id                                node
/api/v1/policies/explain    body:key                               policy
/api/v1/policies/{name}     path:name                              policy
/api/v1/policies*           body:*                                 -
/api/v1/queue               query:node                             queue
/api/v1/route/explain       body:request_id                        request
/api/v1/route/explain       body:model                             model
/api/v1/route/explain       body:*                                 -
/api/v1/transfers/*         path:id                                transfer
/api/v1/usage               query:key                              key-used
/api/v1/usage               query:team                             team-used
/api/v1/usage               query:*                                -
/api/v1/users/*             path:name                              user
/api/v1/users*              body:*                                 -
/v1/batches                 body:input_file_id                     file
/v1/batches                 body:*                                 -
/v1/batches                 query:after                            batch
/v1/batches/*               path:id                                batch
/v1/files                   query:after                            file
/v1/files                   query:*,body:*                         -
/v1/files/*                 path:id                                file
/v1/models/*                path:model                             model
"""
"""Path, places, and the kind of object that they name; the first that fits counts. -: nothing that is
anybody's (one's own credentials, free text, the name of what is made). `body:model` of inference is one
of each such route."""
SEES: Mapping[str, frozenset[str]] = {
    "model": frozenset({"user", "operator", "viewer", "person"}),
    "blob": frozenset({"user", "operator", "viewer", "person"}),
    "policy": frozenset({"operator", "bound"}),
    "queue": frozenset({"user", "operator", "viewer", "person"}),
    "record": frozenset({"operator"}),
    "token": frozenset({"operator", "bound"}),
    "node": frozenset({"operator", "bound", "viewer"}),
    "transfer": frozenset({"operator", "viewer"}),
    "request": frozenset({"operator"}),
    "key-used": frozenset({"operator", "viewer"}),
    "team-used": frozenset({"operator", "viewer"}),
}
"""Kind -> who sees all of them: models are the cluster's, but for those whom a policy binds to some."""
BODIES: Mapping[str, Mapping[str, object]] = {
    "/api/copy": {"source": "open", "destination": "open-b"},
    "/api/create": {"model": "open-b", "from": "open"},
    "/api/v1/route/explain": {"prompt": "p"},
    "/v1/batches": {"endpoint": "/v1/chat/completions", "completion_window": "24h"},
}
"""What else a good request says."""
ROW = b'{"custom_id":"1","method":"POST","url":"/v1/completions","body":{"model":"covert","prompt":"p"}}\n'
ROLES: tuple[Role, ...] = ("user", "operator", "viewer")
PASSWORD = "correct horse battery"
ASKED = {
    "model": "covert",
    "prompt": "of red",
    "messages": [{"role": "user", "content": "of red"}],
    "max_tokens": 9,
}
ANSWERS = {
    path: ASKED for path in HOT_BODIES if path.endswith(("generate", "chat", "completions", "messages"))
}
ANSWERS["/v1/responses"] = {"model": "covert", "input": "of red"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("objects")
    config = folder / "node.yaml"
    engine = {"name": "echo", "kind": "echo", "options": {"models": ["open", "covert"]}}
    settings = {"engines": [engine], "preload": ["covert"], "cluster_listen": "127.0.0.1", "mdns": False}
    config.write_text(yaml.safe_dump(settings))
    with running_node(folder / "node", "--config", str(config)) as started:
        with started.admin() as client:
            until(lambda: client.cluster.status().status == "ok", SOON_S, "a cluster that takes changes")
        yield started


class Red:
    """What the team red has, and the names of it by kind."""

    def __init__(self, node: NodeProcess, admin: SyncClient) -> None:
        made = admin.keys.create(name="red", team="crimson")
        self.key, self.neighbour = made.key, admin.keys.create(team="crimson").key
        admin.policies.create("rules-of-red")
        admin.users.create("anneliese", PASSWORD, team="crimson")
        gguf = scripted_model("of red")
        add_model(node.url, "covert-too", gguf)
        with SyncClient(node.url) as ann, SyncClient(node.url, self.key) as own:
            session = ann.auth.login("anneliese", PASSWORD)
            self.session = session.token
            file = own.files.upload(ROW, filename="red.jsonl").id
            batch = own.batches.create(file, "/v1/completions").id
        self.requests = {path: f"red-{number}" for number, path in enumerate(ANSWERS)}
        self.has: Mapping[str, str] = {
            "model": "covert",
            "blob": f"sha256:{hashlib.sha256(gguf).hexdigest()}",
            "policy": "rules-of-red",
            "key": made.row.id,
            "key-used": made.row.id,
            "team-used": "crimson",
            "user": "anneliese",
            "session": session.session,
            "file": file,
            "batch": batch,
            "token": admin.cluster.create_token().id,
            "node": node.id,
            "queue": node.id,
            "record": made.row.id,
            "transfer": "t-0123456789",
            "request": self.requests["/api/generate"],
        }

    def unseen_by(self, caller: str) -> set[str]:
        seen = {name for kind, name in self.has.items() if caller in SEES.get(kind, ())}
        return {*self.has.values(), self.key, self.session} - seen

    def asks(self, http: httpx.Client, path: str) -> None:
        headers = {"authorization": f"Bearer {self.key}", "x-request-id": self.requests[path]}
        assert http.post(path, json=ANSWERS[path], headers=headers).status_code == 200, path


def callers_of(node: NodeProcess, admin: SyncClient) -> Mapping[str, str]:
    """The credentials of the team blue. Those that a policy binds have the models `open*` only."""
    admin.policies.create("some", models=["open*"])
    found: dict[str, str] = {role: admin.keys.create(role=role, team="blue").key for role in ROLES}
    found["bound"] = admin.keys.create(role="operator", team="blue", policy="some").key
    admin.users.create("bob", PASSWORD, team="blue")
    with SyncClient(node.url) as bob:
        found["person"] = bob.auth.login("bob", PASSWORD).token
    return found


# ── places ──────────────────────────────────────────────────────────────────────────

ROWS = [line.split() for line in PLACES.strip().splitlines()]


def kind_of(path: str, place: str) -> str:
    for row_path, places, kind in ROWS:
        if fnmatchcase(path, row_path) and any(fnmatchcase(place, one) for one in places.split(",")):
            return kind
    raise AssertionError(f"{place} of {path}: PLACES does not say whose objects it names")


def places_of(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Method, path, place and kind, of all texts that a request may hold."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path in HOT_BODIES:
                yield method, path, "body:model", "model"
                continue
            texts = [
                f"{one['in']}:{one['name']}"
                for one in operation.get("parameters", ())
                if _is_text(one["schema"])
            ]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                texts += [
                    f"body:{name}" for name in _texts(content["schema"], document["components"]["schemas"])
                ]
            for place in texts:
                kind = kind_of(path, place)
                if kind != "-":
                    yield method, path, place, kind


def lists_of(document: Mapping[str, Any], node_id: str) -> Iterator[str]:
    """Paths that can be read at once, about the model `open` or the node where they are about one."""
    for path, operations in document["paths"].items():
        if "get" in operations and not path.endswith(("/watch", "/ws")):
            yield re.sub(r"\{(name|model)\}", "open", path).replace("{id}", node_id)


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Or a list of texts, or texts by name."""
    inner = schema.get("items") or schema.get("additionalProperties") or {}
    return "string" in (schema.get("type"), inner.get("type") if isinstance(inner, dict) else "")


def _texts(schema: Mapping[str, Any], named: Mapping[str, Any]) -> Iterable[str]:
    if "$ref" in schema:
        schema = named[schema["$ref"].rpartition("/")[2]]
    for name, one in schema.get("properties", {}).items():
        for form in one.get("anyOf", [one]):
            if _is_text(form):
                yield name
                break
            inner = form.get("items", form)
            if "$ref" in inner:
                yield from (f"{name}.{below}" for below in _texts(inner, named))


# ── asking ──────────────────────────────────────────────────────────────────────────


def ask(http: httpx.Client, key: str, method: str, path: str, place: str, named: str) -> tuple[object, ...]:
    """All that the answer tells, but for the name that was asked for."""
    where, _, field = place.partition(":")
    url = path
    for name in ("name", "model"):
        url = url.replace(f"{{{name}}}", named if where == "path" else "open")
    url = url.replace("{id}", named).replace("{digest}", named)
    body: dict[str, object] = {**(ASKED if path in HOT_BODIES else BODIES.get(path, {})), "stream": False}
    if where == "body":
        values = {"files": {"a.gguf": named}, "adapters": {"a.gguf": named}, "draft_files": {"a.gguf": named}}
        lists = ("nodes", "lose")
        if field in values:
            del body["from"]
        body[field] = values.get(field, [named] if field in lists else named)
    response = http.request(
        method,
        url,
        params={field: named} if where == "query" else {},
        json=body if method not in ("get", "head") else None,
        headers={"authorization": f"Bearer {key}", "x-request-id": "probe"},
    )
    assert response.status_code < 500, (method, path, place, response.text)
    headers = [(name, text.replace(named, "…")) for name, text in response.headers.items() if name != "date"]
    return response.status_code, headers, response.text.replace(named, "…")


def nobodys(name: str) -> str:
    """As long, and of the same letters."""
    return name[:-1] + ("a" if name[-1] != "a" else "b")


def take_up(http: httpx.Client, key: str, path: str, request_id: str) -> tuple[int, str]:
    """Ask for the rest of an answer from its begin."""
    headers = {"authorization": f"Bearer {key}", "x-request-id": request_id, "x-ollama-resume-at": "0"}
    answer = http.post(path, json=ANSWERS[path], headers=headers)
    return answer.status_code, answer.text.replace(request_id, "…")


def test_another_s_object_is_as_none(node: NodeProcess) -> None:
    with node.admin() as admin, node.http() as http:
        red, blue = Red(node, admin), callers_of(node, admin)
        document = http.get("/openapi.json").json()
        red.asks(http, "/api/generate")
        asked: set[str] = set()
        differs: list[tuple[object, ...]] = []
        for method, path, place, kind in places_of(document):
            asked.add(kind)
            theirs = red.has[kind]
            neighbours = {"neighbour": red.neighbour} if kind in ("file", "batch") else {}
            for caller, key in {**blue, **neighbours}.items():
                if caller not in SEES.get(kind, ()):
                    told = ask(http, key, method, path, place, theirs)
                    none = ask(http, key, method, path, place, nobodys(theirs))
                    if told != none:
                        differs.append((caller, method, path, place, told, none))
        assert not [one[:4] for one in differs], differs
        assert asked == red.has.keys()

        for path, request_id in red.requests.items():
            red.asks(http, path)
            for caller, key in {**blue, "neighbour": red.neighbour}.items():
                told, none = (take_up(http, key, path, one) for one in (request_id, nobodys(request_id)))
                assert told == none, (caller, path)
                assert told[0] in (403, 404), (caller, path)
            assert take_up(http, red.key, path, request_id)[0] == 200, path

        tells = []
        for path in lists_of(document, node.id):
            for caller, key in blue.items():
                shown = http.get(path, headers={"authorization": f"Bearer {key}"}).text
                tells += [(caller, path, name) for name in red.unseen_by(caller) if name in shown]
        # An operator reads of everybody in the audit.
        assert not [one for one in tells if one[:2] != ("operator", "/api/v1/audit")]

        _all_is_as_it_was(http, admin, red)


def _all_is_as_it_was(http: httpx.Client, admin: SyncClient, red: Red) -> None:
    """And who may see it does, or nothing was shown above."""
    key = {"authorization": f"Bearer {red.key}"}
    for kind, path in (
        ("file", "/v1/files/{}/content"),
        ("batch", "/v1/batches/{}"),
        ("model", "/v1/models/{}"),
    ):
        found = http.get(path.format(red.has[kind]), headers=key)
        assert found.status_code == 200, (kind, found.text)
        assert "cancel" not in found.json().get("status", "") if kind == "batch" else True
    assert http.head(f"/api/blobs/{red.has['blob']}").status_code == 200
    session = http.get("/api/v1/auth/session", headers={"authorization": f"Bearer {red.session}"})
    assert session.json()["session"] == red.has["session"]
    assert admin.keys.get(red.has["key"]).status == "valid"
    assert not admin.users.get("anneliese").disabled
    assert admin.policies.get("rules-of-red").name == "rules-of-red"
    assert red.has["token"] in {one.id for one in admin.cluster.tokens()}
