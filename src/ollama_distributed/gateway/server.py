"""uvicorn's settings for our app: every one that safety or speed depends on."""

from __future__ import annotations

import resource

import msgspec
import uvicorn

from ollama_distributed.gateway.app import Gateway
from ollama_distributed.gateway.fast import fast_protocol_class
from ollama_distributed.gateway.limits import Limits

_DESCRIPTOR_SHARE = 0.8
"""Of the file descriptors; the rest is for models, runners and logs."""


def server_config(app: Gateway, limits: Limits) -> uvicorn.Config:
    """For `uvicorn.Server(config).serve(sockets=[...])`; the caller binds the sockets."""
    return uvicorn.Config(
        app,
        http=fast_protocol_class(app.hot, within_descriptors(limits)),
        ws="none",
        loop="uvloop",
        lifespan="on",
        # The peer's address decides who is local: no header may change it.
        proxy_headers=False,
        # One summary line a request is ours (gateway.request).
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=int(limits.idle_s),
        timeout_graceful_shutdown=None,
    )


def within_descriptors(limits: Limits) -> Limits:
    """`limits` with no more connections than the process may open files for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    most = min(limits.connections, max(1, int(soft * _DESCRIPTOR_SHARE)))
    return msgspec.structs.replace(limits, connections=most)
