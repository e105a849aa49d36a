"""The bytes of every record and change: a node of an older or newer version must read them.

A test here that fails shows a format that drifted. Add fields with defaults; never change what
is here.
"""

from __future__ import annotations

import msgspec
import pytest

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state import records
from ollama_distributed.state.access import AccessChange
from ollama_distributed.state.changes import (
    Change,
    Proposal,
    RemoveNode,
    RollbackConfig,
    SetConfig,
    SetDrain,
    SetLabels,
    SetVoters,
)
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.deleting import DeleteModel
from ollama_distributed.state.records import (
    Advert,
    Applied,
    Assigned,
    AssignedModel,
    Config,
    Deleted,
    Desired,
    EngineSummary,
    FailedTask,
    Gpu,
    Hardware,
    HeldModel,
    Holdings,
    Intent,
    Lease,
    LoadedPlace,
    MeasuredSpeed,
    Member,
    Placed,
    Task,
    Term,
    Voters,
)
from ollama_distributed.state.wanting import Pin, SetReplicas, Unpin, Unplace

N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")

RECORDS: list[tuple[msgspec.Struct, bytes]] = [
    (
        Advert(
            node=N1,
            name="blue",
            role="server",
            version="0.3.0",
            boot="b00t",
            started_at=1.5,
            hop=("10.0.0.1:7443",),
            nats=("10.0.0.1:7422",),
            routes=("10.0.0.1:7423",),
            api=("http://10.0.0.1:8080",),
            hardware=Hardware(
                cpus=8,
                cpu_model="EPYC",
                memory_bytes=64,
                gpus=(Gpu(name="H200", memory_bytes=139, driver="570"),),
                system="Linux x86_64",
            ),
            engines=(EngineSummary(name="llama.cpp", variant="wheel", version="b11549"),),
            labels={"zone": "b", "rack": "1"},
        ),
        b'{"node":"n1","name":"blue","role":"server","version":"0.3.0","boot":"b00t","started_at":1.5,'
        b'"hop":["10.0.0.1:7443"],"nats":["10.0.0.1:7422"],"routes":["10.0.0.1:7423"],'
        b'"api":["http://10.0.0.1:8080"],"hardware":{"cpus":8,"cpu_model":"EPYC","memory_bytes":64,'
        b'"gpus":[{"name":"H200","memory_bytes":139,"driver":"570"}],"system":"Linux x86_64"},'
        b'"engines":[{"name":"llama.cpp","variant":"wheel","version":"b11549","instruction_set":"",'
        b'"devices":[]}],"labels":{"rack":"1","zone":"b"}}',
    ),
    (
        Holdings(
            node=N1,
            models=(
                HeldModel(
                    name="registry.ollama.ai/library/m:latest",
                    display="m:latest",
                    digest="sha256:00",
                    size_bytes=7,
                    modified_at=2.0,
                    family="llama",
                    families=("llama",),
                    parameters=135,
                    quantization="Q4_1",
                    context_tokens=8192,
                    embedding_length=576,
                    capabilities=("completion",),
                ),
            ),
        ),
        b'{"node":"n1","models":[{"name":"registry.ollama.ai/library/m:latest","display":"m:latest",'
        b'"digest":"sha256:00","size_bytes":7,"modified_at":2.0,"family":"llama","families":["llama"],'
        b'"parameters":135,"quantization":"Q4_1","context_tokens":8192,"embedding_length":576,'
        b'"capabilities":["completion"]}]}',
    ),
    (
        Desired(
            model="m",
            digest="00",
            replicas=2,
            min=1,
            max=3,
            labels={"b": "2", "a": "1"},
            pins=(N1, N2),
            preload=True,
            keep_alive_s=60.0,
            keep=False,
            priority=1,
            by="k1",
            at=4.5,
        ),
        b'{"model":"m","digest":"00","replicas":2,"min":1,"max":3,"labels":{"a":"1","b":"2"},'
        b'"pins":["n1","n2"],"preload":true,"keep_alive_s":60.0,"keep":false,"priority":1,"by":"k1","at":4.5}',
    ),
    (
        Assigned(
            node=N1,
            epoch=3,
            models=(AssignedModel(model="m", warm=True, device="gpu"),),
            tasks=(
                Task(kind="fetch", model="m", digest="00", size_bytes=7, holders=(N2,), reason="why"),
                Task(kind="load", model="m", device="gpu"),
            ),
        ),
        b'{"node":"n1","epoch":3,"models":[{"model":"m","warm":true,"device":"gpu"}],'
        b'"tasks":[{"kind":"fetch","model":"m","digest":"00","size_bytes":7,"holders":["n2"],"reason":"why"},'
        b'{"kind":"load","model":"m","device":"gpu"}]}',
    ),
    (
        Placed(
            node=N1,
            memory_bytes=64,
            gpu_bytes=32,
            seats=3,
            disk_free_bytes=99,
            speeds=(MeasuredSpeed(device="gpu", weights_bytes=5, tokens_per_s=70.5),),
            loaded=(LoadedPlace(model="m", device="gpu", memory_bytes=7, held=True),),
            fetching=("00",),
            loading=("n",),
            failed=(FailedTask(kind="load", model="o", reason="why", at=5.0, tries=2),),
        ),
        b'{"node":"n1","memory_bytes":64,"gpu_bytes":32,"seats":3,"disk_free_bytes":99,'
        b'"speeds":[{"device":"gpu","weights_bytes":5,"tokens_per_s":70.5}],'
        b'"loaded":[{"model":"m","device":"gpu","memory_bytes":7,"held":true}],"fetching":["00"],"loading":["n"],'
        b'"failed":[{"kind":"load","model":"o","reason":"why","at":5.0,"tries":2}]}',
    ),
    (
        Member(node=N1, status="suspect", since=3.0, reason="no beat for 3 s", boot="b00t"),
        b'{"node":"n1","status":"suspect","since":3.0,"reason":"no beat for 3 s","boot":"b00t"}',
    ),
    (
        Intent(node=N1, drain=True, labels={"b": None, "a": "1"}, by="k1", at=4.0),
        b'{"node":"n1","drain":true,"labels":{"a":"1","b":null},"by":"k1","at":4.0}',
    ),
    (
        Config(version=2, values={"b": 1, "a": {"y": [1], "x": None}}, by="k1", at=5.0, comment="why"),
        b'{"version":2,"values":{"a":{"x":null,"y":[1]},"b":1},"by":"k1","at":5.0,"comment":"why"}',
    ),
    (Voters(nodes=(N1, N2, N3), at=6.0), b'{"nodes":["n1","n2","n3"],"at":6.0}'),
    (
        Lease(node=N1, epoch=3, renewals=9, since=7.0),
        b'{"node":"n1","epoch":3,"renewals":9,"since":7.0}',
    ),
    (Term(node=N1, epoch=3), b'{"node":"n1","epoch":3}'),
    (
        Deleted(model="m", until=8.5, by="k1", at=8.0),
        b'{"model":"m","until":8.5,"by":"k1","at":8.0}',
    ),
    (Applied(kind="set_drain", by="k1", at=8.0), b'{"kind":"set_drain","by":"k1","at":8.0}'),
]

CHANGES: list[tuple[Change, bytes]] = [
    (
        SetConfig(values={"b": 1, "a": 2}, base=4, comment="c"),
        b'{"type":"set_config","values":{"a":2,"b":1},"base":4,"comment":"c"}',
    ),
    (
        RollbackConfig(version=2, base=4, comment="c"),
        b'{"type":"rollback_config","version":2,"base":4,"comment":"c"}',
    ),
    (SetDrain(node=N1, drain=True), b'{"type":"set_drain","node":"n1","drain":true}'),
    (
        SetLabels(node=N1, labels={"b": None, "a": "1"}),
        b'{"type":"set_labels","node":"n1","labels":{"a":"1","b":null}}',
    ),
    (RemoveNode(node=N1, force=True), b'{"type":"remove_node","node":"n1","force":true}'),
    (
        SetVoters(nodes=(N1, N2, N3), before=(N1,)),
        b'{"type":"set_voters","nodes":["n1","n2","n3"],"before":["n1"]}',
    ),
    (
        SetReplicas(model="m", replicas=None, min=1, max=3, labels={"b": "2", "a": "1"}),
        b'{"type":"set_replicas","model":"m","replicas":null,"min":1,"max":3,"labels":{"a":"1","b":"2"}}',
    ),
    (Pin(model="m", node=N1), b'{"type":"pin","model":"m","node":"n1"}'),
    (Unpin(model="m", node=N1), b'{"type":"unpin","model":"m","node":"n1"}'),
    (Unplace(model="m"), b'{"type":"unplace","model":"m"}'),
    (DeleteModel(model="m"), b'{"type":"delete_model","model":"m"}'),
]


@pytest.mark.parametrize(("record", "golden"), RECORDS, ids=lambda x: type(x).__name__)
def test_a_record_has_these_bytes(record: msgspec.Struct, golden: bytes) -> None:
    assert encode(record) == golden
    assert decode(golden, type(record)) == record


@pytest.mark.parametrize(("change", "golden"), CHANGES, ids=lambda x: type(x).__name__)
def test_a_proposal_has_these_bytes(change: Change, golden: bytes) -> None:
    proposal = Proposal(id="p1", change=change, actor="k1", at=9.0)
    whole = b'{"id":"p1","change":' + golden + b',"actor":"k1","at":9.0}'
    assert encode(proposal) == whole
    assert decode(whole, Proposal) == proposal


def test_every_record_and_every_change_is_pinned_here() -> None:
    parts = {
        Gpu,
        Hardware,
        EngineSummary,
        HeldModel,
        AssignedModel,
        Task,
        LoadedPlace,
        MeasuredSpeed,
        FailedTask,
        records.Rest,
    }  # inside others
    structs = {
        kind
        for kind in vars(records).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == records.__name__
    }
    assert {type(record) for record, _ in RECORDS} == structs - parts
    assert {type(change) for change, _ in CHANGES} == set(Change.__args__) - set(AccessChange.__args__)


@pytest.mark.parametrize(("record", "golden"), RECORDS, ids=lambda x: type(x).__name__)
def test_fields_of_a_newer_version_are_skipped(record: msgspec.Struct, golden: bytes) -> None:
    newer = golden[:-1] + b',"from_the_future":{"x":[1]}}'
    assert decode(newer, type(record)) == record


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b"null", b'{"node":"n1"}', b'{"node":1,"epoch":1}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_record_is_invalid(value: bytes) -> None:
    with pytest.raises(Invalid):
        decode(value, Term)
