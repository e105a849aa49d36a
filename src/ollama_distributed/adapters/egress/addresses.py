"""Which addresses a request may go to. Pure.

A name that somebody sends us (a model's registry, a redirect, a realm) must not make us knock
at our own network (SSRF; security table, row H). Public is what IANA's special-purpose
registries do not set apart; an address that carries another one inside (NAT64) counts as that.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_V4_SET_APART = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.31.196.0/24",
            "192.52.193.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_V6_GLOBAL = IPv6Network("2000::/3")
"""All that IANA has given out for global use lies here."""
_V6_SET_APART = tuple(
    map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)
"""Within it: Teredo and other protocol assignments, documentation, 6to4 (which carries any IPv4)."""
_NAT64 = IPv6Network("64:ff9b::/96")
_MAPPED = IPv6Network("::ffff:0:0/96")

_NEVER = frozenset(
    map(
        ip_address,
        ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"),
    )
)
"""Metadata services of clouds that lie outside of the link-local range; one looks public."""


def is_public(address: Address) -> bool:
    """Whether anybody's name may lead there."""
    if address in _NEVER:
        return False
    match address:
        case IPv4Address():
            return not any(address in network for network in _V4_SET_APART)
        case IPv6Address():
            if address.scope_id is not None:
                return False
            if address in _NAT64:
                return is_public(_inner(address))
            return address in _V6_GLOBAL and not any(address in network for network in _V6_SET_APART)


def is_reachable(address: Address) -> bool:
    """Whether an operator may configure a registry there: private networks and this machine, but
    never link-local (where clouds keep credentials), multicast or no address at all."""
    if address in _NEVER:
        return False
    if isinstance(address, IPv6Address):
        if address in _MAPPED or address in _NAT64:
            return is_reachable(_inner(address))
        if address.scope_id is not None:
            return False
    return not (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (isinstance(address, IPv4Address) and (address in _V4_SET_APART[0] or address.is_reserved))
    )


def _inner(address: IPv6Address) -> IPv4Address:
    """The IPv4 address in the last 32 bits."""
    return IPv4Address(int(address) & 0xFFFFFFFF)
