"""Which Modelfile TEMPLATE is which format: exact after normalisation, nothing fuzzy.

A wrong template makes a model talk nonsense in silence, so what is not known is refused, unless it is simple
enough to be written down in Jinja (`turns.py`).
Templates that Ollama itself ships are known by their sha256; other spellings are
generated from the formats.
"""

from __future__ import annotations

import hashlib
import re

from ollama_distributed.models.templates.formats import FORMATS
from ollama_distributed.models.templates.tools import QWEN25
from ollama_distributed.models.templates.turns import translated

PASSTHROUGH = "{{ .Prompt }}"
"""The Go template of a model without one."""

RAW = (
    "{%- for message in messages -%}{%- if message['role'] != 'system' -%}"
    "{{- message['content'] -}}{%- endif -%}{%- endfor -%}"
)
"""Twin of the passthrough: the texts as they are, one after the other. A system text, which
Ollama drops here, is put before the first prompt by llama.cpp."""

_BLANKS = re.compile(r"\s+")
LONGEST = 64 * 1024
"""Characters of a Go template that may be one of ours; Ollama's have some thousands."""

_SHIPPED: dict[str, str] = {
    "3d8766305b70e46ec57a4e70c46402fe677b2bbe0ba23af6caf8a6b534a92e42": "alfred",
    "6ec2f422d044b6063aed75f99f974871515531959055937e4a2c6772591762ba": "alpaca",
    "3e9c19662c62ac69687769db7192eef3c40211b7cf758d67546e8ac644871761": "chatml",
    "1c4b2e51cf108dc8cdc6b1dc3bd11e4f3b575e7a1a961117bdb1229790a06fb2": "chatqa",
    "302ef988d5b063c7692f1e2ab31d7ea4b3f1434aad06b459cbb31063d00fd018": "codellama-70b-instruct",
    "922095537bc1278418b3aeff5c9bdde0c61a5c6adb7573498b09791a95044068": "command-r",
    "dbda813d9ec0509fae9670e257110123c2786f7538832a91eaef5fb258fc04ec": "falcon-instruct",
    "d9fbdfd160d291b954e1cbe6cc450804db469db3f77be591347668dc601b7734": "gemma-instruct",
    "4aa74b6f1fb4a9ef1ea3ef78cb50538fc2a1cd6489ebb533e783765088a980e0": "gemma3-instruct",
    "bda44f26790e26201e811c7aa560f38afe8cb3ba49778e340a0daa8b3a2ff1ee": "granite-instruct",
    "3f74e056f96c687f67c49ed8309407e0612611e94b910464d8a3d9b60b46d7a6": "llama2-chat",
    "86259548ee8ebd6f7634070458ea3cbaf944c1804d3f9e8e6cdd5b67b77053db": "llama3-instruct",
    "dab853de9d80ab39f954e9825397b4f62e2e70aba2eea426faa16a2a19619b7c": "magicoder",
    "c502cd9313888317b670db1c6d5698783656a22ea75101651baa2c94d42397fb": "mistral-instruct",
    "e4ef0210ea1e3e5794d5cc22e95b85f97cfa0be15c3d18ad4b20e6915dcc2266": "openchat",
    "b97d1c3d0bba7208a4f5894883aa44e34ec5f1c3fe87fa7750e00c064c2ac2dd": "phi-3",
    "c1f4c93c190a4c563edb96d9690998c7d400b001b1d318920843a8194e96f30a": "solar-instruct",
    "ff417bcd727648d2cea9072e7596a142a45d62252606bc1b2906dd75a312a460": "starcoder2-instruct",
    "afb92aa3328db00d21faf8504790d8413c904b349b86fae332954bbe9c5899ca": "vicuna",
    "2f877f969346ff11f1c4df30c717db8a797a6353a9a32e4e4b33f0a89ba81f5d": "zephyr",
    "eb4402837c7829a690fa845de4d7f3fd842c2adee476d5341da8a46ea9255175": "qwen2.5",
    "1e65450c30670713aa47fe23e8b9662bdf4065e81cc8e3cbfaa98924fcc0d320": "qwen2.5",
    "e0a42594d802e5d31cdc786deb4823edb8adff66094d49de8fffe976d753e348": "gemma3",
    "4b19ac7dd2fb1ab2f2818b73454c5a9128ca39875a8fcf686a6b1c36100a0d68": "gemma3-instruct",
    "715415638c9c4c0cb2b78783da041b97bd1205f8b9f9494bd7e5a850cb443602": "llama3-instruct",
}
"""sha256 of the normalised template -> format: those in Ollama's `template/` folder, then those of
qwen2.5, qwen2.5-coder, gemma3, gemma3:270m and llama3.2-vision in its library."""

_STOPS = {known.name: known.stops for known in FORMATS}
_TWINS = {known.name: known.jinja() for known in FORMATS} | {"qwen2.5": QWEN25}


def normalised(go_template: str) -> str:
    """One spelling for what Go reads alike: line ends, blanks in actions, blanks at both ends. In time that
    is proportional to its length: it comes from strangers."""
    text, at = go_template.replace("\r\n", "\n"), 0
    parts: list[str] = []
    while (start := text.find("{{", at)) >= 0 and (end := text.find("}}", start + 2)) >= 0:
        parts += (text[at:start], _action(text[start + 2 : end]))
        at = end + 2
    return "".join((*parts, text[at:])).strip()


def _action(inner: str) -> str:
    """One action, without its braces, in one spelling; a `-` at either end trims outside."""
    left = "-" if inner.startswith("-") else ""
    body = inner.removeprefix("-").strip()
    right = "-" if body.endswith("-") and inner.endswith("-") else ""
    return "{{" + left + " " + _BLANKS.sub(" ", body.removesuffix(right).rstrip()) + " " + right + "}}"


_SPELLINGS: dict[str, str] = {
    normalised(spelling): known.name for known in reversed(FORMATS) for spelling in known.go_spellings()
}
_PASSTHROUGHS = frozenset(normalised(text) for text in (PASSTHROUGH, "{{ .Prompt }}{{ .Response }}"))


def name_of(go_template: str) -> str | None:
    """The format that this Go template is; None when it is not known."""
    if len(go_template) > LONGEST:
        return None
    text = normalised(go_template)
    return _SHIPPED.get(hashlib.sha256(text.encode()).hexdigest()) or _SPELLINGS.get(text)


def twin(go_template: str) -> str | None:
    """The Jinja template that renders what this Go template would; None when it is not known.

    Of a closed set: what a request brings is rendered by nothing else."""
    if len(go_template) <= LONGEST and normalised(go_template) in _PASSTHROUGHS:
        return RAW
    known = name_of(go_template)
    return None if known is None else _TWINS[known]


def of_a_model(go_template: str) -> str | None:
    """As `twin`, and those of one turn: who makes a model may give it a template, as a GGUF has one."""
    if not go_template or len(go_template) > LONGEST:
        return None
    return twin(go_template) or translated(go_template)


def refusal(go_template: str) -> str:
    """Why a TEMPLATE is refused, and what to do."""
    first = normalised(go_template[:1000]).partition("\n")[0][:60]
    return (
        f"TEMPLATE is not one that this server knows (it begins {first!r}): Go templates are matched with "
        "their Jinja twins, not rendered. Leave TEMPLATE out to use the model's own chat template, or use "
        f"one of the known formats: {', '.join(sorted(_TWINS))}; a Modelfile's may also be made of .System, "
        ".Prompt, .Response and if"
    )


_MARKERS: tuple[tuple[str, str], ...] = (
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3-instruct"),
    ("<start_of_turn>", "gemma3-instruct"),
    ("GPT4 Correct", "openchat"),
    ("<|START_OF_TURN_TOKEN|>", "command-r"),
    ("<start_user>", "alfred"),
)
"""Text that only templates of one format hold -> format."""


def detect(jinja: str) -> tuple[str, tuple[str, ...]]:
    """Format and stop texts of a GGUF's own template, as Ollama adds them at create; empty: unknown.

    Only texts that the template itself writes: no stop can cut what such a model never says.
    """
    for marker, name in _MARKERS:
        if marker in jinja:
            return name, tuple(stop for stop in _STOPS[name] if stop in jinja)
    return "", ()
