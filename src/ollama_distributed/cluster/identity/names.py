"""What a node is called in its certificate, and who decides it.

A node's identity is one SAN URI, `spiffe://<cluster>/node/<id>` (SPIFFE-ID 2); nothing else in
a certificate says who it is. DNS names and addresses are there only because NATS routes
check the host that they dial. The signer decides all of them from what it saw and what the
operator allowed; a request's own wishes are never read (CVE-2025-59353: a certificate for
any address that the asker names).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId, NodeRole

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

BUS_LABEL = "nats"
"""No node may be called so: it is the first word of the name that all NATS servers share."""
MAX_NAMES = 16
"""Names of one node: a machine has few, a certificate should stay under a packet or two."""
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_URI = re.compile(r"spiffe://([a-z0-9-]{1,63})/node/([a-z0-9-]{1,63})", re.ASCII)


class Names(msgspec.Struct, frozen=True):
    """DNS names and addresses of one node, as its certificate states them."""

    dns: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


def check_label(text: str, what: str) -> str:
    """A cluster's or node's id: one DNS label, lower case.

    Raises:
        Invalid: anything else; `what` names it in the message.
    """
    if not _LABEL.fullmatch(text):
        raise Invalid(f"{what} must be 1-63 of a-z, 0-9 and inner hyphens")
    return text


def check_node(text: str) -> NodeId:
    """A node's id.

    Raises:
        Invalid: no label, or the one that NATS servers are known by.
    """
    if text == BUS_LABEL:
        raise Invalid(f"no node may be called {BUS_LABEL}")
    return NodeId(check_label(text, "node id"))


def spiffe_id(cluster: str, node: str) -> str:
    return f"spiffe://{check_label(cluster, 'cluster id')}/node/{check_node(node)}"


def parse_spiffe_id(uri: str) -> tuple[str, NodeId]:
    """Cluster and node of a SAN URI; exact form only.

    Raises:
        Invalid: any other URI.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise Invalid("the certificate names no node")
    return check_label(match[1], "cluster id"), check_node(match[2])


def dns_name(cluster: str, node: str) -> str:
    """The name under which a node's certificate verifies wherever it is dialled.

    `.internal` is reserved for private use; the name is given as the expected TLS host name
    and never looked up.
    """
    return f"{check_node(node)}.{_domain(cluster)}"


def bus_name(cluster: str) -> str:
    """The name that every NATS server's certificate states and every NATS client wants.

    Only the role `server` gets it, so a mere node cannot pose as a NATS server.
    """
    return f"{BUS_LABEL}.{_domain(cluster)}"


def decide_names(
    cluster: str, node: str, role: NodeRole, *, observed: str, allowed: Iterable[str] = ()
) -> Names:
    """The names that a certificate of `node` states: its own DNS name, a server's also
    `bus_name`, the address it was seen at (`observed`, empty when there is none), and the
    hosts that the operator `allowed` for it.

    Raises:
        Invalid: `observed` or one of `allowed` is no host, or belongs to the cluster's own names.
    """
    dns: list[str] = [dns_name(cluster, node)]
    if role == "server":
        dns.append(bus_name(cluster))
    addresses: list[str] = []
    for host in map(canonical_host, [*([observed] if observed else []), *sorted(allowed)]):
        if host.endswith(f".{_domain(cluster)}") and host not in dns:
            raise Invalid(f"{host} is a name of the cluster's own")
        kind = addresses if is_address(host) else dns
        if host not in kind and len(dns) + len(addresses) < MAX_NAMES:
            kind.append(host)
    return Names(dns=tuple(dns), addresses=tuple(addresses))


def _domain(cluster: str) -> str:
    return f"{check_label(cluster, 'cluster id')}.internal"


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def canonical_host(text: str) -> str:
    """A host in the one form in which it is compared: an address without zone, mapping or
    brackets, or a lower-case DNS name.

    Raises:
        Invalid: neither.
    """
    bare = text.strip().removeprefix("[").removesuffix("]")
    try:
        address: IPAddress = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        name = bare.lower().removesuffix(".")
        if len(name) > 253 or not name or not all(_LABEL.fullmatch(part) for part in name.split(".")):
            raise Invalid(f"'{text[:80]}' is neither an address nor a host name") from None
        return name
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)
