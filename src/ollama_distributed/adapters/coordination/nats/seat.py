"""Which place among the cluster's servers this machine has; kept beside the server's store.

A `Formation` is one set of servers that form one Raft group. Its id is new whenever a group
begins with empty stores, so a server that was told of another formation knows that what it
holds is worth nothing.
"""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from ollama_distributed.adapters.durable import replace_file
from ollama_distributed.base.codec import encode_pretty
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId

SEAT_NAME = "seat.json"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a voter's server is found."""

    node: NodeId
    url: str
    """`tls://host:port`, for clients."""
    route: str
    """`host:port`, for the other servers; the host is in its certificate."""


class Formation(msgspec.Struct, frozen=True, kw_only=True):
    """Servers that vote together."""

    id: str
    cluster: str
    places: tuple[Place, ...]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(place.node for place in self.places)

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(place.url for place in self.places)

    @property
    def routes(self) -> tuple[str, ...]:
        return tuple(place.route for place in self.places)

    @property
    def majority(self) -> int:
        return len(self.places) // 2 + 1

    def place(self, node: str) -> Place:
        return next(place for place in self.places if place.node == node)


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine's server is to be at its next start. Neither of both: there is none."""

    alone: bool = False
    """Standalone: it holds all of the state."""
    formation: Formation | None = None
    """One of several."""
    port: int = 0
    """For clients, once it was chosen."""
    route_port: int = 0
    """For the other servers, once it was chosen."""


def load(folder: Path) -> Seat:
    """
    Raises:
        Invalid: the file is damaged.
    """
    try:
        return msgspec.json.decode((folder / SEAT_NAME).read_bytes(), type=Seat)
    except FileNotFoundError:
        return Seat()
    except msgspec.MsgspecError as exc:
        raise Invalid(f"{folder / SEAT_NAME} is damaged: {exc}") from exc


def save(folder: Path, seat: Seat) -> None:
    replace_file(folder / SEAT_NAME, encode_pretty(seat))


def hold_port(host: str, wanted: int) -> socket.socket:
    """A socket that keeps `wanted`, or else a free port, from others until it is closed: it is
    bound without SO_REUSEADDR and does not listen.

    Raises:
        Invalid: this machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (wanted, 0):
        holder = socket.socket(family)
        try:
            holder.bind((host, port))
        except OSError:
            holder.close()
            continue
        return holder
    raise Invalid(f"no port is free on {host}")
