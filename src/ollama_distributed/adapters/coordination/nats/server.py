"""Runs one nats-server as a child: starts it, makes sure of it, restarts it, stops it.

Ready means: it answers, it is healthy, and it says itself that every write is synced. A
server that dies comes back on the same port, after a pause that doubles while it keeps
dying; the clients reconnect by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec
import nats
import nats.errors
import structlog
from nats.aio.client import Client

from ollama_distributed.adapters.coordination.nats import binary, config
from ollama_distributed.adapters.coordination.nats.session import Address
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

RESTARTED = "coordination.server_restarted"
DIED = "coordination.server_died"

CHILD = Path(__file__).with_name("child.py")
CONFIG_NAME = "nats-server.json"
COMPLAINTS_NAME = "nats-server.err"
"""What it says before its log is open: a bad configuration."""
START_S = 20.0
"""Measured: 0.1 s with an empty store; a store of a million keys takes some seconds."""
STOP_S = 10.0
"""To close the files after SIGTERM; then SIGKILL, which loses nothing that was acknowledged."""
POLL_S = 0.01
BACK_OFF_S, MAX_BACK_OFF_S = 0.05, 5.0
STEADY_S = 10.0
"""A server that lived so long starts again without a pause."""


class NatsServer:
    """A standalone server in `folder`. `async with` starts and stops it.

    Passwords are new with each start of the node and known to nobody else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        port: int = 0,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`port` 0: any free one, kept over restarts. `environment` replaces the scrubbed one."""
        self._folder = folder
        self._given = program
        self._environment = environment or {"PATH": os.defpath}
        self._settings = config.ServerConfig(
            name=name,
            folder=str(folder.absolute()),
            app_password=secrets.token_urlsafe(32),
            system_password=secrets.token_urlsafe(32),
            port=port or -1,
        )
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.binary: binary.Binary | None = None
        self.restarts = 0

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def address(self) -> Address:
        """For the application's clients; valid after the start, and over restarts."""
        return self._address(config.APP, self._settings.app_password)

    @property
    def pid(self) -> int:
        assert self._process is not None, "started"
        return self._process.pid

    def _address(self, user: str, password: str) -> Address:
        url = f"nats://{self._settings.host}:{self._settings.port}"
        return Address(urls=(url,), user=user, password=password)

    # ── life ────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> NatsServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            Unavailable: no usable program, or it does not get ready; the message quotes its log.
        """
        self.binary = await asyncio.to_thread(binary.find, self._given)
        await asyncio.to_thread(self._folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        try:
            await self._launch()
        except BaseException:
            await self._end()
            raise
        self._keeping = asyncio.create_task(self._keep(), name="keep nats-server")

    async def stop(self) -> None:
        """End it in good order. Idempotent."""
        if self._keeping is not None:
            await end([self._keeping])
            self._keeping = None
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(STOP_S):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    async def _keep(self) -> None:
        """Start it again whenever it ends."""
        loop = asyncio.get_running_loop()
        pause_s = BACK_OFF_S
        while True:
            assert self._process is not None
            started_at = loop.time()
            code = await self._process.wait()
            if loop.time() - started_at > STEADY_S:
                pause_s = BACK_OFF_S
            log.warning(DIED, exit_code=code, restart_in_s=pause_s)
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_BACK_OFF_S)
            try:
                await self._launch()
            except Unavailable as exc:
                await self._end()
                log.warning(DIED, reason=exc.message)
                continue
            self.restarts += 1
            log.info(RESTARTED, pid=self.pid, restarts=self.restarts)

    # ── one start ───────────────────────────────────────────────────────────────────

    async def _launch(self) -> None:
        assert self.binary is not None
        await asyncio.to_thread(_write_private, self._folder / CONFIG_NAME, config.render(self._settings))
        await asyncio.to_thread(self._forget_ports)
        complaints = await asyncio.to_thread(_open_private, self._folder / COMPLAINTS_NAME)
        # From the loop's own thread: PDEATHSIG fires when the starting thread ends.
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", str(CHILD), str(os.getpid()), str(self.binary.path)),
                *("-c", str((self._folder / CONFIG_NAME).absolute())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=complaints,
                cwd=self._folder,
                env=dict(self._environment),
                start_new_session=True,
            )
        finally:
            os.close(complaints)
        try:
            with anyio.fail_after(START_S):
                while not await self._ready():
                    if self._process.returncode is not None:
                        code, words = self._process.returncode, await self._last_words()
                        raise Unavailable(f"nats-server ended with code {code}: {words}")
                    await anyio.sleep(POLL_S)
        except TimeoutError as exc:
            raise Unavailable(
                f"nats-server is not ready after {START_S:g} s: {await self._last_words()}"
            ) from exc

    async def _ready(self) -> bool:
        ports = await asyncio.to_thread(self._read_ports)
        if ports is None:
            return False
        self._settings = msgspec.structs.replace(self._settings, port=ports)
        try:
            return await self._healthy()
        except (OSError, nats.errors.Error, TimeoutError):
            return False

    async def _healthy(self) -> bool:
        """Ask it, as its operator.

        Raises:
            Unavailable: it runs, but does not sync every write.
        """
        system = self._address(config.SYSTEM, self._settings.system_password)
        connection = await nats.connect(
            list(system.urls),
            user=system.user,
            password=system.password,
            allow_reconnect=False,
            connect_timeout=2,
            error_cb=_ignore,
        )
        try:
            health = await _ask(connection, "$SYS.REQ.SERVER.PING.HEALTHZ")
            if health.get("status") != "ok":
                return False
            facts = await _ask(connection, "$SYS.REQ.SERVER.PING.VARZ")
        finally:
            await connection.close()
        if not facts.get("jetstream", {}).get("config", {}).get("sync_always"):
            raise Unavailable("nats-server does not sync every write: a power cut would lose state")
        return True

    def _forget_ports(self) -> None:
        for file in self._folder.glob("*.ports"):
            file.unlink(missing_ok=True)

    def _read_ports(self) -> int | None:
        for file in self._folder.glob(f"*_{self.pid}.ports"):
            with contextlib.suppress(msgspec.DecodeError, OSError, KeyError, IndexError):
                url: str = msgspec.json.decode(file.read_bytes())["nats"][0]
                return int(url.rpartition(":")[2])
        return None

    async def _last_words(self) -> str:
        def read() -> str:
            lines: list[str] = []
            for name in ("nats-server.log", COMPLAINTS_NAME):
                with contextlib.suppress(FileNotFoundError):
                    text = (self._folder / name).read_text(errors="replace")
                    lines += [line for line in text.splitlines() if line][-3:]
            return " / ".join(lines) or "it wrote no log"

        return await asyncio.to_thread(read)


async def _ask(connection: Client, subject: str) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode((await connection.request(subject, b"", timeout=2)).data)
    data = answer.get("data")
    return data if isinstance(data, dict) else {}


async def _ignore(_: Exception) -> None:
    """A server that is not up yet: the next look tells."""


def _write_private(path: Path, text: str) -> None:
    """Replace `path`, readable by us alone, never half written."""
    beside = path.with_suffix(".new")
    with os.fdopen(_open_private(beside), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
