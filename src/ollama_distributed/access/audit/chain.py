"""The chain: how a record is sealed, and how a broken chain is seen. Pure.

A record's hash covers all of it and the hash before, over canonical JSON: sorted keys, no space,
defaults left out. A line that says the same in other bytes is a fault too.

A chain is kept in parts, each but the first begun by a record that says so, with the time of the
record before it, whose hash it holds as any other. Only whole parts are removed once they are old, and
a record in the chain says which was the last: a chain that begins anywhere else was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from ollama_distributed.base.audit import AuditEntry, AuditRecord

GENESIS = "0" * 64
"""`prev` of the first record."""
PART = "audit.part"
"""Action of the first record of a part."""
REMOVED = "audit.removed"
"""Action of the record that says which part was removed."""

_records = msgspec.json.Decoder(AuditRecord)


class Head(msgspec.Struct, frozen=True):
    """Where a chain ends."""

    seq: int = 0
    hash: str = GENESIS
    at: float = 0.0


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    head: Head
    first: int = 1
    """Number of the record with which it begins."""
    fault: str = ""
    fault_seq: int = 0


def seal(entry: AuditEntry, *, node: str, head: Head, now: float) -> AuditRecord:
    """The entry as the next record after `head`."""
    record = AuditRecord(
        **msgspec.structs.asdict(entry), node=node, seq=head.seq + 1, at=max(now, head.at), prev=head.hash
    )
    return msgspec.structs.replace(record, hash=digest(record))


def digest(record: AuditRecord) -> str:
    return hashlib.sha256(encode(msgspec.structs.replace(record, hash=""))).hexdigest()


def encode(record: AuditRecord) -> bytes:
    """Canonical: the same record gives the same bytes."""
    return msgspec.json.encode(record, order="sorted")


def decode(line: bytes) -> AuditRecord | None:
    """None: it is no record."""
    try:
        return _records.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def head_of(record: AuditRecord) -> Head:
    return Head(record.seq, record.hash, record.at)


def begin_of(head: Head) -> AuditEntry:
    """What begins a part that follows `head`."""
    return AuditEntry(action=PART, result="ok", object=f"after={head.at!r}")


def before(first: AuditRecord) -> Head:
    """What the first record of a part follows, as it says itself."""
    try:
        at = float(first.object.removeprefix("after="))
    except ValueError:
        at = first.at
    return Head(first.seq - 1, first.prev, min(at, first.at))


def removal_of(last: Head) -> AuditEntry:
    """What a chain says of a part that is removed. `last`: the last record of it."""
    said = "it was older than audit_kept"
    return AuditEntry(action=REMOVED, result="ok", object=f"record={last.seq} hash={last.hash}", detail=said)


def fault_of(record: AuditRecord | None, line: bytes, *, node: str, head: Head) -> str:
    """What keeps this line from being the next record after `head`; empty: nothing."""
    if record is None:
        return "the line is no record"
    if record.node != node:
        return f"it is a record of node {record.node}"
    if record.seq != head.seq + 1:
        return f"record {head.seq + 1} is missing: the next one is {record.seq}"
    if record.prev != head.hash:
        return "it does not follow from the record before"
    if record.at < head.at:
        return "it is older than the record before"
    if record.hash != digest(record) or line != encode(record):
        return "it was changed"
    return ""


def check(
    lines: Iterable[bytes],
    *,
    node: str,
    last: Head | None = None,
    expect: Mapping[int, str] | None = None,
    due_before: float | None = None,
) -> Checked:
    """Read a chain from its begin. `last`: a record that must be in it, as it was noted when it was
    written; `expect`: hashes that copies of it have, by number. `due_before`: records that were older
    (wall time) may be missing though nothing says it yet: of a copy that is still being made."""
    head, first, cut = Head(), 1, ""
    wanted: dict[int, set[str]] = {seq: {known} for seq, known in (expect or {}).items()}
    if last is not None and last.seq:
        wanted.setdefault(last.seq, set()).add(last.hash)
    for line in lines:
        record = decode(line)
        if record is not None and record.seq > 1 and not head.seq and record.action == PART:
            head, first = before(record), record.seq
            wanted = {seq: known for seq, known in wanted.items() if seq >= first}
            if due_before is None or head.at >= due_before:
                cut = removal_of(head).object
        fault = fault_of(record, line, node=node, head=head)
        if fault or record is None:
            return Checked(head=head, first=first, fault=fault, fault_seq=head.seq + 1)
        head = head_of(record)
        if record.action == REMOVED and record.object == cut:
            cut = ""
        if wanted.pop(head.seq, {head.hash}) != {head.hash}:
            said = "it is not the record that was written: a copy, or the note of the last one, has another"
            return Checked(head=head, first=first, fault=said, fault_seq=head.seq)
    if wanted:
        said = "records were cut off at the end"
        return Checked(head=head, first=first, fault=said, fault_seq=head.seq + 1)
    if cut:
        said = "records before this one are gone, and none says that they were removed for their age"
        return Checked(head=head, first=first, fault=said, fault_seq=first)
    return Checked(head=head, first=first)
