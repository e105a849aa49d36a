"""What a client may send, and how slowly. Figures from `reference/security.md`, 3."""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * KIB


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    header_bytes: int = 16 * KIB
    """Request line and header fields together; agents send 1-4 KiB, cookies up to 8."""
    header_fields: int = 64
    handshake_deadline_s: float = 5.0
    """Of TLS, from the connection on: two round trips, and some computing."""
    header_deadline_s: float = 10.0
    """From the first byte (or the connection) to the end of the head."""
    body_deadline_s: float = 30.0
    """Whole body of an ordinary request; uploads of blobs have only the rate below."""
    body_rate_bytes_s: int = KIB
    """Slower than this over `body_rate_window_s`: cut."""
    body_rate_window_s: float = 10.0
    idle_s: float = 60.0
    """A kept-alive connection without a request."""
    reader_deadline_s: float = 30.0
    """A reader that takes less than `body_rate_bytes_s` for so long is cut, its slot freed."""
    linger_s: float = 3.0
    """After a refusal, for a client that still sends: it reads the answer instead of a reset."""
    linger_bytes: int = 128 * MIB
    """Most that is read and dropped meanwhile."""
    connections: int = 4096
    """Sockets of this process; the node also keeps them under 80 % of its file descriptors."""
    strangers: int = 64
    """Connections of one address (IPv6: a /64) on which nobody has said yet who it is, while more than half
    of all places are taken; others are free to come."""
    sockets: int = 512
    """WebSockets of this node; each page and script that watches has one."""
    sockets_per_caller: int = 64
    """Of them, of one key or person."""

    body_bytes: int = 4 * MIB
    """JSON body; a 128k-token prompt is about 0.5 MiB."""
    large_body_bytes: int = 64 * MIB
    """JSON body on routes that take images."""
    bodies_bytes: int = 512 * MIB
    """Bodies of all inference requests that are not answered yet, together."""
    string_bytes: int = 2 * MIB
    large_string_bytes: int = 32 * MIB
    """One image in base64."""
    json_depth: int = 64
    json_nodes: int = 100_000
    integer_digits: int = 19
    """What fits a signed 64-bit integer."""

    stream_buffer_bytes: int = 256 * KIB
    """Unsent bytes of one stream above which its generation is paused."""
