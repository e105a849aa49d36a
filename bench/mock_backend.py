"""`python -m bench.mock_backend`: an OpenAI backend that costs next to nothing.

Listens on two ports of loopback and prints them. Both speak the same API; the first one says
that it is some server, the second that it is vLLM, which tells the ids of its tokens. A whole
answer of 1 KiB is ready made; of streamed answers every one gets its next chunk at each step, as
from an engine with continuous batching.
"""

from __future__ import annotations

import asyncio
import re
from typing import cast

import httptools
import uvloop

STEP_S = 0.004
"""Between two tokens of a stream: 250 tokens/s."""
ANSWER_TOKENS = 200
_MOST = re.compile(rb'"max_tokens": ?(\d+)')
_STREAMED = re.compile(rb'"stream": ?true')
_TEXT = "word " * 140
TOKEN = b" word"
"""Of which streamed answers are made."""


def _response(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


def _chunk(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_USAGE = b'"usage":{"prompt_tokens":200,"total_tokens":340,"completion_tokens":140}'
_WHOLE_CHAT = _response(
    b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1700000000,'
    b'"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"'
    + _TEXT.encode()
    + b'","refusal":null,"tool_calls":[]},"logprobs":null,"finish_reason":"stop","stop_reason":null}],'
    + _USAGE
    + b"}"
)
_IDS = _response(b'{"count":200,"tokens":[%b]}' % b",".join([b"3409"] * 200))
_PROMPT = _response(b'{"prompt":"' + _TEXT.encode() + b'"}')


class Api:
    """What is answered on one port."""

    def __init__(self, model: str, owner: str) -> None:
        name = model.encode()
        self.models = _response(
            b'{"object":"list","data":[{"id":"%b","object":"model","created":1700000000,"owned_by":"%b",'
            b'"max_model_len":32768}]}' % (name, owner.encode())
        )
        head = (
            b'{"id":"chatcmpl-0123456789abcdef","object":"%b","created":1700000000,"model":"' + name + b'",'
        )
        chat, text = head % b"chat.completion.chunk", head % b"text_completion"
        self.chat = _stream(chat, b'"delta":{"content":" word"},', b'"delta":{"content":""},')
        self.text = _stream(text, b'"text":" word","token_ids":[3409],', b'"text":"",')


def _stream(head: bytes, token: bytes, empty: bytes) -> tuple[bytes, bytes]:
    """The chunk of a token, and those that end an answer."""
    choice = head + b'"choices":[{"index":0,%b"logprobs":null,"finish_reason":%b}]}'
    last = (choice % (empty, b'"stop"'), head + b'"choices":[],' + _USAGE + b"}", b"[DONE]")
    return _chunk(choice % (token, b"null")), b"".join(map(_chunk, last)) + b"0\r\n\r\n"


class Steps:
    """All streams that run: each gets a chunk at each step."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams: set[Connection] = set()
        self._runs = False

    def add(self, connection: Connection, api: tuple[bytes, bytes], tokens: int) -> None:
        connection.transport.write(_STREAM_HEAD)
        connection.token, connection.last = api
        connection.left = tokens
        self._streams.add(connection)
        if not self._runs:
            self._runs = True
            self._due = self._loop.time()
            self._later()

    def drop(self, connection: Connection) -> None:
        self._streams.discard(connection)

    def _later(self) -> None:
        self._due = max(self._due + STEP_S, self._loop.time())
        self._loop.call_at(self._due, self._step)

    def _step(self) -> None:
        for connection in list(self._streams):
            if connection.left > 0:
                connection.left -= 1
                connection.transport.write(connection.token)
            else:
                self.drop(connection)
                connection.transport.write(connection.last)
        self._runs = bool(self._streams)
        if self._runs:
            self._later()


class Connection(asyncio.Protocol):
    transport: asyncio.Transport
    token: bytes
    last: bytes
    left: int

    def __init__(self, api: Api, steps: Steps) -> None:
        self._api = api
        self._steps = steps
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._url = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is so by shape only

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # gone is gone
        self._steps.drop(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._url.endswith(b"completions"):
            chat = self._url.endswith(b"chat/completions")
            if _STREAMED.search(body):
                asked = _MOST.search(body)
                tokens = min(int(asked[1]), ANSWER_TOKENS) if asked else ANSWER_TOKENS
                self._steps.add(self, self._api.chat if chat else self._api.text, tokens)
            else:
                self.transport.write(_WHOLE_CHAT)
        elif self._url.endswith(b"/v1/models"):
            self.transport.write(self._api.models)
        elif self._url.endswith(b"/tokenize"):
            self.transport.write(_IDS)
        elif self._url.endswith(b"/detokenize"):
            self.transport.write(_PROMPT)
        else:  # health, and what routers ask a backend about itself
            self.transport.write(_response(b"{}"))


async def main() -> None:
    loop, steps = asyncio.get_running_loop(), Steps()
    ports = []
    for api in (Api("mock", "mock"), Api("mock-ids", "vllm")):
        server = await loop.create_server(lambda api=api: Connection(api, steps), "127.0.0.1", 0)  # type: ignore[misc]  # a default
        ports.append(str(server.sockets[0].getsockname()[1]))
    print(*ports, flush=True)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(main())
