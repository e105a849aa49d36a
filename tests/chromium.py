"""Debian's Chromium without a window, told what to do over a pipe (Chrome DevTools Protocol).

No driver and no library in between: requests are JSON with a NUL at their end. What a page asked for, said
and tried is kept in the order in which it happened.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.limits import SOON_S

DEBIAN = Path(__file__).parents[1] / ".venv" / "debian"
"""Where `tools/debian_tools.sh` puts one, where the system has none."""
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What keeps pages from reaching loopback in new browsers would hide whether we do.
    "--disable-features=LocalNetworkAccessChecks,Translate,OptimizationHints,MediaRouter",
    # Names lead nowhere but to this machine.
    "--host-resolver-rules=MAP rebound.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.*",
)
_ONLINE = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
Answer = dict[str, Any]
"""Of an intercepted request, as `Fetch.fulfillRequest` or `Fetch.continueRequest` take it."""


def _program() -> tuple[list[str], dict[str, str]]:
    """The command and its environment; the test is skipped where there is none."""
    if found := shutil.which("chromium"):
        return [found], dict(os.environ)
    for inside in ("usr/lib/chromium/chromium-headless-shell", "usr/lib/chromium/chromium"):
        if (path := DEBIAN / inside).exists():
            machine = (
                "usr/lib/x86_64-linux-gnu",
                "lib/x86_64-linux-gnu",
                "usr/lib/x86_64-linux-gnu/pulseaudio",
            )
            libraries = [str(DEBIAN / folder) for folder in machine]
            return [str(path)], {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}
    pytest.skip("no chromium on this system (apt install chromium, or make .venv/.debian brings Debian's)")


@contextmanager
def chromium() -> Iterator[Page]:
    """One tab; `reset` makes it as new."""
    program, environment = _program()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        low_in, our_out = os.pipe()
        our_in, low_out = os.pipe()
        # It reads on descriptor 3 and writes on 4: ours must not be these.
        their_in, their_out = (fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10) for low in (low_in, low_out))
        os.close(low_in)
        os.close(low_out)
        flags = [*_FLAGS, f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        shell = f'exec "$@" 3<&{their_in} 4>&{their_out} {their_in}<&- {their_out}>&-'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *program, *flags, "about:blank"],
            pass_fds=(their_in, their_out),
            env={**environment, "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Browser(our_in, our_out).page()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(SOON_S)
            os.close(our_in)
            os.close(our_out)


class Browser:
    """The pipe."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = bytearray()
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, session: str = "", /, **parameters: Any) -> dict[str, Any]:
        number = self.send(method, session, **parameters)
        self.wait(lambda: number in self._answers, method)
        return dict(self._answers.pop(number)["result"])

    def send(self, method: str, session: str = "", /, **parameters: Any) -> int:
        """Without waiting for the answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        return number

    def wait(self, done: Callable[[], object], what: str) -> None:
        """Take what the browser says until `done`."""
        until = time.monotonic() + SOON_S
        while not done():
            left = until - time.monotonic()
            assert left > 0, f"{what} does not come"
            if not select.select([self._reading], [], [], left)[0]:
                continue
            data = os.read(self._reading, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
            *messages, rest = bytes(self._buffer).split(b"\0")
            self._buffer[:] = rest
            for message in map(json.loads, messages):
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        assert "error" not in message, message
        if "id" in message:
            self._answers[message["id"]] = message
        elif page := self._pages.get(message.get("sessionId", "")):
            page.happened(message["method"], message["params"])


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.asked: list[str] = []
        """URLs."""
        self.dialogs: list[str] = []
        self.blocked: list[str] = []
        """What the content security policy kept from happening."""
        self._browser, self._session = browser, session
        self._loaded = 0
        self._urls: dict[str, str] = {}
        self._statuses: list[tuple[str, int]] = []
        self._answer: Callable[[str], Answer | None] = lambda _: None

    @property
    def answered(self) -> list[tuple[str, int]]:
        """URL and status of what the network answered."""
        return [(self._urls[one], status) for one, status in self._statuses if one in self._urls]

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def happened(self, method: str, told: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded += 1
            case "Page.javascriptDialogOpening":
                self.dialogs.append(told["message"])
                self._browser.send("Page.handleJavaScriptDialog", self._session, accept=True)
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])
                self._urls[told["requestId"]] = told["request"]["url"]
            case "Network.loadingFailed" if told.get("blockedReason") == "csp":
                url = self._urls[told["requestId"]]
                self.asked.remove(url)  # it never left
                self.blocked.append(url)
            case "Network.responseReceivedExtraInfo":  # of all, also those that the page may not see
                self._statuses.append((told["requestId"], told["statusCode"]))
            case "Log.entryAdded":
                text = told["entry"]["text"]
                if "Content Security Policy" in text or "TrustedHTML" in text or "TrustedScript" in text:
                    self.blocked.append(text)
            case "Fetch.requestPaused":
                answer = self._answer(told["request"]["url"]) or {}
                kind = "fulfillRequest" if "responseCode" in answer else "continueRequest"
                self._browser.send(f"Fetch.{kind}", self._session, requestId=told["requestId"], **answer)

    def reset(self) -> None:
        """Nothing is open, kept, intercepted or remembered any more."""
        self.call("Fetch.disable")
        self.call("Network.emulateNetworkConditions", **_ONLINE)
        self.go("about:blank")
        self.call("Network.clearBrowserCookies")
        self.call("Emulation.clearDeviceMetricsOverride")
        self.call("Emulation.setEmulatedMedia", features=[])
        for seen in (self.asked, self.dialogs, self.blocked, self._statuses, self._urls):
            seen.clear()

    def unplug(self) -> None:
        self.call("Network.emulateNetworkConditions", **_ONLINE | {"offline": True})

    def intercept(self, pattern: str, answer: Callable[[str], Answer | None]) -> None:
        """Requests whose URL fits `pattern` are answered, or changed, as `answer` says; None: go on."""
        self._answer = answer
        self.call("Fetch.enable", patterns=[{"urlPattern": pattern}])

    def go(self, url: str) -> None:
        """Open, and wait until everything of the page is there; what is no page comes as a download, and
        is refused."""
        before = self._loaded
        if "errorText" not in self.call("Page.navigate", url=url):
            self._browser.wait(lambda: self._loaded > before, url)

    def leave(self, act: Callable[[], object]) -> None:
        """Do what leads to another page, and wait for that."""
        before = self._loaded
        act()
        self._browser.wait(lambda: self._loaded > before, "the next page")

    def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true; its value. It may meet a page that is just being left."""
        until = time.monotonic() + SOON_S
        while True:
            try:
                if value := self.run(script):
                    return value
            except AssertionError as gone:
                if "context" not in str(gone):
                    raise
            assert time.monotonic() < until, f"never true: {script}; {self.run('document.body.innerText')}"

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """`Tab` or `Enter`."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        told = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **told, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def look(self, *, width: int = 1024, height: int = 768, dark: bool = False) -> None:
        """The size of the window, and what its owner likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def html(text: str, *headers: tuple[str, str]) -> Answer:
    """A page, as the answer to an intercepted request."""
    return {
        "responseCode": 200,
        "responseHeaders": [
            {"name": name, "value": value} for name, value in (("content-type", "text/html"), *headers)
        ],
        "body": base64.b64encode(text.encode()).decode("ascii"),
    }
