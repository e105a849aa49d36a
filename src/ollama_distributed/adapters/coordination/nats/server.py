"""Runs one nats-server as a child: starts it, makes sure of it, restarts it, stops it.

Ready means: it answers, it is healthy, and it says itself that every write is synced. A
server that dies comes back on the same port, after a pause that doubles while it keeps
dying; the clients reconnect by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.coordination.nats import binary, config
from ollama_distributed.adapters.coordination.nats.session import Address, Login
from ollama_distributed.adapters.coordination.nats.system import System
from ollama_distributed.adapters.durable import replace_file
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

RESTARTED = "coordination.server_restarted"
DIED = "coordination.server_died"
RELOADED = "coordination.server_reloaded"

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
ANY_HOSTS = ("0.0.0.0", "::")  # noqa: S104  # compared with, not bound


class Access(Protocol):
    """Who may connect to a server: `adapters.identity.nats_access.ServerAccess`."""

    def entries(self, accounts: Path) -> Mapping[str, Any]:
        """Operator, accounts (kept in the folder `accounts`) and TLS; the same text each time."""
        ...

    def routes(self) -> Mapping[str, Any]:
        """The `tls` and `authorization` blocks between servers."""
        ...

    def system(self) -> Login:
        """A user of the server's own account."""
        ...


class NatsServer:
    """The server in `folder`, alone or one of several. `async with` starts and stops it."""

    def __init__(
        self,
        folder: Path,
        access: Access,
        *,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        cluster: config.ClusterBlock | None = None,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`name`: the node's id, unique in the cluster. `port` 0: any free one, kept over
        restarts. `environment` replaces the scrubbed one."""
        self.folder = folder
        self._access = access
        self._given = program
        self._environment = environment or {"PATH": os.defpath}
        self._settings = config.ServerConfig(
            name=name, folder=str(folder.absolute()), host=host, port=port or -1, cluster=cluster
        )
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.binary: binary.Binary | None = None
        self.restarts = 0

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        return self._settings.name

    @property
    def port(self) -> int:
        """For clients; the real one after the start, kept over restarts."""
        return self._settings.port

    @property
    def url(self) -> str:
        """For clients on this machine."""
        host = "127.0.0.1" if self._settings.host in ANY_HOSTS else self._settings.host
        return f"tls://[{host}]:{self.port}" if ":" in host else f"tls://{host}:{self.port}"

    @property
    def cluster(self) -> config.ClusterBlock | None:
        return self._settings.cluster

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def accounts(self) -> Path:
        """The resolver's folder."""
        return self.folder / "accounts"

    @property
    def pid(self) -> int:
        assert self._process is not None, "started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """From `start` to `stop`, also while it is being restarted."""
        return self._keeping is not None

    @property
    def host(self) -> str:
        return self._settings.host

    @property
    def system(self) -> System:
        """Its administration, and through it that of its cluster."""
        return self.system_at((self.url,))

    def system_at(self, urls: tuple[str, ...]) -> System:
        """The administration of other servers of this cluster."""
        return System(Address(urls=urls, login=self._access.system()), name=self.name)

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
        await asyncio.to_thread(self.folder.mkdir, mode=0o700, parents=True, exist_ok=True)
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

    def change(
        self,
        *,
        host: str | None = None,
        port: int | None = None,
        cluster: config.ClusterBlock | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> None:
        """Use other settings from the next start on; a running server is not touched."""
        settings = self._settings
        self._settings = msgspec.structs.replace(
            settings,
            host=settings.host if host is None else host,
            port=settings.port if port is None else port or -1,
            cluster=settings.cluster if isinstance(cluster, msgspec.UnsetType) else cluster,
        )

    async def reload(self) -> None:
        """Use renewed certificates (of clients and routes) and changed routes. Connections that
        are open stay."""
        await asyncio.to_thread(self._write_config)
        process = self._process
        if process is not None and process.returncode is None:
            _signal(process, signal.SIGHUP)
            log.info(RELOADED, pid=process.pid)

    async def push_account(self, account: str) -> int:
        """Give this server, and all of its cluster, a newer JWT of the application's account:
        revoked users are cut off at once. How many servers took it.

        The JWT must be issued in a later second than the last one (`nats_jwt.account_jwt`).

        Raises:
            Unavailable: none took it.
        """
        return await self.system.push_account(account)

    async def share_accounts(self) -> None:
        """Give the accounts as this server has them to all servers of its cluster: one that is
        new has none of the revocations yet.

        Raises:
            Unavailable: none took one.
        """
        for account in await asyncio.to_thread(self._read_accounts):
            await self.push_account(account)

    def _read_accounts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.accounts.glob("*.jwt"))]

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            _signal(process, signal.SIGTERM)
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(STOP_S):
                    await process.wait()
                if process.returncode is None:
                    _signal(process, signal.SIGKILL)
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
            except Exception as exc:  # the task's root: no room for its configuration, no process to be had
                await self._end()
                log.warning(DIED, reason=str(exc), exc_info=not isinstance(exc, Unavailable | OSError))
                continue
            self.restarts += 1
            log.info(RESTARTED, pid=self.pid, restarts=self.restarts)

    # ── one start ───────────────────────────────────────────────────────────────────

    async def _launch(self) -> None:
        assert self.binary is not None
        await asyncio.to_thread(self._write_config)
        await asyncio.to_thread(self._forget_ports)
        complaints = await asyncio.to_thread(_open_private, self.folder / COMPLAINTS_NAME)
        # From the loop's own thread: PDEATHSIG fires when the starting thread ends.
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", str(CHILD), str(os.getpid()), str(self.binary.path)),
                *("-c", str((self.folder / CONFIG_NAME).absolute())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=complaints,
                cwd=self.folder,
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
        """
        Raises:
            Unavailable: it runs, but does not sync every write.
        """
        port = await asyncio.to_thread(self._read_port)
        if port is None:
            return False
        self._settings = msgspec.structs.replace(self._settings, port=port)
        try:
            healthy = await self.system.health(self.name, alone=self.cluster is None)
            synced = healthy and await self.system.syncs_always(self.name)
        except Unavailable:
            return False
        if healthy and not synced:
            raise Unavailable("nats-server does not sync every write: a power cut would lose state")
        return healthy

    def _write_config(self) -> None:
        text = config.render(self._settings, self._access.entries(self.accounts), self._access.routes())
        replace_file(self.folder / CONFIG_NAME, text.encode())

    def _forget_ports(self) -> None:
        for file in self.folder.glob("*.ports"):
            file.unlink(missing_ok=True)

    def _read_port(self) -> int | None:
        for file in self.folder.glob(f"*_{self.pid}.ports"):
            with contextlib.suppress(msgspec.DecodeError, OSError, KeyError, IndexError):  # half written
                url: str = msgspec.json.decode(file.read_bytes())["nats"][0]
                return int(url.rpartition(":")[2])
        return None

    async def _last_words(self) -> str:
        def read() -> str:
            lines: list[str] = []
            for name in ("nats-server.log", COMPLAINTS_NAME):
                with contextlib.suppress(FileNotFoundError):  # it ended before it wrote any
                    text = (self.folder / name).read_text(errors="replace")
                    lines += [line for line in text.splitlines() if line][-3:]
            return " / ".join(lines) or "it wrote no log"

        return await asyncio.to_thread(read)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # The process object's own methods reap a child that just died, behind asyncio's back.
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
