"""What an announcement on the network says, and what liars may put into it."""

from __future__ import annotations

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.discovery.mdns import Found, announced, browse, read_facts

FACTS = {"cluster": "c1", "node": "n1", "name": "box", "version": "1.0", "ca": "ab" * 32}


def test_an_announcement_is_read() -> None:
    found = read_facts(FACTS, ["192.0.2.1", "fe80::1"], 7443)
    assert found is not None
    assert found.addresses == ("192.0.2.1:7443", "[fe80::1]:7443")
    assert (found.cluster, found.name, found.ca_sha256) == ("c1", "box", "ab" * 32)


@pytest.mark.parametrize("lacks", [{"cluster": ""}, {"node": ""}])
def test_what_is_not_ours_is_left_out(lacks: dict[str, str]) -> None:
    assert read_facts(FACTS | lacks, ["192.0.2.1"], 7443) is None
    assert read_facts(FACTS, ["192.0.2.1"], 0) is None


def test_nothing_of_it_reaches_a_terminal_as_it_is() -> None:
    found = read_facts(FACTS | {"name": "\x1b[2Jev\u202eil" + "x" * 500}, ["192.0.2.1"], 7443)
    assert found is not None
    assert found.name.isprintable()
    assert len(found.name) <= 128


@pytest.mark.integration
async def test_who_announces_is_found() -> None:
    node = Found(
        cluster="c1",
        node="n-test",
        name="box",
        version="1",
        ca_sha256="ab" * 32,
        addresses=("127.0.0.1:7443",),
    )
    async with announced(node):
        with anyio.fail_after(SOON_S):
            while node not in await browse(1.0):
                pass
