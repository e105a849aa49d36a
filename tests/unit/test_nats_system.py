"""Who belongs to the Raft group, in the words of nats-server."""

from ollama_distributed.adapters.coordination.nats.system import Meta, Peer, peer_id


def test_the_peer_is_what_nats_server_makes_of_the_name() -> None:
    # From the peers.idx of nats-server 2.15.1.
    assert [peer_id(name) for name in ("t44nmbsdliof", "ok6g1debwzh9")] == ["NqjZzbAi", "A10jSeDQ"]


def test_a_server_is_known_by_name_or_by_peer() -> None:
    meta = Meta(
        leader="t44nmbsdliof",
        cluster_size=3,
        replicas=(
            Peer(name="y6nqrldzgwjc", peer="GjRrQigg"),
            Peer(name="Server name unknown at this time (peerID: A10jSeDQ)", peer="A10jSeDQ", offline=True),
        ),
    )
    assert all(map(meta.has, ("t44nmbsdliof", "y6nqrldzgwjc", "ok6g1debwzh9")))
    assert not meta.has("elsewhere")
