"""No record of a chain can be changed, taken out, put elsewhere or cut off unseen."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.access.audit.chain import GENESIS, Head, check, encode, head_of, seal
from ollama_distributed.base.audit import AuditEntry, AuditRecord

entries = st.builds(
    AuditEntry,
    action=st.text(max_size=20),
    result=st.sampled_from(["begun", "ok", "forbidden"]),
    object=st.text(max_size=20),
    actor=st.text(max_size=8),
    source=st.sampled_from(["", "127.0.0.1"]),
    count=st.integers(1, 5),
    alarm=st.booleans(),
)


def chain(rows: list[AuditEntry], node: str = "n1") -> list[AuditRecord]:
    head = Head()
    records = []
    for number, row in enumerate(rows):
        records.append(seal(row, node=node, head=head, now=1_700_000_000.0 + number / 3))
        head = head_of(records[-1])
    return records


chains = st.lists(entries, min_size=2, max_size=8).map(chain)


def lines_of(records: list[AuditRecord]) -> list[bytes]:
    return [encode(record) for record in records]


@settings(max_examples=20)
@given(chains)
def test_a_whole_chain_is_whole(records: list[AuditRecord]) -> None:
    assert records[0].prev == GENESIS
    found = check(lines_of(records), node="n1", last=head_of(records[-1]))
    assert (found.fault, found.head) == ("", head_of(records[-1]))
    copy = {str(record.seq): record.hash for record in records}
    assert not check(lines_of(records), node="n1", expect={int(seq): h for seq, h in copy.items()}).fault


@settings(max_examples=30)
@given(chains, st.data())
def test_any_single_edit_is_found(records: list[AuditRecord], data: st.DataObject) -> None:
    """Of any byte, to any other: the record is named, or the one that no longer follows from it."""
    lines = lines_of(records)
    which = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[which]) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != lines[which][at]))
    lines[which] = lines[which][:at] + bytes([byte]) + lines[which][at + 1 :]
    found = check(lines, node="n1", last=head_of(records[-1]))
    assert found.fault
    assert found.fault_seq == which + 1


def test_a_thousand_edits() -> None:
    chance = random.Random(26)
    rows = [AuditEntry(action=f"a{number}", result="ok", object="x" * number) for number in range(12)]
    records = chain(rows)
    lines = lines_of(records)
    for _ in range(1000):
        which = chance.randrange(len(lines))
        line = bytearray(lines[which])
        line[chance.randrange(len(line))] ^= 1 << chance.randrange(8)
        changed = [*lines[:which], bytes(line), *lines[which + 1 :]]
        found = check(changed, node="n1", last=head_of(records[-1]))
        assert found.fault_seq == which + 1


@settings(max_examples=30)
@given(chains, st.data())
def test_any_cut_swap_or_repeat_is_found(records: list[AuditRecord], data: st.DataObject) -> None:
    lines = lines_of(records)
    which = data.draw(st.integers(0, len(lines) - 1))
    other = data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["cut", "swap", "repeat", "tail"])):
        case "cut":
            del lines[which]
        case "swap":
            if which == other:
                other = (which + 1) % len(lines)
            lines[which], lines[other] = lines[other], lines[which]
        case "repeat":
            lines.insert(which, lines[other])
        case "tail":
            del lines[which:]
    assert check(lines, node="n1", last=head_of(records[-1])).fault


@settings(max_examples=20)
@given(chains, entries)
def test_a_chain_that_was_made_anew_is_not_the_copy(records: list[AuditRecord], entry: AuditEntry) -> None:
    """Whoever may write to a node's disk can seal a new chain; a copy elsewhere has the old one."""
    new = [msgspec.structs.replace(entry, detail="another story")] * len(records)
    forged = chain(new)
    last = records[-1]
    assert not check(lines_of(forged), node="n1", last=head_of(forged[-1])).fault
    assert check(lines_of(forged), node="n1", expect={last.seq: last.hash}).fault
    assert check(lines_of(chain(new, node="n2")), node="n1").fault
