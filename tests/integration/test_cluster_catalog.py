"""The cluster's catalogue: one version a name at every node, changes from nodes that hold nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.catalogues import Catalogues
from tests.hop_nodes import cluster
from tests.swarm_nodes import SwarmNode, swarm

from ollama_distributed.base.errors import InvalidName, ModelNotFound, Unavailable, Unsupported
from ollama_distributed.catalog.cluster import ClusterCatalog
from ollama_distributed.models.names import ModelName, name_key

pytestmark = pytest.mark.integration


class Seen:
    """Nodes a, b, c, and the catalogue as each shows it."""

    def __init__(self, nodes: list[SwarmNode], catalogues: Catalogues, shown: list[ClusterCatalog]) -> None:
        self.nodes, self.catalogues, self.shown = nodes, catalogues, shown

    def names(self) -> list[set[str]]:
        return [{spec.display for spec in one.list()} for one in self.shown]

    async def digests(self, name: str) -> set[tuple[str, float]]:
        """Of a name, as lists, questions and `show` have it at every node: one, if all is well."""
        found = set()
        for one in self.shown:
            spec = await one.resolve(name)
            shown = await one.show(name)
            found |= {(spec.digest, spec.modified_at), (shown.spec.digest, shown.modified_at)}
            found |= {(row.digest, row.modified_at) for row in one.list() if row.name == spec.name}
        return found


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[Seen]:
    async with swarm(folder) as nodes:
        all_nodes = [await nodes.add(name) for name in "abc"]
        yield Seen(all_nodes, nodes.catalogues, [node.names for node in all_nodes])


async def test_a_name_is_deleted_everywhere_from_a_node_that_lacks_it(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        a, b, c = seen.nodes
        await b.hold("m", 1)
        await c.hold("m", 1)
        await c.hold("other", 1, seed=8)
        await seen.shown[0].delete("m")
        assert seen.names() == [{"other:latest"}] * 3
        assert [len(node.blobs()) for node in (a, b, c)] == [0, 0, 2]
        for name in ("m", "none"):
            with pytest.raises(ModelNotFound, match=f"model '{name}' not found"):
                await seen.shown[0].delete(name)
        with pytest.raises(InvalidName, match="invalid"):
            await seen.shown[0].delete("a b")


async def test_a_node_that_was_away_deletes_when_it_returns(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        _, b, c = seen.nodes
        content = await b.hold("m", 1)
        await c.hold("m", 1)
        made_at = c.hop.catalog.models()[name_key("m")]
        seen.catalogues.away = {c.id}
        await seen.shown[1].delete("m")
        assert c.content("m") == content
        assert seen.names() == [set()] * 3, "nobody shows it any more, not even who has it still"
        await seen.catalogues.clean()
        assert list(seen.catalogues.nodes.state.leftovers) == [name_key("m")]

        await b.hold("m", 2, seed=9)  # the same name again, before the old one is gone
        assert seen.names() == [{"m:latest"}] * 3
        with pytest.raises(ModelNotFound, match="deleted meanwhile"):
            await c.hop.catalog.adopt(ModelName.parse("m"), await manifest(c, "m"), made_at)
        seen.catalogues.away = set()
        await seen.catalogues.clean()
        assert not c.blobs()
        assert not seen.catalogues.nodes.state.leftovers
        assert len(await seen.digests("m")) == 1
        assert len(b.content("m")) > 2 << 20


async def test_of_a_copy_that_comes_after_the_deletion_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with three(tmp_path) as seen:
        a, b, _ = seen.nodes
        await a.hold("m", 1)
        adopt = b.hop.catalog.adopt

        async def late(name: ModelName, data: bytes, made_at: float | None = None) -> object:
            await seen.shown[0].delete("m")
            return await adopt(name, data, made_at)

        monkeypatch.setattr(b.hop.catalog, "adopt", late)
        (begun,) = await a.manager.distribute("m", ["b-name"])
        ended = await b.manager.moves.ended(begun.id)
        assert (ended.state, ended.code) == ("failed", "model_not_found")
        assert [len(node.blobs()) for node in (a, b)] == [0, 0]


async def manifest(node: SwarmNode, name: str) -> bytes:
    data = await node.hop.catalog.manifest(ModelName.parse(name))
    assert data is not None
    return data


async def test_what_a_node_brings_along_when_it_joins_is_not_deleted(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        _, b, c = seen.nodes
        await c.hold("m", 1)
        made_at = c.hop.catalog.models()[name_key("m")]
        seen.catalogues.away = {c.id}
        await b.hold("m", 1)
        seen.catalogues.now = made_at + 5.0
        await seen.shown[0].delete("m")
        seen.catalogues.away = set()
        await seen.catalogues.clean(member_since=made_at + 6.0)
        assert seen.names() == [{"m:latest"}] * 3
        assert c.hop.catalog.models()[name_key("m")] > made_at + 5.0


async def test_without_consensus_only_what_is_here_alone_goes(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        a, b, _ = seen.nodes
        await a.hold("both", 1)
        await b.hold("both", 1)
        await a.hold("mine", 1, seed=8)
        seen.catalogues.down = True
        with pytest.raises(Unavailable, match=r"'both' is also on b-name, and the cluster cannot agree"):
            await seen.shown[0].delete("both")
        await seen.shown[0].delete("mine")
        assert a.hop.catalog.models().keys() == {name_key("both")}


async def test_one_version_counts_everywhere_and_clocks_do_not_matter(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        a, b, _ = seen.nodes
        await a.hold("m", 1)
        await b.hold("m", 1)  # the same content, later
        assert len(await seen.digests("m")) == 1
        state = seen.catalogues.nodes.state
        ahead = state.current(name_key("m"))
        assert ahead is not None
        # A version of a node whose clock is an hour behind is the newest all the same.
        b.hop.catalog._clock = Behind()
        await b.hold("m", 1, seed=9)
        assert {digest for digest, _ in await seen.digests("m")} == {b.hop.catalog.list()[0].digest}
        assert len(await seen.digests("m")) == 1
        assert b.hop.catalog.models()[name_key("m")] == pytest.approx(ahead.modified_at, abs=0.01)


class Behind:
    def time(self) -> float:
        return 1_000.0

    def monotonic(self) -> float:
        return 1_000.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError


async def test_a_copy_is_made_where_the_model_lies(tmp_path: Path) -> None:
    async with three(tmp_path) as seen:
        a, b, _ = seen.nodes
        await b.hold("m", 1)
        await seen.shown[0].copy("m", "again")
        assert seen.names() == [{"m:latest", "again:latest"}] * 3
        assert not a.blobs()
        assert len(b.blobs()) == 2
        with pytest.raises(ModelNotFound, match='model "none" not found'):
            await seen.shown[0].copy("none", "x")
        with pytest.raises(InvalidName, match='destination "a b" is invalid'):
            await seen.shown[0].copy("m", "a b")
        b.hop.addresses[a.id] = ("127.0.0.1:1",)
        a.hop.addresses[b.id] = ("127.0.0.1:1",)
        a.hop.pool.drop(b.id, "test")
        with pytest.raises(Unavailable, match="node b cannot be reached"):
            await seen.shown[0].copy("m", "x")


async def test_models_of_a_nodes_own_engine_stay(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a, b = await nodes.add("a"), await nodes.add("b", ("m",))
        catalogues = Catalogues(nodes)
        here, _ = catalogues.add(a), catalogues.add(b)
        with pytest.raises(Unsupported, match="engine of b-name; delete it there"):
            await here.delete("m")
        with pytest.raises(Unsupported, match="engine of b-name and cannot be copied"):
            await here.copy("m", "x")
