"""What happens, a line for each thing. Pure but for the time zone: events in, text out."""

from __future__ import annotations

import time

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.events import Busy, QueuedRequest
from ollama_distributed.base.queue import QueueNode
from ollama_distributed.cli.humanize import size
from ollama_distributed.cli.queue_view import seconds
from ollama_distributed.cli.terminal import clean_line
from ollama_distributed.client.following import Data, Event
from ollama_distributed.client.wire import Transfer


def event_line(event: Event) -> str:
    stamp = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{stamp}  {clean_line(event.channel):<9}  {event.what:<7}  {told(event)}\n"


def told(event: Event) -> str:
    """Without the time."""
    return clean_line(_told(event.data)) if event.data is not None else ""


def _told(data: Data) -> str:
    match data:
        case QueuedRequest():
            return f"{data.request_id}  {data.model} at {data.node}: {_turn(data)}"
        case QueueNode():
            running = sum(row.running for row in data.models)
            return f"{data.name or data.node}: {data.error or f'{data.waiting} wait, {running} run'}"
        case NodeRow():
            return f"{data.name}: {data.status}" + (f" ({data.reason})" if data.reason else "")
        case Busy():
            gpu = "" if data.gpu_usage is None else f", GPU {data.gpu_usage:.0f} %"
            return f"{data.name}: CPU {data.cpu_usage:.0f} %, memory {data.memory_usage:.0f} %{gpu}"
        case Alert():
            return f"{data.level}: {data.message}"
        case Transfer():
            return f"{data.model}: {_progress(data)}"


def _turn(request: QueuedRequest) -> str:
    if request.state != "waiting":
        return request.state
    eta = "" if request.eta_s is None else f", about {seconds(request.eta_s)}"
    return f"position {request.position}{eta}"


def _progress(transfer: Transfer) -> str:
    if transfer.state != "running":
        return f"{transfer.state} {transfer.error}".rstrip()
    return f"{size(transfer.completed)} of {size(transfer.total)}"
