"""A loopback double of Ollama's API: the routes that an engine asks, with their exact shapes.

Sources: `reference/ollama-api.md`; https://github.com/ollama/ollama `api/types.go`. Its
models answer fixed texts; "endless" goes on until its client leaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from ollama_distributed.testing import echo_text

MODELS: dict[str, dict[str, Any]] = {
    "writer:latest": {"capabilities": ["completion"], "family": "llama"},
    "endless:latest": {"capabilities": ["completion"], "family": "llama"},
    "tools:latest": {"capabilities": ["completion", "tools"], "family": "llama"},
    "json:latest": {"capabilities": ["completion"], "family": "llama"},
    "embedder:latest": {"capabilities": ["embedding"], "family": "bert"},
}
DIMENSIONS = 48
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found"}


class OllamaDouble:
    """`async with OllamaDouble(answer) as double: double.url`"""

    def __init__(self, answer: str, json_answer: str, tool_arguments: dict[str, Any]) -> None:
        self.answer = answer
        self.json_answer = json_answer
        self.tool_arguments = tool_arguments
        self.bodies: list[tuple[str, Any]] = []
        """Path and body of each request."""
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._answering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> OllamaDouble:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Away at once, with all its connections."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            length = next((int(h[15:]) for h in head if h.lower().startswith("content-length:")), 0)
            body = json.loads(await reader.readexactly(length) or b"null")
            self.bodies.append((path, body))
            await self._answer(method, path, body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()
            self._writers.discard(writer)

    async def _answer(self, method: str, path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        status, answer = 200, {}
        match method, path:
            case "GET", "/api/version":
                answer = {"version": "0.12.3"}
            case "GET", "/api/tags":
                answer = {"models": [self._tag(name) for name in MODELS]}
            case "POST", _ if body["model"] not in MODELS:
                status, answer = 404, {"error": f"model '{body['model']}' not found"}
            case "POST", "/api/show":
                answer = self._show(body["model"])
            case "POST", "/api/embed":
                answer = self._embed(body)
            case "POST", "/api/chat" if body.get("_debug_render_only"):
                answer = {"_debug_info": {"rendered_template": self._render(body), "image_count": 0}}
            case "POST", "/api/generate" if not body.get("prompt"):
                reason = "unload" if body.get("keep_alive") == 0 else "load"
                answer = {"model": body["model"], "response": "", "done": True, "done_reason": reason}
            case "POST", "/api/generate" | "/api/chat":
                refusal = self._refusal(path, body)
                if not refusal:
                    await self._stream(path, body, writer)
                    return
                status, answer = 400, {"error": refusal}
            case _:
                status, answer = 404, {"error": "not found"}
        data = json.dumps(answer).encode()
        writer.write(
            f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        await writer.drain()

    def _tag(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": "2026-05-04T17:37:44.706015396-07:00",
            "size": 3825819519,
            "digest": f"{abs(hash(name)):064x}"[-64:],
            "details": {
                "format": "gguf", "family": MODELS[name]["family"], "families": [MODELS[name]["family"]],
                "parameter_size": "7B", "quantization_level": "Q4_0",
            },
        }  # fmt: skip

    def _show(self, name: str) -> dict[str, Any]:
        family = MODELS[name]["family"]
        return {
            "license": "MIT",
            "template": "{{ .Prompt }}",
            "details": self._tag(name)["details"],
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": 7_000_000_000,
                f"{family}.block_count": 32,
                f"{family}.context_length": 8192,
                f"{family}.embedding_length": 4096,
                f"{family}.attention.head_count": 32,
                f"{family}.attention.head_count_kv": 8,
            },
            "capabilities": MODELS[name]["capabilities"],
            "modified_at": "2026-05-04T17:37:44.706015396-07:00",
        }

    def _embed(self, body: dict[str, Any]) -> dict[str, Any]:
        vectors = [echo_text.vector(text, DIMENSIONS) for text in body["input"]]
        return {"model": body["model"], "embeddings": vectors, "prompt_eval_count": 4 * len(vectors)}

    def _render(self, body: dict[str, Any]) -> str:
        return "".join(f"<|{m['role']}|>{m['content']}" for m in body["messages"]) + "<|assistant|>"

    def _refusal(self, path: str, body: dict[str, Any]) -> str:
        text = body["prompt"] if path == "/api/generate" else self._render(body)
        if len(text) // 4 >= body["options"]["num_ctx"]:
            return "the input length exceeds the context length"
        return ""

    async def _stream(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        limit = body["options"].get("num_predict", -1)
        count, reason = 0, "stop"
        async for part in self._parts(body):
            if 0 <= limit <= count:
                reason = "length"
                break
            await self._line(writer, self._said(path, body, part))
            count += 1
        if body.get("tools") and body["model"] == "tools:latest":
            await self._line(writer, self._called(body))
        end = {**self._said(path, body, ""), "done": True, "done_reason": reason}
        end.pop("logprobs", None)
        end |= {"total_duration": 5_000, "prompt_eval_count": 7, "prompt_eval_duration": 1_000_000,
                "eval_count": max(count, 1), "eval_duration": 2_000_000}  # fmt: skip
        await self._line(writer, end)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _line(self, writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

    async def _parts(self, body: dict[str, Any]) -> AsyncIterator[str]:
        match body["model"]:
            case "endless:latest":
                while True:
                    yield "on "
                    await asyncio.sleep(0.001)
            case "json:latest":
                yield self.json_answer
            case "tools:latest":
                return
            case _:
                for char in self.answer:
                    yield char

    def _said(self, path: str, body: dict[str, Any], text: str) -> dict[str, Any]:
        line: dict[str, Any] = {"model": body["model"], "created_at": "2026-05-04T17:37:44Z", "done": False}
        if path == "/api/chat":
            line["message"] = {"role": "assistant", "content": text}
        else:
            line["response"] = text
        if body.get("logprobs") and text:
            entry = {"token": text, "logprob": -0.1, "bytes": list(text.encode())}
            line["logprobs"] = [{**entry, "top_logprobs": [entry] * body["top_logprobs"]}]
        return line

    def _called(self, body: dict[str, Any]) -> dict[str, Any]:
        function = {
            "index": 0,
            "name": body["tools"][0]["function"]["name"],
            "arguments": self.tool_arguments,
        }
        return {
            "model": body["model"],
            "created_at": "2026-05-04T17:37:44Z",
            "message": {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_ab12cd34", "function": function}],
            },
            "done": False,
        }
