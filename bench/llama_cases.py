"""What llama.cpp's tests are given to answer with: models of ours in the place of theirs.

Theirs are reached nowhere from here. Where a test looks at what was said, a scripted model says it; where
it wants calls of a large model, a scripted one makes them in that model's own format, under its own
template. Embeddings are MiniLM's, whose words are those of the BGE that they use.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import Models

from ollama_distributed.models.scripted import CHATML_TEMPLATE, TOOLS_TEMPLATE

_CONTEXT_TOKENS = 32_768
"""A scripted model reads a prompt letter by letter."""
_TOLD = (
    "But she couldn't. Whillicter. ",
    "Suddenly she was going to bed. ",
    "Aside, he felt alonger. ",
    "And so on, and on. ",
)
_FUNCTIONARY = "meetkai-functionary-medium-v3.2"
"""Everything that is looked for in stories of theirs, within the first tokens of ours."""
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "test": {"success": True},
    "python": {"code": "print('Hello world')"},
    "get_current_weather": {"location": "Istanbul"},
}


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def _functionary(name: str, arguments: str) -> str:
    return f"{name}\n{arguments}"


def _nemo(name: str, arguments: str) -> str:
    return f'[TOOL_CALLS][{{"name": "{name}", "arguments": {arguments}, "id": "abcdef123"}}]'


def _command(name: str, arguments: str) -> str:
    call = f'{{"tool_call_id": "0", "tool_name": "{name}", "parameters": {arguments}}}'
    return f"<|START_THINKING|>I call it.<|END_THINKING|><|START_ACTION|>[\n    {call}\n]<|END_ACTION|>"


def _deepseek(name: str, arguments: str) -> str:
    text = f"""I call it.
</think>

<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>{name}
```json
{arguments}
```<|tool▁call▁end|><|tool▁calls▁end|>"""
    return text.replace("|", "\uff5c")  # full width, as DeepSeek writes it


def _talk(name: str, arguments: str) -> str:
    return f"I would call {name} with {arguments}."


Form = Callable[[str, str], str]
_FAMILIES: dict[str, tuple[str, Form]] = {
    "Meta-Llama-3.1": ("meta-llama-Llama-3.1-8B-Instruct", _llama),
    "Llama-3.2": ("meta-llama-Llama-3.2-3B-Instruct", _llama),
    "Qwen2.5": ("Qwen-Qwen2.5-7B-Instruct", _hermes),
    "Hermes-2": ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", _hermes),
    "Hermes-3": ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", _hermes),
    "functionary": (_FUNCTIONARY, _functionary),
    "Mistral-Nemo": ("mistralai-Mistral-Nemo-Instruct-2407", _nemo),
    "command-r7b": ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", _command),
    "DeepSeek-R1": ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", _deepseek),
    "Phi-3.5": ("microsoft-Phi-3.5-mini-instruct", _talk),
    "gemma-2": ("google-gemma-2-2b-it", _talk),
}
"""Of a model's name: its template in llama.cpp's tree, and how it writes a call."""
_ANSWERS = {
    "test_calc_result": "The y coordinate is 0.56.",
    "test_thoughts": "The sum of 102 and 7 is 109.",
    "test_completion_stream_with_openai_library_stops": "Sure! Here's one for you.\nUser:\nAnother.",
    "test_anthropic_thinking_with_reasoning_model": "Two and two.\n</think>\n\nIt is 4.",
}
"""Of tests of large models that look for no call."""


def model(models: Models, server: Any, test: str, parameters: dict[str, Any]) -> Path:
    """The file that stands for the model that `server` would start with."""
    repository = f"{server.model_hf_repo} {server.model_hf_file}"
    if "bge-small" in repository:
        return models.minilm()
    if "reranker" in repository:
        return models.reranker()
    family = next((row for name, row in _FAMILIES.items() if name in repository), None)
    if family is None and "stories260K" not in repository:
        pytest.skip(f"no model here stands for {repository}")
    of_model, form = family or ("", _talk)
    script: str | tuple[str, ...] = _TOLD
    if family:
        script = _answer(test, parameters) or _call(test, parameters, form)
    if _FUNCTIONARY in (server.chat_template_file or "") and (not family or _answer(test, parameters)):
        # In this format whom it speaks to comes first.
        script = f"all\n{script}" if isinstance(script, str) else ("all\n", *script)
    return models.scripted(
        script,
        template=_template(server, of_model),
        endless=family is None,
        context_tokens=_CONTEXT_TOKENS,
    )


def _answer(test: str, parameters: dict[str, Any]) -> str | None:
    """Of a test that looks for no call."""
    if test == "test_calc_result" and parameters["result_override"]:
        return "I calculate.\n</think>\n\nIt is **0.5**."
    if test == "test_thoughts" and parameters["expect_reasoning_content"]:
        thought = str(parameters["expect_reasoning_content"]).removesuffix("[\\s\\S]*")
        return f"{thought}...\n</think>\n\nTo find the sum of two numbers, I add them."
    return _ANSWERS.get(test)


def _call(test: str, parameters: dict[str, Any], form: Form) -> str:
    tool = {"test_weather": "get_current_weather", "test_hello_world": "python"}.get(test)
    name = tool or parameters["tool"]["function"]["name"]
    return form(name, json.dumps(_ARGUMENTS[name]))


def _template(server: Any, of_model: str) -> str:
    if server.chat_template_file:
        return Path(server.chat_template_file).read_text()
    if server.chat_template == "chatml":
        return CHATML_TEMPLATE
    if not (server.chat_template or of_model):
        return TOOLS_TEMPLATE
    if server.chat_template:
        return str(server.chat_template)
    return Path(f"../../../models/templates/{of_model}.jinja").read_text()
