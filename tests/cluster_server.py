"""A gateway over the fake cluster in a thread: for the SDK, the commands, and a look by eye.

`python -m tests.cluster_server` keeps one up until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog

from ollama_distributed.access.keys import make_admin_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference
from tests.gateway_bench import HELLO, WALL, gateway, serving
from tests.limits import SOON_S

T = TypeVar("T")
DEADLINE_S = SOON_S


class ClusterServer:
    def __init__(self, cluster: FakeCluster, port: int = 0) -> None:
        self.cluster = cluster
        self._port = port
        self.key, record = make_admin_key(WALL)
        self.key_id = record.id
        self.url = ""
        self.ready = True
        self._authenticator = Authenticator([record], require_key=False, wall=lambda: WALL)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = gateway(
            ScriptedInference(HELLO),
            cluster=self.cluster,
            authenticator=self._authenticator,
            ready=lambda: self.ready,
        )
        async with serving(app, adapter="fast", port=self._port) as server:
            self.url = f"http://127.0.0.1:{server.port}"
            self._started.set()
            await self._stop.wait()
            self.ready = False

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Run a call of the cluster where it lives."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(DEADLINE_S)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(DEADLINE_S)

    def stop(self) -> None:
        """Idempotent."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@contextmanager
def cluster_server(cluster: FakeCluster | None = None, *, port: int = 0) -> Iterator[ClusterServer]:
    server = ClusterServer(cluster or FakeCluster("alpha", "beta", "gamma", "delta"), port)
    usual = structlog.get_config()
    # Commands under test print to the same stdout as the log.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        structlog.configure(**usual)


def main() -> None:
    import time

    cluster = FakeCluster("alpha", "beta", "gamma", "delta", "gpu-rack-12", now=time.time)
    cluster.set("gamma", status="suspect", reason="no heartbeat for 3 s")
    cluster.set("delta", status="draining", labels={"zone": "b"})
    with cluster_server(cluster) as server:
        print(f"export OLLAMA_HOST={server.url} OLLAMA_API_KEY={server.key}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
