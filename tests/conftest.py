"""What every test may use."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import coverage
import pytest
from hypothesis import HealthCheck, settings

from ollama_distributed.node.settings import CLUSTER_PORT, NATS_PORT, ROUTES_PORT
from tests.models import Models

# A busy machine is slow at times: no property is about time. The same examples each time, or CI
# would fail now and then where nothing changed; `make accept-properties` looks for new ones.
settings.register_profile(
    "ours", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("many", settings.get_profile("ours"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ours"))

# A shell ignores it for what it starts in the background, and children inherit that: Ctrl-C would
# do nothing to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNIT = Path(__file__).parent / "unit"
_TRACED_CHILDREN = "COVERAGE_PROCESS_CONFIG"
"""By this variable coverage reaches the processes that a test starts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker takes whole files, and the last ones should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        return item.path not in slow, item.path.is_relative_to(UNIT)

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tracing makes Python several times slower: tests marked `untraced` go without, and whole nodes."""
    tracing = coverage.Coverage.current()
    if tracing is None or not any(item.get_closest_marker(name) for name in ("untraced", "e2e")):
        return (yield)
    configured = os.environ.pop(_TRACED_CHILDREN, None)
    tracing.stop()
    try:
        return (yield)
    finally:
        tracing.start()
        if configured is not None:
            os.environ[_TRACED_CHILDREN] = configured


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the node does."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def no_usual_ports() -> Iterator[None]:
    """Every node takes free ports, and finds them again when it restarts: the node of a test that runs
    beside would take a usual one while it is down. All workers hold them."""
    with ExitStack() as held:
        for port in (CLUSTER_PORT, NATS_PORT, ROUTES_PORT):
            holder = held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with suppress(OSError):  # a node that is no test's has it
                holder.bind(("127.0.0.1", port))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Small models for the real engine, each made once per session."""
    return Models(tmp_path_factory.mktemp("models"))
