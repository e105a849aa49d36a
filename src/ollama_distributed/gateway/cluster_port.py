"""What the gateway's cluster routes need of the node (`node/` connects it).

Reads come from this node's mirror of the state and always answer, with the age of what they
show; writes go to the leader and may raise `Unavailable` (no quorum, within 2 s), `Conflict`,
`NotFound`, `Invalid`. `node` is an id, or a name that only one node has. `actor`: the id of the
key that asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import (
    ClusterAnswer,
    ConfigAnswer,
    ConfigAsk,
    ConfigHistory,
    LeaderAnswer,
    NewToken,
    NodeRow,
    RollbackAsk,
    TokenRequest,
    TokenRow,
)


class Cluster(Protocol):
    def status(self) -> ClusterAnswer: ...

    def leader(self) -> LeaderAnswer: ...

    async def alerts(self) -> list[Alert]:
        """What somebody should see to, each once: what `status` gives as reasons, and what nodes that live
        say of themselves."""
        ...

    async def nodes(self) -> list[NodeRow]:
        """Sorted by name; with the usage that the leader knows, if it answers within 0.5 s."""
        ...

    async def node(self, node: str) -> NodeRow: ...

    async def drain(self, node: str, *, actor: str) -> NodeRow: ...

    async def undrain(self, node: str, *, actor: str) -> NodeRow: ...

    async def label(self, node: str, labels: Mapping[str, str | None], *, actor: str) -> NodeRow: ...

    async def remove(self, node: str, *, force: bool, actor: str) -> None:
        """Revoke it everywhere. Refused (`Conflict`) for a node that is online, unless `force`,
        and for a voter while too few others live."""
        ...

    async def create_token(self, request: TokenRequest, *, actor: str) -> NewToken:
        """The first one opens the cluster's listeners."""
        ...

    async def tokens(self) -> list[TokenRow]: ...

    async def revoke_token(self, token_id: str, *, actor: str) -> None: ...

    async def join(self, token: str, *, actor: str) -> ClusterAnswer:
        """This node, alone until now, becomes a member of another cluster.

        Raises:
            Invalid: it is no token.
            Conflict: this node is in a cluster already, or the other one does not take the token.
            Unavailable: nobody of the other cluster answers.
        """
        ...

    async def leave(self, *, force: bool, actor: str) -> None:
        """This node goes away from the cluster and is alone again."""
        ...

    async def replace_voter(self, dead: str, new: str | None, *, actor: str) -> ClusterAnswer:
        """Take a dead voter out and a living server in (None: the best one).

        Raises:
            Conflict: `dead` still lives, or the rest has no majority.
        """
        ...

    def config(self) -> ConfigAnswer: ...

    async def put_config(self, request: ConfigAsk, *, actor: str) -> ConfigAnswer: ...

    async def config_history(self) -> ConfigHistory: ...

    async def rollback_config(self, request: RollbackAsk, *, actor: str) -> ConfigAnswer: ...

    def watch_config(self) -> AsyncIterator[ConfigAnswer]:
        """The config now, then each new version."""
        ...
