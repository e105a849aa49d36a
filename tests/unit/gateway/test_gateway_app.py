"""The app's cold routes over ASGI: Ollama's management, the seed's, OpenAI's list, the node."""

import json
import re
from contextlib import asynccontextmanager

import httpx
import pytest
from tests.gateway_bench import HELLO, gateway

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base import errors as e
from ollama_distributed.catalog.wire import CreateStatus, ShownModel, details
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.rights import PUBLIC
from ollama_distributed.models.spec import Architecture, ModelSpec
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

DIGEST = "sha256:" + "a" * 64
ENGINE = EngineInfo(name="llama.cpp", variant="wheel", version="b10488", instruction_set="AVX2")


def spec(name: str, modified_at: float) -> ModelSpec:
    return ModelSpec(
        name=f"registry.ollama.ai/{name}",
        display=name.removeprefix("library/"),
        digest="d" * 64,
        size_bytes=1234,
        modified_at=modified_at,
        architecture=Architecture(
            name="llama",
            layers=2,
            context_tokens=2048,
            embedding_length=64,
            heads=4,
            kv_heads=4,
            key_length=16,
            value_length=16,
            parameters=135_000_000,
            file_type="Q4_1",
        ),
    )


OLD = spec("library/smollm2:latest", 1_700_000_000.0)
NEW = spec("acme/tiny:v1", 1_700_000_100.5)


class FakeCatalog:
    def __init__(self) -> None:
        self.calls = []
        self.statuses = [CreateStatus(status="parsing GGUF"), CreateStatus(status="success")]
        self.blobs = {}

    def list(self):
        return [OLD, NEW]

    async def resolve(self, name):
        for one in self.list():
            if name in (one.display, one.name):
                return one
        raise e.ModelNotFound(f"model '{name}' not found")

    async def show(self, name, *, verbose=False):
        self.calls.append(("show", name, verbose))
        one = await self.resolve(name)
        return ShownModel(
            spec=one,
            details=details(one),
            license="MIT",
            modelfile="FROM x",
            parameters='stop  "x"',
            template="",
            system="",
            renderer="",
            parser="",
            messages=(),
            model_info={"general.architecture": "llama"},
            projector_info=None,
            tensors=[],
            capabilities=("completion",),
            modified_at=one.modified_at,
            requires="",
        )

    async def create(self, request):
        self.calls.append(("create", request))
        for status in self.statuses:
            if isinstance(status, Exception):
                raise status
            yield status

    async def copy(self, source, destination):
        self.calls.append(("copy", source, destination))
        if all(source not in (one.display, one.name) for one in self.list()):
            raise e.ModelNotFound(f'model "{source}" not found')  # the catalogue's own words

    async def delete(self, name):
        self.calls.append(("delete", name))
        await self.resolve(name)

    async def has_blob(self, digest):
        return digest in self.blobs

    async def put_blob(self, digest, chunks, size=0):
        data = b"".join([chunk async for chunk in chunks])
        if data == b"wrong":
            raise e.DigestMismatch(f'digest mismatch, expected "{digest}"')
        made = digest not in self.blobs
        self.blobs[digest] = data
        return made


class FakeResidents:
    def __init__(self) -> None:
        self.unloaded = []

    def loaded(self):
        rows = {"spec": OLD, "memory_bytes": 300, "vram_bytes": 100, "context_tokens": 4096, "slots": 2}
        return [
            LoadedModel(name="soon", slots_busy=1, expires_at=1_700_000_300.0, engine=ENGINE, **rows),
            LoadedModel(name="stays", slots_busy=0, expires_at=None, engine=ENGINE, **rows),
        ]

    async def unload(self, name):
        self.unloaded.append(name)


class World:
    def __init__(self, **extra):
        self.catalog = FakeCatalog()
        self.residents = FakeResidents()
        self.app = gateway(ScriptedInference(HELLO), catalog=self.catalog, residents=self.residents, **extra)

    @asynccontextmanager
    async def client(self, peer="127.0.0.1"):
        transport = httpx.ASGITransport(self.app, client=(peer, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            yield client


async def ask(method, path, *, peer="127.0.0.1", world=None, **extra):
    async with (world or World()).client(peer) as client:
        return await client.request(method, path, **extra)


# ── Ollama ──────────────────────────────────────────────────────────────────────────


async def test_tags_are_newest_first():
    rows = (await ask("GET", "/api/tags")).json()["models"]
    assert [row["name"] for row in rows] == ["acme/tiny:v1", "smollm2:latest"]
    assert rows[0] == {
        "name": "acme/tiny:v1",
        "model": "acme/tiny:v1",
        "modified_at": "2023-11-14T22:15:00.500000Z",
        "size": 1234,
        "digest": "d" * 64,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": rows[0]["details"]["parameter_size"],
            "quantization_level": "Q4_1",
            "context_length": 2048,
            "embedding_length": 64,
        },
        "capabilities": ["completion"],
    }


async def test_ps_shows_the_longest_first():
    rows = (await ask("GET", "/api/ps")).json()["models"]
    assert [row["expires_at"] for row in rows] == [
        "2318-01-01T00:00:00.000000Z",
        "2023-11-14T22:18:20.000000Z",
    ]
    assert rows[1]["size"] == 300
    assert rows[1]["size_vram"] == 100
    assert rows[1]["context_length"] == 4096
    assert rows[1]["engine"]["instruction_set"] == "AVX2"


@pytest.mark.parametrize("field", ["model", "name"])
async def test_show(field):
    world = World()
    shown = (
        await ask("POST", "/api/show", json={field: "smollm2:latest", "verbose": True}, world=world)
    ).json()
    assert world.catalog.calls == [("show", "smollm2:latest", True)]
    assert shown["license"] == "MIT"
    assert shown["model_info"] == {"general.architecture": "llama"}
    assert shown["capabilities"] == ["completion"]
    assert "system" not in shown
    assert "messages" not in shown


@pytest.mark.parametrize("path", ["/api/show", "/api/create", "/api/copy"])
async def test_missing_bodies(path):
    answer = await ask("POST", path)
    assert (answer.status_code, answer.json()) == (400, {"error": "missing request body"})


async def test_unknown_models_have_their_spelling():
    assert (await ask("POST", "/api/show", json={"model": "x"})).json() == {"error": "model 'x' not found"}
    copied = await ask("POST", "/api/copy", json={"source": "x", "destination": "y"})
    assert (copied.status_code, copied.json()) == (404, {"error": 'model "x" not found'})
    deleted = await ask("DELETE", "/api/delete", json={"model": "x"})
    assert (deleted.status_code, deleted.json()) == (404, {"error": "model 'x' not found"})
    assert (await ask("POST", "/api/show", json={})).json() == {"error": "model is required"}


async def test_copy_and_delete_answer_with_nothing():
    world = World()
    copied = await ask(
        "POST", "/api/copy", json={"source": "smollm2:latest", "destination": "y"}, world=world
    )
    deleted = await ask("DELETE", "/api/delete", json={"name": "smollm2:latest"}, world=world)
    assert (copied.status_code, copied.content) == (200, b"")
    assert (deleted.status_code, deleted.content) == (200, b"")
    assert world.catalog.calls == [("copy", "smollm2:latest", "y"), ("delete", "smollm2:latest")]


async def test_create_streams_or_answers_with_the_last_status():
    world = World()
    body = {"model": "new", "from": "smollm2", "parameters": {"temperature": 1}, "unknown": 1}
    streamed = await ask("POST", "/api/create", json=body, world=world)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["status"] for line in streamed.text.splitlines()] == ["parsing GGUF", "success"]
    whole = await ask("POST", "/api/create", json={**body, "stream": False}, world=world)
    assert whole.json() == {"status": "success"}
    request = world.catalog.calls[0][1]
    assert (request.model, request.from_, request.parameters) == ("new", "smollm2", {"temperature": 1})


@pytest.mark.parametrize("stream", [True, False])
async def test_create_refused_at_once_has_a_status(stream):
    world = World()
    world.catalog.statuses = [e.Invalid("neither 'from' or 'files' was specified")]
    answer = await ask("POST", "/api/create", json={"model": "new", "stream": stream}, world=world)
    assert (answer.status_code, answer.json()) == (400, {"error": "neither 'from' or 'files' was specified"})


async def test_create_that_fails_later_ends_with_an_error_line():
    world = World()
    world.catalog.statuses = [CreateStatus(status="parsing GGUF"), e.DiskFull("the disk is full")]
    streamed = await ask("POST", "/api/create", json={"model": "new"}, world=world)
    assert streamed.status_code == 200
    assert json.loads(streamed.text.splitlines()[-1]) == {"error": "the disk is full"}
    whole = await ask("POST", "/api/create", json={"model": "new", "stream": False}, world=world)
    assert (whole.status_code, whole.json()) == (507, {"error": "the disk is full"})


async def test_blobs():
    world = World()
    path = f"/api/blobs/{DIGEST}"
    assert (await ask("HEAD", path, world=world)).status_code == 404
    assert (await ask("POST", path, content=b"x" * 100, world=world)).status_code == 201
    assert (await ask("POST", path, content=b"x" * 100, world=world)).status_code == 200
    assert (await ask("HEAD", path, world=world)).status_code == 200
    assert world.catalog.blobs[DIGEST] == b"x" * 100
    assert (await ask("POST", path, content=b"wrong", world=world)).status_code == 400


async def test_a_blob_has_no_size_limit_and_no_encoding():
    world = World(limits=Limits(body_bytes=1000))
    path = f"/api/blobs/{DIGEST}"
    assert (await ask("POST", path, content=b"x" * 5000, world=world)).status_code == 201
    zipped = await ask("POST", path, content=b"x", headers={"content-encoding": "gzip"}, world=world)
    assert zipped.status_code == 415


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/v1/models/acme/tiny:v1/download"])
async def test_a_gateway_that_moves_no_models_says_so(path):
    answer = await ask("POST", path, json={"model": "x"})
    assert answer.status_code == 501
    assert "does not move models" in answer.text


async def test_version_and_status():
    assert (await ask("GET", "/api/version")).json()["version"] == "0.32.15"
    assert (await ask("HEAD", "/api/version")).status_code == 200
    assert (await ask("HEAD", "/api/tags")).status_code == 200
    assert (await ask("GET", "/api/status")).json()["cloud"]["disabled"] is True


# ── seed and OpenAI ─────────────────────────────────────────────────────────────────


async def test_seed_models():
    world = World()
    models = (await ask("GET", "/api/v1/models", world=world)).json()["models"]
    assert set(models) == {"acme/tiny:v1", "smollm2:latest"}
    one = (await ask("GET", "/api/v1/models/acme/tiny:v1", world=world)).json()
    assert one == models["acme/tiny:v1"]
    gone = await ask("DELETE", "/api/v1/models/acme%2Ftiny%3Av1", world=world)
    assert gone.status_code == 204
    assert world.residents.unloaded == [NEW.name]
    assert world.catalog.calls[-1] == ("delete", NEW.name)
    missing = await ask("GET", "/api/v1/models/none", headers={"x-request-id": "r9"}, world=world)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert missing.json()["error"]["request_id"] == "r9"


async def test_health_and_version():
    world = World()
    assert (await ask("GET", "/api/v1/health", world=world)).json() == {
        "status": "ok",
        "node": "n1",
        "version": "1.2.3",
        "models_loaded": 2,
    }
    assert (await ask("GET", "/api/v1/version", world=world)).json()["version"] == "1.2.3"
    starting = World(ready=lambda: False)
    for path in ("/readyz", "/health"):
        assert (await ask("GET", path, world=starting)).status_code == 503
    assert (await ask("GET", "/healthz", world=starting)).status_code == 200


async def test_openai_models():
    rows = (await ask("GET", "/v1/models")).json()
    assert rows["object"] == "list"
    assert [(row["id"], row["owned_by"]) for row in rows["data"]] == [
        ("acme/tiny:v1", "acme"),
        ("smollm2:latest", "library"),
    ]
    assert (await ask("GET", "/v1/models/acme/tiny:v1")).json()["id"] == "acme/tiny:v1"
    full = "registry.ollama.ai/library/smollm2:latest"
    assert (await ask("GET", f"/v1/models/{full}")).json()["id"] == full, "as it was asked for"
    assert (await ask("GET", "/v1/models/none")).json()["error"]["type"] == "not_found_error"


async def test_anthropics_models():
    """Under OpenAI's paths; its clients say who they are."""
    headers = {"anthropic-version": "2023-06-01"}
    rows = (await ask("GET", "/v1/models", headers=headers)).json()
    assert [row["id"] for row in rows["data"]] == ["acme/tiny:v1", "smollm2:latest"]
    assert (rows["first_id"], rows["last_id"], rows["has_more"]) == ("acme/tiny:v1", "smollm2:latest", False)
    one = (await ask("GET", "/v1/models/acme/tiny:v1", headers=headers)).json()
    assert one == rows["data"][0]
    assert (one["type"], one["display_name"], one["created_at"][-1]) == ("model", "acme/tiny:v1", "Z")
    missed = await ask("GET", "/v1/models/none", headers=headers)
    told = missed.json()
    assert (missed.status_code, told["type"], told["error"]["type"]) == (404, "error", "not_found_error")
    assert missed.headers["request-id"] == missed.headers["x-request-id"] == told["request_id"]
    assert "request-id" not in (await ask("GET", "/v1/models")).headers


# ── the node ────────────────────────────────────────────────────────────────────────


async def test_the_front_page_by_client():
    for peer in ("127.0.0.1", "10.0.0.9"):  # public: it tells nothing
        plain = await ask("GET", "/", peer=peer, headers={"accept": "*/*"})
        assert plain.text == "Ollama is running"
        assert (await ask("HEAD", "/", peer=peer)).status_code == 200
        led = await ask("GET", "/", peer=peer, headers={"accept": "text/html,*/*"})
        assert (led.status_code, led.headers["location"]) == (303, "/ui/")
        assert led.headers["vary"] == plain.headers["vary"] == "accept"
        for path in ("/healthz", "/readyz", "/health"):  # load balancers ask so
            assert (await ask("HEAD", path, peer=peer)).status_code == 200


async def test_a_person_is_told_in_words_what_went_wrong():
    html = {"accept": "text/html"}
    page = await ask("GET", "/docs", peer="10.0.0.9", headers=html)
    assert page.status_code == 401
    assert page.headers["content-type"].startswith("text/html")
    assert 'href="/ui/sign-in"' in page.text
    assert page.headers["x-request-id"] in page.text
    assert (await ask("GET", "/docs", peer="10.0.0.9")).json()["error"]["code"] == "unauthenticated"
    assert (await ask("GET", "/api/tags", peer="10.0.0.9", headers=html)).json()["error"]


async def test_openapi_has_every_route():
    world = World()
    document = (await ask("GET", "/openapi.json", world=world)).json()
    shown = {(method.upper(), path) for path, row in document["paths"].items() for method in row}
    hot = {(route.method, route.path) for route in world.app.hot.routes()}
    cold = {
        (route.method, route.path.replace(":path", "")) for route in world.app.cold_routes if not route.hidden
    }
    assert shown == hot | cold
    text = json.dumps(document)
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert reference in document["components"]["schemas"]
    operations = re.findall(r'"operationId": "([^"]+)"', text)
    assert len(operations) == len(set(operations))


async def test_metrics_count_what_happened():
    world = World()
    await ask("POST", "/api/generate", json={"model": "m", "prompt": "p"}, world=world)
    await ask("GET", "/api/nothing", world=world)
    for number in range(50):
        await ask("GET", f"/random/{number}", world=world)
    text = (await ask("GET", "/metrics", world=world)).text
    assert 'requests_total{route="/api/generate",outcome="ok",status="200"} 1' in text
    assert 'requests_total{route="unmatched",outcome="error",status="404"} 51' in text
    assert 'tokens_total{kind="prompt"} 7' in text
    assert 'request_seconds_bucket{route="/api/generate",le="+Inf"} 1' in text
    assert 'model_slots_busy{model="soon"} 1' in text
    assert "random" not in text
    for line in text.splitlines():
        assert line.startswith("# ") or re.fullmatch(r"[a-z_]+(\{[^}]*\})? [0-9.e+-]+", line), line


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/api/none", {"error": str}),
        ("/api/v1/none", {"error": dict}),
        ("/v1/none", {"error": dict}),
        ("/v1/messages/none", {"type": str, "error": dict, "request_id": str}),
        ("/none", {"error": dict}),
    ],
)
async def test_what_is_not_there_answers_in_its_dialect(path, shape):
    answer = await ask("GET", path)
    assert answer.status_code == 404
    assert {name: type(value) for name, value in answer.json().items()} == shape
    assert answer.headers["x-request-id"]


async def test_a_wrong_method_says_the_right_ones():
    answer = await ask("PUT", "/api/tags")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
    answer = await ask("PATCH", "/api/v1/models/m")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")


async def test_a_broken_handler_hides_its_text():
    world = World()

    def broken():
        raise ValueError("secret 0xdeadbeef")

    world.catalog.list = broken
    answer = await ask("GET", "/api/tags", world=world)
    assert answer.status_code == 500
    assert "secret" not in answer.text


# ── who may ─────────────────────────────────────────────────────────────────────────


async def test_every_route_by_caller():
    """Each route x {nobody, a wrong key, local}."""
    plain, record = make_key("admin", now=0.0)
    stranger, _ = make_key("admin", now=0.0)
    world = World(authenticator=Authenticator([record], require_key=False, wall=lambda: 1.0))
    routes = [(one.method, one.path) for one in world.app.cold_routes]
    routes += [(one.method, one.path) for one in world.app.hot.routes()]
    assert len(routes) > 35
    for method, path in routes:
        asked = re.sub(r"\{[^}]*\}", "x", path)
        for peer, key, allowed in (
            ("10.0.0.9", None, path in PUBLIC),
            ("10.0.0.9", stranger, path in PUBLIC),
            ("127.0.0.1", stranger, path in PUBLIC),
            ("10.0.0.9", plain, True),
            ("127.0.0.1", None, True),
        ):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = await ask(method, asked, peer=peer, world=world, headers=headers)
            assert (answer.status_code == 401) != allowed, (method, path, peer, answer.status_code)


async def test_every_cold_route_has_a_verb_or_is_public():
    for route in World().app.cold_routes:
        assert (route.verb is None) == (route.path in PUBLIC)
        assert (route.verb == "models") == (
            route.path.startswith(
                ("/api/create", "/api/copy", "/api/delete", "/api/blobs", "/api/pull", "/api/push")
            )
            or route.method == "DELETE"
            or route.path.endswith("/download")
        )


async def test_traversal_in_names_reaches_only_the_catalogue():
    world = World()
    for name in ("../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "..%5c..%5cx"):
        assert (await ask("GET", f"/api/v1/models/{name}", world=world)).status_code == 404
        assert (await ask("HEAD", f"/api/blobs/{name}", world=world)).status_code == 404
