"""`client.cluster`, `client.nodes`, `client.config`, `client.routes`: for both clients."""

from __future__ import annotations

from ollama_distributed.client import cluster_calls as calls
from ollama_distributed.client import disk_calls, places_calls, route_calls
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync, stream, stream_sync


class Cluster(Group):
    """The cluster as a whole: `client.cluster`."""

    status = run(calls.status)
    leader = run(calls.leader)
    create_token = run(calls.create_token)
    tokens = run(calls.tokens)
    revoke_token = run(calls.revoke_token)
    join = run(calls.join)
    leave = run(calls.leave)
    replace_voter = run(calls.replace_voter)
    what_if = run(places_calls.what_if)


class Nodes(Group):
    """Its nodes, each named by its id or its name: `client.nodes`."""

    list = run(calls.list_nodes)
    get = run(calls.get_node)
    drain = run(calls.drain)
    undrain = run(calls.undrain)
    label = run(calls.label)
    remove = run(calls.remove)
    disk = run(disk_calls.disk)
    scrub = run(disk_calls.scrub)


class Config(Group):
    """The settings that hold in the whole cluster: `client.config`."""

    get = run(calls.get_config)
    set = run(calls.set_config)
    history = run(calls.config_history)
    rollback = run(calls.rollback_config)
    watch = stream(calls.watch_config)


class Routes(Group):
    """Which node answers, and why: `client.routes`."""

    explain = run(route_calls.explain)
    decisions = run(route_calls.decisions)


class ModelPlaces(Group):
    """Where models are to be and would fit: part of `client.models`."""

    fit = run(places_calls.fit)
    places = run(places_calls.places)
    all_places = run(places_calls.all_places)
    replicas = run(places_calls.replicas)
    place = run(places_calls.place)
    pin = run(places_calls.pin)
    unpin = run(places_calls.unpin)
    evict = run(disk_calls.evict)


class SyncCluster(SyncGroup):
    """The cluster as a whole: `client.cluster`."""

    status = run_sync(calls.status)
    leader = run_sync(calls.leader)
    create_token = run_sync(calls.create_token)
    tokens = run_sync(calls.tokens)
    revoke_token = run_sync(calls.revoke_token)
    join = run_sync(calls.join)
    leave = run_sync(calls.leave)
    replace_voter = run_sync(calls.replace_voter)
    what_if = run_sync(places_calls.what_if)


class SyncNodes(SyncGroup):
    """Its nodes, each named by its id or its name: `client.nodes`."""

    list = run_sync(calls.list_nodes)
    get = run_sync(calls.get_node)
    drain = run_sync(calls.drain)
    undrain = run_sync(calls.undrain)
    label = run_sync(calls.label)
    remove = run_sync(calls.remove)
    disk = run_sync(disk_calls.disk)
    scrub = run_sync(disk_calls.scrub)


class SyncConfig(SyncGroup):
    """The settings that hold in the whole cluster: `client.config`."""

    get = run_sync(calls.get_config)
    set = run_sync(calls.set_config)
    history = run_sync(calls.config_history)
    rollback = run_sync(calls.rollback_config)
    watch = stream_sync(calls.watch_config)


class SyncRoutes(SyncGroup):
    """Which node answers, and why: `client.routes`."""

    explain = run_sync(route_calls.explain)
    decisions = run_sync(route_calls.decisions)


class SyncModelPlaces(SyncGroup):
    """Where models are to be and would fit: part of `client.models`."""

    fit = run_sync(places_calls.fit)
    places = run_sync(places_calls.places)
    all_places = run_sync(places_calls.all_places)
    replicas = run_sync(places_calls.replicas)
    place = run_sync(places_calls.place)
    pin = run_sync(places_calls.pin)
    unpin = run_sync(places_calls.unpin)
    evict = run_sync(disk_calls.evict)
