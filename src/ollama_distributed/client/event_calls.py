"""The call about what one can follow, as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

from ollama_distributed.base.events import PATH, ChannelsAnswer
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call

_decode_channels = decoder_of(ChannelsAnswer)


def channels() -> Call[ChannelsAnswer]:
    return Call(method="GET", path=PATH, decode=_decode_channels, repeat="always")
