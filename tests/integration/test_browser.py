"""A real browser at the pages of a node (S-10): text stays text whoever wrote it, nothing leaves the node,
no other site gets in; and a person gets through with the keyboard alone, on a small screen too."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tests.chromium import Answer, Page, chromium, html
from tests.people_nodes import PeopleNodes, oidc_provider, people_nodes
from tests.unit.gateway.test_gateway_app import spec

from ollama_distributed.base.errors import ModelNotFound
from ollama_distributed.base.inference import Delta, Finished, Opened
from ollama_distributed.client import SyncClient
from ollama_distributed.gateway.pages import page_headers
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = [pytest.mark.integration, pytest.mark.untraced]

PASSWORD = "correct horse"
RUN = "parent.pwned=(parent.pwned||0)+1"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>",
    f"--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f'"><script>{RUN}</script>',
    f"'><script>{RUN}</script>",
    f"<ScRiPt>{RUN}</sCrIpT>",
    f"<script/x>{RUN}</script>",
    f"<script type=module>{RUN}</script>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg onload={RUN}>",
    f"<img src=x onerror={RUN}>",
    f"<img src=x onerror='{RUN}'//>",
    f"<img/src=x/onerror={RUN}>",
    f"<body onload={RUN}>",
    f'<iframe srcdoc="<script>{RUN}</script>"></iframe>',
    f'<iframe src="javascript:{RUN}"></iframe>',
    f'<a href="javascript:{RUN}" onfocus={RUN} autofocus>x</a>',
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}></audio>",
    f'<object data="javascript:{RUN}"></object>',
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}></style></table></math>",
    "<script src=//evil.test/x.js></script>",
    "<img src=//evil.test/x.png>",
    "<iframe src=//evil.test/></iframe>",
    "<embed src=//evil.test/x.swf>",
    "<link rel=stylesheet href=//evil.test/x.css>",
    "<style>@import '//evil.test/y.css';</style>",
    '<meta http-equiv=refresh content="0;url=http://evil.test/">',
    "<base href=//evil.test/><img src=z.png>",
    f"<form action=//evil.test/><button autofocus onfocus={RUN}>x</button></form>",
    f"javascript:{RUN}",
    f"';{RUN};//",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"${{{RUN}}}{{{{constructor.constructor('{RUN}')()}}}}",
    f"\x1b]0;x\x07\u202e<img src=x onerror={RUN}>",
)
ALL = "\n".join(PAYLOADS)
SOME = tuple(" ".join(PAYLOADS[at : at + 14]) for at in range(0, len(PAYLOADS), 14))
"""All of them in few requests."""


class Hostile:
    """A catalogue whose models are called by what we fear."""

    def list(self) -> list[Any]:
        return [spec(payload, 1.7e9) for payload in PAYLOADS]

    async def resolve(self, name: str) -> Any:
        raise ModelNotFound(f"model '{name}' not found")


ANSWER = (Opened(prompt_tokens=1), Delta(text=ALL), Finished(reason="stop"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeopleNodes]:
    zoe: dict[str, object] = {"preferred_username": "Zoe", "groups": ["ml"]}
    guest: dict[str, object] = {"preferred_username": "guest", "groups": []}
    with oidc_provider(zoe=zoe, guest=guest) as issuer:
        settings = OidcSettings(
            issuer=issuer,
            title="Example & Sons",
            client_id="od",
            client_secret="s3cret",
            private=True,
            scopes=["openid", "profile", "groups"],
            roles={"ml": "operator"},
        )
        folder = tmp_path_factory.mktemp("people")
        parts = {"inference": ScriptedInference(ANSWER), "catalog": Hostile()}
        with people_nodes(folder, settings, **parts) as running:
            with SyncClient(running.urls[0], running.key) as client:
                client.users.create("ann", PASSWORD, role="operator", team="red")
            yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: Page) -> Page:
    browser.reset()
    return browser


def assert_only_text(page: Page, own: str) -> None:
    """Nothing ran, nothing was asked of others, and the policy had nothing to keep from happening."""
    assert page.run("typeof pwned") == "undefined"
    assert page.dialogs == []
    assert [url for url in page.asked if not url.startswith((own + "/", "data:"))] == []
    assert page.blocked == []


# ── text stays text ─────────────────────────────────────────────────────────────────


def test_the_payloads_would_run_and_the_policy_alone_stops_them(page: Page, nodes: PeopleNodes) -> None:
    """What the tests below look for can be seen; and our policy holds where a page has a mistake."""
    own = nodes.urls[0]
    staying = "\n".join(one for one in PAYLOADS if "http-equiv" not in one)
    page.intercept("*/control", lambda _: html(staying))
    page.go(f"{own}/control")
    assert page.run("pwned") >= 10
    assert any("evil.test" in url for url in page.asked)
    for policy in (page_headers()["content-security-policy"], "default-src 'none'; frame-ancestors 'none'"):
        page.reset()
        guarded = html(staying, ("content-security-policy", policy))
        page.intercept("*/control", lambda _, guarded=guarded: guarded)
        page.go(f"{own}/control")
        assert page.run("typeof pwned") == "undefined"
        assert not any("evil.test" in url for url in page.asked)
        assert page.blocked
    page.go(f"{own}/ui/sign-in")  # a script of ours that made a mistake
    with pytest.raises(AssertionError, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<img src=x onerror=1>'")


def test_whatever_an_address_says(page: Page, nodes: PeopleNodes) -> None:
    own = nodes.urls[0]
    for path in (
        "/api/v1/models/{}",
        "/v1/models/{}",
        "/ui/{}",
        "/docs/{}",
        "/api/v1/auth/oidc/start?port={}&challenge={}",
        "/api/v1/auth/oidc/callback?state={}&code={}&error={}",
        "/?{}#{}",
        "/ui/sign-in?name={}&error={}#{}",
    ):
        for some in SOME:
            page.go(own + path.replace("{}", quote(some, safe="")))
            if "models" in path:
                assert RUN in page.text()
            assert_only_text(page, own)


def test_whatever_models_are_called(page: Page, nodes: PeopleNodes) -> None:
    for path in ("/api/tags", "/v1/models", "/api/v1/models", "/metrics"):
        page.go(nodes.urls[0] + path)
        assert page.answered[-1] == (nodes.urls[0] + path, 200)
        assert path == "/metrics" or page.text().count(RUN) >= ALL.count(RUN)
        assert_only_text(page, nodes.urls[0])


def test_whatever_a_model_says(page: Page, nodes: PeopleNodes) -> None:
    """The answer is opened as a page, which no link or form can do."""
    asked = {"model": ALL, "prompt": ALL, "messages": [{"role": "user", "content": ALL}], "max_tokens": 9}
    sent: Answer = {"method": "POST", "headers": [{"name": "content-type", "value": "application/json"}]}
    page.intercept("*stream=*", lambda _: sent)
    for path in ("/api/generate", "/v1/chat/completions", "/v1/messages"):
        for stream in (True, False):
            body = json.dumps(asked | {"stream": stream}).encode()
            sent["postData"] = base64.b64encode(body).decode("ascii")
            url = f"{nodes.urls[0]}{path}?stream={stream}"
            page.go(url)
            assert page.answered[-1] == (url, 200)
            assert_only_text(page, nodes.urls[0])


def test_whatever_a_sign_in_is_answered(page: Page, nodes: PeopleNodes) -> None:
    said = iter([*PAYLOADS, *PAYLOADS])
    current = ""

    def refused(_: str) -> Answer:
        nonlocal current
        current = next(said)
        told = json.dumps({"error": {"code": "unauthenticated", "message": current}}).encode()
        return {"responseCode": 401, "responseHeaders": [], "body": base64.b64encode(told).decode()}

    page.intercept("*/auth/login", refused)
    page.go(f"{nodes.urls[0]}/ui/sign-in")
    for name in PAYLOADS:
        page.run(f"user.value = {json.dumps(name)}, password.value = 'x', form.requestSubmit()")
        page.until("!document.getElementById('submit').disabled")
        shown = page.run("problem.textContent")
        assert shown == current[0].upper() + current[1:]
    assert_only_text(page, nodes.urls[0])


def test_whatever_is_told_of_a_person(page: Page, nodes: PeopleNodes) -> None:
    who = {"role": ALL, "team": ALL, "user": ALL, "key_name": ALL, "may": {ALL: [ALL], "__proto__": ["read"]}}
    answers: dict[str, Any] = {
        "whoami": who | {"policy": {"name": ALL}},
        "session": {"user": {"source": ALL}, "csrf": ALL, "expires_at": ALL, "idle_s": ALL},
        "version": {"version": ALL, "node": ALL, "engines": [{"name": ALL, "version": ALL}]},
    }

    def told(url: str) -> Answer:
        body = json.dumps(answers[url.rpartition("/")[2]]).encode()
        return {"responseCode": 200, "responseHeaders": [], "body": base64.b64encode(body).decode()}

    answers["session"]["expires_at"], answers["session"]["idle_s"] = 1.7e9, 3600
    page.intercept("*/api/v1/*", told)
    page.go(f"{nodes.urls[0]}/ui/")
    page.until("!you.hidden")
    page.run("document.querySelector('details').open = true")
    assert page.text().count(RUN) > 5 * ALL.count(RUN)
    assert_only_text(page, nodes.urls[0])


# ── other sites ─────────────────────────────────────────────────────────────────────

ATTACK = """<body><script>
const own = %s, form = (action, enctype, name, value) => {
  const frame = document.createElement("iframe"), form = document.createElement("form");
  frame.name = "f" + document.forms.length;
  Object.assign(form, {action: own + action, method: "post", enctype, target: frame.name});
  form.append(Object.assign(document.createElement("input"), {name, value}));
  document.body.append(frame, form);
  form.submit();
};
const login = '{"name":"ann","password":"correct horse","cookie":true,"x":"';
form("/api/v1/auth/login", "text/plain", login, '"}');
form("/api/generate", "text/plain", '{"model":"m","x":"', '"}');
form("/api/v1/auth/logout", "application/x-www-form-urlencoded", "a", "b");
form("/v1/files", "multipart/form-data", "file", "b");
const all = [];
for (const path of ["/api/v1/auth/logout", "/api/v1/auth/token", "/api/generate", "/api/delete"])
  for (const mode of ["no-cors", "cors"])
    for (const kind of ["text/plain", "application/json"])
      all.push(fetch(own + path, {method: "POST", mode, credentials: "include", body: '{"model":"m"}',
        headers: {"Content-Type": kind}}).then((r) => r.text()).catch(() => "refused"));
for (const path of ["/api/tags", "/api/v1/auth/session", "/api/v1/keys", "/ui/", "/healthz"])
  all.push(fetch(own + path, {credentials: "include"}).then((r) => r.text()).catch(() => "refused"));
for (const path of ["/api/tags", "/ui/account.js", "/v1/models"])
  document.body.append(Object.assign(document.createElement("script"), {src: own + path}));
document.body.append(Object.assign(document.createElement("iframe"), {src: own + "/ui/"}));
all.push(new Promise((end) => {
  const socket = new WebSocket(own.replace("http", "ws") + "/api/v1/ws");
  socket.onopen = () => end("open");
  socket.onerror = () => end("refused");
}));
window.read = Promise.all(all);
</script>"""


def test_another_site_reaches_nothing(page: Page, nodes: PeopleNodes) -> None:
    own = nodes.urls[0]
    signed_in(page, own)
    before = len(page.answered)
    evil = "http://evil.test/"
    page.intercept(evil + "*", lambda _: html(ATTACK % json.dumps(own)))
    page.go(evil)
    read = page.run("read")
    assert set(read) <= {"refused", ""}, read  # "": an answer that the page may not read
    reached = [(url, status) for url, status in page.answered[before:] if url.startswith(own)]
    assert reached
    # A frame may be asked for, as a link may; it is not shown.
    assert {status for url, status in reached if url != f"{own}/ui/"} <= {401, 403, 405, 415, 426}, reached
    page.go(f"{own}/ui/")  # still signed in
    assert page.until("who.textContent") == "ann"


def test_a_name_that_was_turned_to_this_machine_reaches_nothing(page: Page, nodes: PeopleNodes) -> None:
    port = nodes.urls[0].rpartition(":")[2]
    page.intercept("*/before", lambda _: html("what another machine sent before that"))
    page.go(f"http://rebound.test:{port}/before")
    read = (
        "fetch('/api/generate', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'})"
    )
    assert page.run(f"{read}.then((r) => r.status)") == 403


# ── people ──────────────────────────────────────────────────────────────────────────

PICTURES = os.environ.get("BROWSER_PICTURES", "")
"""A folder: what the pages look like is put there, to be looked at."""


def picture(page: Page, name: str) -> None:
    if not PICTURES:
        return
    for kind, look in (("", {}), ("-dark", {"dark": True}), ("-small", {"width": 360, "height": 740})):
        page.look(**look)  # type: ignore[arg-type]  # of its own parameters
        page.picture(Path(PICTURES) / f"{name}{kind}.png")
    page.look()


def signed_in(page: Page, own: str, name: str = "ann", password: str = PASSWORD) -> None:
    page.go(f"{own}/ui/sign-in")
    page.until("document.activeElement.id === 'user'")  # a moment after the page is there
    page.type(name)
    page.press("Tab")
    page.type(password)
    page.leave(lambda: page.press("Enter"))
    page.until("!you.hidden")


def test_a_person_signs_in_and_out_by_the_keyboard(page: Page, nodes: PeopleNodes) -> None:
    own = nodes.urls[1]  # a node without a vote
    page.go(own)
    assert page.run("location.pathname") == "/ui/"
    page.until("!you.hidden")
    assert "You are at this machine" in page.text()
    assert page.run(
        "!document.getElementById('sign-in').hidden && document.getElementById('sign-out').hidden"
    )
    picture(page, "local")
    page.go(f"{own}/ui/sign-in")
    page.until("document.activeElement.id === 'user'")
    picture(page, "sign-in")
    page.type("ann")
    page.press("Tab")
    page.type("wrong")
    page.press("Enter")
    assert page.until("problem.textContent") == "The name or the password is not right"
    assert page.run("location.search") == ""
    picture(page, "wrong")
    page.until("document.activeElement.id === 'password' && !document.getElementById('submit').disabled")
    page.type(PASSWORD)  # the wrong one is marked: typing replaces it
    page.leave(lambda: page.press("Enter"))
    assert page.until("who.textContent") == "ann"
    assert "Role operator" in page.text()
    assert "red" in page.text()
    assert page.run("document.cookie") == ""
    assert page.run("JSON.stringify([localStorage.length, sessionStorage.length])") == "[0,0]"
    picture(page, "account")
    for _ in range(4):
        page.press("Tab")
        if page.run("document.activeElement.id") == "sign-out":
            break
    page.leave(lambda: page.press("Enter"))
    assert page.until("told.textContent") == "You are signed out."
    picture(page, "signed-out")
    assert page.run("fetch('/api/v1/auth/session').then((r) => r.status)") == 404
    assert_only_text(page, own)


def test_a_session_that_ends_elsewhere(page: Page, nodes: PeopleNodes) -> None:
    own = nodes.urls[0]
    signed_in(page, own)
    with SyncClient(own, nodes.key) as client:
        client.users.end_sessions("ann")
    page.leave(lambda: page.run("document.getElementById('sign-out').click()"))
    assert page.run("location.pathname") == "/ui/sign-in"
    page.intercept("*/auth/whoami", lambda _: {"responseCode": 401, "responseHeaders": []})
    page.go(f"{own}/ui/")
    page.until("location.pathname === '/ui/sign-in'")


def test_a_node_that_does_not_answer(page: Page, nodes: PeopleNodes) -> None:
    page.go(f"{nodes.urls[0]}/ui/sign-in")
    page.unplug()
    page.run("user.value = 'ann', password.value = 'x', form.requestSubmit()")
    assert "does not answer" in page.until("problem.textContent")
    page.until("!document.getElementById('submit').disabled")


@pytest.mark.parametrize("node", [0, 1], ids=["server", "node without a vote"])
def test_a_person_signs_in_at_the_provider(page: Page, nodes: PeopleNodes, node: int) -> None:
    own = nodes.urls[node]
    page.go(f"{own}/ui/sign-in")
    link = "document.querySelector('a.other')"
    assert page.run(f"{link}.textContent") == "Sign in with Example & Sons"
    page.leave(lambda: page.run(f"{link}.click()"))
    assert page.run("location.hostname") == "localhost"  # another site
    page.leave(
        lambda: page.run(
            "document.querySelector('input[name=sub]').value = 'zoe', document.forms[0].submit()"
        )
    )
    assert page.until("location.pathname === '/ui/' && who.textContent") == "zoe"
    assert "your organisation" in page.text()


def test_who_may_not_is_told_so_in_words(page: Page, nodes: PeopleNodes) -> None:
    own = nodes.urls[0]
    page.go(f"{own}/api/v1/auth/oidc/start")
    page.leave(
        lambda: page.run(
            "document.querySelector('input[name=sub]').value = 'guest', document.forms[0].submit()"
        )
    )
    assert page.run("performance.getEntriesByType('navigation')[0].responseStatus") == 403
    assert "None of this person's groups may sign in here" in page.text()
    assert "Sign in" in page.run("document.links[0].textContent")
    picture(page, "refused")


CONTRAST = """[...document.querySelectorAll("h1,h2,p,label,button,.button,a,dt,dd,li,summary")].filter(
  (one) => one.offsetHeight && one.textContent.trim()).map((one) => {
    const canvas = document.createElement("canvas").getContext("2d");
    const bright = (color) => {
      canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let back = one;
    const clear = () => getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)";
    while (back.parentElement && clear()) back = back.parentElement;
    const pair = [bright(getComputedStyle(one).color), bright(getComputedStyle(back).backgroundColor)];
    pair.sort((a, b) => b - a);
    return [one.textContent.trim().slice(0, 40), (pair[0] + 0.05) / (pair[1] + 0.05)];
  })"""


HEIGHTS = """[...document.querySelectorAll("button, input, .button")].map((one) => one.offsetHeight)
  .filter((height) => height)"""


@pytest.mark.parametrize("path", ["/ui/", "/ui/sign-in", "/docs", "/api/v1/auth/oidc/callback"])
def test_everybody_can_read_and_press_everything(page: Page, nodes: PeopleNodes, path: str) -> None:
    page.go(nodes.urls[0] + path)
    page.until("!document.getElementById('you') || !you.hidden")
    for name in ("problem", "told"):
        page.run(f"document.getElementById('{name}')?.append('That did not work')")
    for dark in (False, True):
        page.look(dark=dark)
        found = page.run(CONTRAST)
        assert len(found) > 3
        assert [one for one in found if one[1] < 4.5] == []  # WCAG 2.2, 1.4.3
    for width in (320, 360):
        page.look(width=width, height=700)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert all(height >= 24 for height in page.run(HEIGHTS))  # WCAG 2.2, 2.5.8
