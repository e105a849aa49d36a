"""The keys of the replicated records, and what a key is about."""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.ids import KeyId, NodeId

LEASE = "leader.lease"
FENCE = "leader.fence"
CONFIG = "config.current"
VOTERS = "cluster.voters"
_SINGLES = frozenset({LEASE, FENCE, CONFIG, VOTERS})
_NODES = "nodes."
_MEMBERS = "members."
_INTENTS = "intents."
_HISTORY = "config.history."
_CHANGES = "changes."
ACCESS_KEYS = "access.keys."
ACCESS_POLICIES = "access.policies."

_MODELS = "models."
_DELETED = "deleted."
_ASSIGNED = "assign."

NodePart: TypeAlias = Literal["advert", "holdings", "member", "intent", "assigned", "placed"]


class OfNode(msgspec.Struct, frozen=True):
    node: NodeId
    part: NodePart


class OfModel(msgspec.Struct, frozen=True):
    """`models.<hash>`; the record says which model."""

    hash: str


class OfDeletion(msgspec.Struct, frozen=True):
    """`deleted.<hash>`; the record says which model."""

    hash: str


class OfVersion(msgspec.Struct, frozen=True):
    """`config.history.<version>`."""

    version: int


class OfChange(msgspec.Struct, frozen=True):
    """`changes.<id>`."""

    id: str


class OfKey(msgspec.Struct, frozen=True):
    """`access.keys.<id>`."""

    id: KeyId


class OfPolicy(msgspec.Struct, frozen=True):
    """`access.policies.<name>`."""

    name: str


class Single(msgspec.Struct, frozen=True):
    """A key that there is once."""

    key: str


Subject: TypeAlias = OfNode | OfModel | OfDeletion | OfVersion | OfChange | OfKey | OfPolicy | Single


def advert(node: str) -> str:
    return f"{_NODES}{node}.advert"


def holdings(node: str) -> str:
    return f"{_NODES}{node}.models"


def member(node: str) -> str:
    return _MEMBERS + node


def intent(node: str) -> str:
    return _INTENTS + node


def assigned(node: str) -> str:
    return _ASSIGNED + node


def placed(node: str) -> str:
    return f"{_NODES}{node}.placed"


def model_hash(model: str) -> str:
    """Names hold characters that keys may not, and may be longer."""
    return hashlib.sha256(model.encode()).hexdigest()[:32]


def desired(model: str) -> str:
    return _MODELS + model_hash(model)


def deleted(model: str) -> str:
    return deleted_by_hash(model_hash(model))


def deleted_by_hash(digest: str) -> str:
    return _DELETED + digest


def version(number: int) -> str:
    return f"{_HISTORY}{number}"


def change(proposal: str) -> str:
    return _CHANGES + proposal


def access_key(id_: str) -> str:
    return ACCESS_KEYS + id_


def policy(name: str) -> str:
    return ACCESS_POLICIES + name


def of_node(node: str) -> tuple[str, ...]:
    """Every key that is about a node."""
    return advert(node), holdings(node), member(node), intent(node), assigned(node), placed(node)


def subject(key: str) -> Subject | None:
    """What `key` is about; None: nothing that this version knows."""
    match key.split("."):
        case ["nodes", node, "advert"]:
            return OfNode(NodeId(node), "advert")
        case ["nodes", node, "models"]:
            return OfNode(NodeId(node), "holdings")
        case ["nodes", node, "placed"]:
            return OfNode(NodeId(node), "placed")
        case ["assign", node]:
            return OfNode(NodeId(node), "assigned")
        case ["models", digest]:
            return OfModel(digest)
        case ["deleted", digest]:
            return OfDeletion(digest)
        case ["members", node]:
            return OfNode(NodeId(node), "member")
        case ["intents", node]:
            return OfNode(NodeId(node), "intent")
        case ["config", "history", number] if (
            number.isascii() and number.isdigit() and str(int(number)) == number
        ):
            return OfVersion(int(number))
        case ["changes", proposal]:
            return OfChange(proposal)
        case ["access", "keys", id_]:
            return OfKey(KeyId(id_))
        case ["access", "policies", name]:
            return OfPolicy(name)
        case _ if key in _SINGLES:
            return Single(key)
        case _:
            return None
