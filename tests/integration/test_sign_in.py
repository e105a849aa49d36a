"""Sign-in over HTTP: both SDK clients, the commands, browsers, and a real OpenID Connect provider."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from tests.limits import SOON_S
from tests.people_nodes import PeopleNodes, oidc_provider, people_nodes
from typer.testing import CliRunner, Result

from ollama_distributed import client as sdk
from ollama_distributed.access.attempts import FREE
from ollama_distributed.cli.main import app as program
from ollama_distributed.client import people as groups
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.node.people import ops

pytestmark = pytest.mark.integration

PASSWORD, OTHER = "correct horse", "battery staple"
NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-site": "cross-site", "accept": "text/html"}


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    zoe: dict[str, object] = {"preferred_username": "Zoe", "groups": ["ml", "staff"]}
    guest: dict[str, object] = {"preferred_username": "guest", "groups": ["guests"]}
    ann: dict[str, object] = {"preferred_username": "ann", "groups": ["ml"]}
    with oidc_provider(z1=zoe, g1=guest, a1=ann) as url:
        yield url


@pytest.fixture(scope="module")
def nodes(issuer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeopleNodes]:
    settings = OidcSettings(
        issuer=issuer,
        client_id="od",
        client_secret="s3cret",
        private=True,
        scopes=["openid", "profile", "groups"],
        roles={"staff": "viewer", "ml": "operator"},
        teams={"ml": "research"},
    )
    with people_nodes(tmp_path_factory.mktemp("people"), settings) as running:
        with sdk.SyncClient(running.urls[0], running.key) as client:
            client.users.create("ann", PASSWORD, role="operator", team="red")
        yield running


def test_the_two_clients_have_the_same_methods() -> None:
    for one, other in ((groups.Auth, groups.SyncAuth), (groups.Users, groups.SyncUsers)):
        assert {name for name in vars(one) if name[0] != "_"} == {
            name for name in vars(other) if name[0] != "_"
        }


@pytest.mark.parametrize("kind", [sdk.Client, sdk.SyncClient])
def test_all_of_it_by_the_sdk_at_a_node_without_a_vote(nodes: PeopleNodes, kind: Any) -> None:
    url = nodes.urls[1]

    def use(key: str, what: Callable[[Any], Any]) -> Any:
        async def waited() -> Any:
            found = what(kind(url, key, retries=0))
            return await found if inspect.isawaitable(found) else found

        return asyncio.run(waited())

    name = f"bob-{kind.__name__.lower()}"
    made = use(nodes.key, lambda c: c.users.create(name, PASSWORD, role="viewer", team="blue"))
    assert (made.name, made.role, made.team, made.source) == (name, "viewer", "blue", "password")
    with pytest.raises(sdk.Unauthenticated):
        use("", lambda c: c.auth.login(name, OTHER))
    signed_in = use("", lambda c: c.auth.login(name, PASSWORD))
    token = signed_in.token
    assert (signed_in.user.name, signed_in.csrf) == (name, "")
    assert use(token, lambda c: c.auth.session()).session == signed_in.session
    (session,) = use(token, lambda c: c.auth.sessions())
    assert (session.id, session.this) == (signed_in.session, True)
    jwt = use(token, lambda c: c.auth.token())
    assert jwt.expires_in == 900
    assert use(jwt.access_token, lambda c: c.auth.jwks()).keys
    renewed = use(token, lambda c: c.auth.refresh())
    assert renewed.session == signed_in.session
    with pytest.raises(sdk.Forbidden):
        use(renewed.token, lambda c: c.users.list())
    assert use(nodes.key, lambda c: c.users.get(name)).sessions == 1
    assert use(nodes.key, lambda c: c.users.change(name, role="user")).role == "user"
    use(renewed.token, lambda c: c.auth.change_password(PASSWORD, OTHER))
    with pytest.raises(sdk.Unauthenticated):
        use(renewed.token, lambda c: c.auth.sessions())
    again = use("", lambda c: c.auth.login(name, OTHER))
    use(again.token, lambda c: c.auth.end_session(again.session))
    again = use("", lambda c: c.auth.login(name, OTHER))
    use(nodes.key, lambda c: c.users.end_sessions(name))
    with pytest.raises(sdk.Unauthenticated):
        use(again.token, lambda c: c.auth.sessions())
    use(nodes.key, lambda c: c.users.set_password(name, PASSWORD))
    assert name in [row.name for row in use(nodes.key, lambda c: c.users.list())]
    use(nodes.key, lambda c: c.users.delete(name))
    with pytest.raises(sdk.NotFound):
        use(nodes.key, lambda c: c.users.get(name))


def test_a_node_without_a_vote_says_who_asks_only_by_their_own_credential(nodes: PeopleNodes) -> None:
    before = len(nodes.hop.asked)
    with sdk.SyncClient(nodes.urls[1], nodes.key) as client:
        client.users.change("ann", team="red")
    (asked,) = nodes.hop.asked[before:]
    assert isinstance(asked, ops.ChangeUser)
    assert asked.credential == nodes.key
    assert nodes.key not in repr(asked)


def test_what_a_wrong_password_costs_is_said(nodes: PeopleNodes) -> None:
    with sdk.SyncClient(nodes.urls[0], "", retries=0) as client:
        for _ in range(FREE):
            with pytest.raises(sdk.Unauthenticated):
                client.auth.login("nobody-here", OTHER)

        def again() -> None:
            # The wait of a second may be over on a slow machine; each wrong try makes it twice as long.
            for _ in range(6):
                with suppress(sdk.Unauthenticated):
                    client.auth.login("nobody-here", OTHER)

        with pytest.raises(sdk.TooManyAttempts) as refused:
            again()
    assert refused.value.status == 429
    assert refused.value.retry_after_s is not None


# ── browsers ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def browser(nodes: PeopleNodes) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=nodes.urls[0], timeout=SOON_S) as client:
        client.headers["origin"] = nodes.urls[0]
        client.headers["sec-fetch-site"] = "same-origin"
        yield client


def signed_in(browser: httpx.Client) -> dict[str, Any]:
    ask = {"name": "ann", "password": PASSWORD, "cookie": True}
    answer = browser.post("/api/v1/auth/login", json=ask)
    assert answer.status_code == 200
    told: dict[str, Any] = answer.json()
    assert told["token"] == ""
    return told


def test_a_cookie_needs_its_csrf_token_to_change_something(browser: httpx.Client, nodes: PeopleNodes) -> None:
    told = signed_in(browser)
    mine = browser.get("/api/v1/auth/session")
    assert mine.json()["csrf"] == told["csrf"]
    assert mine.headers["cache-control"] == "no-store"
    for headers in ({}, {"x-csrf-token": ""}, {"x-csrf-token": told["csrf"][:-1]}, {"x-csrf-token": "é"}):
        refused = browser.post("/api/v1/auth/token", headers={k: v.encode() for k, v in headers.items()})
        assert refused.status_code == 403
    right = {"x-csrf-token": told["csrf"]}
    assert browser.post("/api/v1/auth/token", headers=right).status_code == 200
    assert browser.post("/api/generate", json={"model": "m", "prompt": "x"}).status_code == 403
    chat = {"model": "m", "messages": []}
    assert browser.post("/v1/chat/completions", json=chat, headers=right).status_code != 403
    renewed = browser.post("/api/v1/auth/refresh", headers=right)
    assert renewed.json()["csrf"] != told["csrf"]
    assert browser.post("/api/v1/auth/logout", headers=right).status_code == 403  # the old one's
    assert (
        browser.post("/api/v1/auth/logout", headers={"x-csrf-token": renewed.json()["csrf"]}).status_code
        == 204
    )
    assert not browser.cookies
    assert nodes.urls


def test_a_session_that_is_over_is_as_none(browser: httpx.Client) -> None:
    signed_in(browser)
    token = browser.cookies["od_session"]
    with sdk.SyncClient(str(browser.base_url), token) as client:
        client.auth.logout()
    assert browser.get("/api/tags").status_code == 200  # a person at this machine
    assert browser.get("/api/v1/auth/session").status_code == 404
    far = browser.get("/api/tags", headers={"x-forwarded-for": "192.0.2.1"})
    assert far.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "https://models.example.evil.example"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
    ],
    ids=str,
)
def test_other_sites_sign_nobody_in_and_use_no_cookie(
    nodes: PeopleNodes, browser: httpx.Client, headers: dict[str, str]
) -> None:
    told = signed_in(browser)
    cookie = {"cookie": f"od_session={browser.cookies['od_session']}", "x-csrf-token": told["csrf"]}
    ask = {"name": "ann", "password": PASSWORD, "cookie": True}
    with httpx.Client(base_url=nodes.urls[0], headers=headers, timeout=SOON_S) as page:
        assert page.post("/api/v1/auth/login", json=ask).status_code == 403
        assert page.post("/api/v1/auth/token", headers=cookie).status_code == 403
        assert page.get("/api/v1/auth/session", headers=cookie).status_code == 403


def test_a_form_cannot_sign_in(browser: httpx.Client) -> None:
    ask = json.dumps({"name": "ann", "password": PASSWORD, "cookie": True})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        refused = browser.post("/api/v1/auth/login", content=ask, headers={"content-type": kind})
        assert refused.status_code == 415
        assert "set-cookie" not in refused.headers


async def test_with_tls_the_cookie_is_bound_to_the_host(nodes: PeopleNodes) -> None:
    transport = httpx.ASGITransport(nodes.apps[0], client=("192.0.2.9", 5))
    with PeopleLoop(nodes) as call:
        client = httpx.AsyncClient(transport=transport, base_url="https://models.example")
        ask = {"name": "ann", "password": PASSWORD, "cookie": True}
        answer = await call(client.post("/api/v1/auth/login", json=ask))
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-od_session=ods_")
        assert {"Secure", "HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
        assert "Domain" not in cookie
        value = cookie.partition("=")[2].partition(";")[0]
        for sent, status in (
            (f"__Host-od_session={value}", 200),
            (f"od_session={value}", 401),  # what another host of the domain, or plain http, could set
            (f"__Host-od_session={value}; __Host-od_session=ods_{'a' * 16}_{'b' * 43}", 401),
            (f"x=1; __Host-od_session={value}; y=2", 200),
            ("__Host-od_session=" + "a" * 9000, 401),
        ):
            client.cookies.clear()
            answer = await call(client.get("/api/v1/auth/session", headers={"cookie": sent}))
            assert answer.status_code == status, sent[:60]


class PeopleLoop:
    """Awaits in the loop in which the gateways live."""

    def __init__(self, nodes: PeopleNodes) -> None:
        self._loop = nodes._loop

    def __enter__(self) -> Callable[[Any], Any]:
        return lambda what: asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what, self._loop))

    def __exit__(self, *_: object) -> None:
        return None


# ── OpenID Connect ──────────────────────────────────────────────────────────────────


def test_the_page_says_who_signs_people_in(nodes: PeopleNodes) -> None:
    for url in nodes.urls:
        for _ in range(3):
            page = httpx.get(f"{url}/ui/sign-in", timeout=SOON_S)
            assert "Sign in with localhost" in page.text
    # One node has it in its settings, the other one asks that, and not for every page.
    assert len([op for op in nodes.hop.asked if isinstance(op, ops.OidcName)]) == 1


def at_provider(url: str, subject: str) -> str:
    """What the person does there; where the provider sends the browser."""
    back = httpx.post(url, data={"sub": subject}, timeout=SOON_S)
    assert back.status_code in (302, 303), back.text
    return str(back.headers["location"])


def begun(page: httpx.Client, path: str = "/api/v1/auth/oidc/start") -> str:
    answer = page.get(path, headers=NAVIGATION)
    assert answer.status_code == 303
    return str(answer.headers["location"])


def test_a_browser_signs_in_at_the_provider(nodes: PeopleNodes, issuer: str) -> None:
    with httpx.Client(base_url=nodes.urls[1], timeout=SOON_S) as page:  # a node that passes it on
        there = begun(page)
        asked = parse_qs(urlsplit(there).query)
        assert there.startswith(issuer)
        assert (asked["code_challenge_method"], asked["response_type"]) == (["S256"], ["code"])
        back = at_provider(there, "z1")
        answer = page.get(back, headers=NAVIGATION)
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")
        assert answer.headers["cache-control"] == "no-store"
        told = page.get("/api/v1/auth/session").json()
        assert (told["user"]["name"], told["user"]["role"], told["user"]["team"]) == (
            "zoe",
            "operator",
            "research",
        )
        assert told["user"]["source"] == "oidc"
        with httpx.Client(base_url=nodes.urls[0], cookies=dict(page.cookies), timeout=SOON_S) as elsewhere:
            assert elsewhere.get("/api/v1/auth/session").status_code == 200
        assert page.get(back, headers=NAVIGATION).status_code == 401  # once


@pytest.mark.parametrize("subject", ["g1", "a1"], ids=["in no group", "another's name"])
def test_who_may_not(nodes: PeopleNodes, subject: str) -> None:
    with httpx.Client(base_url=nodes.urls[0], timeout=SOON_S) as page:
        refused = page.get(at_provider(begun(page), subject), headers=NAVIGATION)
        assert refused.status_code == 403
        assert "od_session" not in page.cookies


def test_an_answer_that_this_browser_did_not_ask_for(nodes: PeopleNodes) -> None:
    with (
        httpx.Client(base_url=nodes.urls[0], timeout=SOON_S) as page,
        httpx.Client(base_url=nodes.urls[0], timeout=SOON_S) as victim,
    ):
        back = at_provider(begun(page), "z1")
        assert victim.get(back, headers=NAVIGATION).status_code == 401  # no cookie
        begun(victim)
        assert victim.get(back, headers=NAVIGATION).status_code == 401  # of another sign-in
        bent = re.sub(r"code=[^&]+", "code=guessed", back)
        assert page.get(bent, headers=NAVIGATION).status_code == 401
        denied = re.sub(r"code=[^&]+", "error=access_denied", back)
        assert page.get(denied, headers=NAVIGATION).status_code == 401
        page.cookies.clear()
        page.cookies.set("od_oidc", "e30")
        assert page.get(back, headers=NAVIGATION).status_code == 401
        assert "od_session" not in page.cookies


@pytest.mark.parametrize(
    "query", ["port=80", "port=x&challenge=y", f"port=9000&challenge={'a' * 43}", "challenge=x", "port=-1"]
)
def test_a_program_that_is_none(nodes: PeopleNodes, query: str) -> None:
    assert httpx.get(f"{nodes.urls[0]}/api/v1/auth/oidc/start?{query}", timeout=SOON_S).status_code == 400


# ── commands ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(nodes: PeopleNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OLLAMA_HOST", nodes.urls[0])
    for name in ("OLLAMA_API_KEY", "OLLAMA_DISTRIBUTED_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str, text: str = "", ok: bool = True) -> Result:
        result = CliRunner().invoke(program, list(arguments), input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code == 0) == ok, result.output
        return result

    return invoke


def test_users_and_a_session_by_commands(
    nodes: PeopleNodes, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("--api-key", nodes.key)
    made = run(
        *key,
        "user",
        "create",
        "eve",
        "--role",
        "admin",
        "--password-stdin",
        "-o",
        "json",
        text=PASSWORD + "\n",
    )
    assert json.loads(made.stdout)["role"] == "admin"
    told = run("login", "--user", "eve", "--password-stdin", "-o", "json", text=PASSWORD + "\n")
    assert json.loads(told.stdout)["user"]["name"] == "eve"
    file = tmp_path / "config" / "ollama-distributed" / "credentials.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "ods_" in file.read_text()
    assert "ods_" not in told.output
    shown = run("user", "show", "eve")  # by the session that was kept
    assert "admin" in shown.stdout
    assert "127.0.0.1" in shown.stdout
    run("user", "role", "eve", "wizard", ok=False)
    monkeypatch.setenv("OLLAMA_HOST", nodes.urls[1])
    run("user", "list", ok=False)  # the session is kept for the other server only
    monkeypatch.setenv("OLLAMA_HOST", nodes.urls[0])
    run("logout")
    assert "ods_" not in file.read_text()
    assert "not signed in" in run("logout").output
    assert "locked" in run(*key, "user", "disable", "eve").output
    assert json.loads(run(*key, "user", "enable", "eve", "-o", "json").stdout)["disabled"] is False
    run(*key, "user", "passwd", "eve", "--password-stdin", text=OTHER + "\n")
    run("login", "--user", "eve", "--password-stdin", text=OTHER + "\n")
    run(*key, "user", "logout", "eve")
    assert "eve" in run(*key, "user", "list").stdout
    run(*key, "user", "delete", "eve", "--yes")
    file.chmod(0o644)
    assert "chmod 600" in run("user", "list", ok=False).output


def test_no_password_crosses_the_network_in_the_open(run: Callable[..., Result]) -> None:
    refused = run(
        "--host", "http://192.0.2.1:8080", "login", "--user", "ann", "--password-stdin", text="x\n", ok=False
    )
    assert "https" in refused.output


def test_a_program_signs_in_by_a_browser(
    nodes: PeopleNodes, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []

    def person(start: str) -> None:
        with httpx.Client(timeout=SOON_S) as page:
            back = at_provider(page.get(start, headers=NAVIGATION).headers["location"], "z1")
            shown = page.get(back, headers=NAVIGATION).text
            pages.append(shown)
            (link,) = re.findall(r'href="(http://127\.0\.0\.1:\d+/[^"]+)"', shown)
            link = link.replace("&amp;", "&")
            assert httpx.get(link.replace("state=", "state=x"), timeout=SOON_S).status_code == 404
            assert httpx.get(link, timeout=SOON_S).status_code == 200
            assert "od_session" not in page.cookies

    threads: list[threading.Thread] = []

    def open_page(url: str) -> bool:
        threads.append(threading.Thread(target=person, args=(url,)))
        threads[0].start()
        return True

    monkeypatch.setattr("webbrowser.open", open_page)
    monkeypatch.setattr("ollama_distributed.cli.browser.WAIT_S", SOON_S)
    told = run("login", "--browser", "-o", "json")
    threads[0].join(SOON_S)
    assert "wants to be signed in as you" in pages[0]  # a person says yes
    assert json.loads(told.stdout)["user"]["name"] == "zoe"
    assert json.loads(told.stdout)["expires_at"] > time.time()
    run("user", "list", ok=False)  # signed in, and no administrator
