"""The scripted model through the real llama.cpp: exact at any temperature, continued exactly."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.limits import SOON_S

from ollama_distributed.models.scripted import (
    THINKING_TEMPLATE,
    TOOLS_TEMPLATE,
    script_pieces,
    scripted_model,
)

pytestmark = pytest.mark.integration

SERVE = """
import sys, xllamacpp
p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 2048; p.n_parallel = 1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1; p.n_batch = p.n_ubatch = 256
p.cache_ram_mib = 16; p.hostnames = ["127.0.0.1"]; p.port = 0; p.ui = False; p.fit_params = False
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
import os; os._exit(0)
"""

TEXT = (
    'Hello the world the the the, \U0001f600 caf\u00e9 said "yes" & <think>no</think> the end.\n\n'
    "New\tpara the <|end|> <0x41> <s> end \u2581x"
)
EOS = 4

Post = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[bytes], Post]]:
    """A builder: model bytes -> a function that posts to a llama.cpp server with that model."""
    children: list[subprocess.Popen[str]] = []

    def start(model: bytes) -> Post:
        path = tmp_path / "model.gguf"
        path.write_bytes(model)
        child = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        children.append(child)
        assert child.stdout is not None
        host = child.stdout.readline().strip().removeprefix("http://")

        def post(route: str, body: dict[str, Any]) -> dict[str, Any]:
            connection = http.client.HTTPConnection(host, timeout=SOON_S)
            try:
                connection.request("POST", route, json.dumps(body), {"Connection": "close"})
                response = connection.getresponse()
                answer: dict[str, Any] = json.loads(response.read())
                assert response.status == 200, answer
                return answer
            finally:
                connection.close()

        return post

    yield start
    for child in children:
        child.communicate(timeout=SOON_S)


def test_the_text_is_exact_whatever_the_prompt_and_the_sampling(serve: Callable[[bytes], Post]) -> None:
    post = serve(scripted_model(TEXT))
    prompts: list[Any] = [
        "", "Hi", "the", " the", "Say the end.", "\U0001f600", TEXT, [1],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ]  # fmt: skip
    samplings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1, "seed": 7},
        {"temperature": 2, "repeat_penalty": 1.5, "presence_penalty": 2, "frequency_penalty": 2},
        {"temperature": 100, "top_k": 0, "top_p": 1, "min_p": 0},
    ]
    for prompt in prompts:
        for sampling in samplings:
            answer = post(
                "/completion", {"prompt": prompt, "n_predict": 400, "return_tokens": True, **sampling}
            )
            assert answer["content"] == TEXT, (prompt, sampling)
            assert answer["stop_type"] == "eos"
            assert len(answer["tokens"]) == len(script_pieces(TEXT)) + 1
            assert answer["tokens"][-1] == EOS


def test_prompt_and_emitted_ids_go_on_with_the_next_token(serve: Callable[[bytes], Post]) -> None:
    post = serve(scripted_model(TEXT))
    ids = post("/completion", {"prompt": "Hi", "n_predict": 400, "return_tokens": True})["tokens"]
    for done in (1, 7, len(ids) // 2, len(ids) - 2):
        body = {"prompt": ["Hi", *ids[:done]], "n_predict": 400, "return_tokens": True, "temperature": 1.5}
        assert post("/completion", body)["tokens"] == ids[done:]


def test_endless_ends_only_by_its_limit(serve: Callable[[bytes], Post]) -> None:
    answer = serve(scripted_model("a bb ccc", endless=True))("/completion", {"prompt": "x", "n_predict": 300})
    assert answer["tokens_predicted"] == 300
    assert answer["content"].startswith("a bb ccca bb ccc")


def test_tool_calls_are_parsed(serve: Callable[[bytes], Post]) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    post = serve(
        scripted_model(f"<tool_call>\n{json.dumps(call)}\n</tool_call>", chat_template=TOOLS_TEMPLATE)
    )
    function = {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Rain?"}]
    answered = [
        *asked,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "no rain"},
    ]
    for messages in (asked, answered):
        body = {"messages": messages, "tools": [{"type": "function", "function": function}]}
        choice = post("/v1/chat/completions", body)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    assert "no rain" in post("/apply-template", {"messages": answered})["prompt"]


def test_reasoning_is_parsed(serve: Callable[[bytes], Post]) -> None:
    post = serve(scripted_model("<think>\nHm, hm.\n</think>\n\nIt is 42.", chat_template=THINKING_TEMPLATE))
    messages = [{"role": "user", "content": "?"}]
    message = post("/v1/chat/completions", {"messages": messages})["choices"][0]["message"]
    assert message["reasoning_content"].strip() == "Hm, hm."
    assert message["content"].strip() == "It is 42."
    off = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert post("/apply-template", off)["prompt"].endswith("<think>\n\n</think>\n\n")
