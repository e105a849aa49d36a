"""Multi-line messages, image paths, settings of a conversation, which server and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollama_distributed.base.errors import Invalid
from ollama_distributed.cli.conversation import Conversation, format_of, keep_alive_of, think_of
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.prompt import Lines, images
from ollama_distributed.cli.session import Session, default_data_dir


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        (["hello"], ["hello"]),
        (['"""one line"""'], ["one line"]),
        (['"""first', "  second", 'third"""'], ["first\n  second\nthird"]),
        (['"""', "a", '"""', "b"], ["a\n", "b"]),
        (['"""', '"""'], [""]),
        (['say "hi"'], ['say "hi"']),
    ],
)
def test_lines_become_messages(typed: list[str], messages: list[str]) -> None:
    lines = Lines()
    assert [whole for line in typed if (whole := lines.feed(line)) is not None] == messages
    assert not lines.open


def test_an_open_message_can_be_dropped() -> None:
    lines = Lines()
    assert lines.feed('"""lost') is None
    lines.drop()
    assert lines.feed("next") == "next"


@pytest.mark.parametrize(
    ("text", "left", "found"),
    [
        ("what is /tmp/a.png", "what is", ["/tmp/a.png"]),
        ("./b.JPG and '/x y/c.webp' please", "and  please", ["b.JPG", "/x y/c.webp"]),
        (r"/tmp/two\ words.jpeg?", "?", ["/tmp/two words.jpeg"]),
        ("no file: /tmp/missing.png", "no file: /tmp/missing.png", []),
        ("the page /a.pngx or a.png", "the page /a.pngx or a.png", []),
    ],
)
def test_images_are_found_by_their_path(text: str, left: str, found: list[str]) -> None:
    def read(path: Path) -> bytes | None:
        return None if "missing" in path.name else str(path).encode()

    kept, data, paths = images(text, read)
    assert kept == left
    assert [str(path) for path in paths] == found
    assert data == [name.encode() for name in found]


def test_a_conversation_remembers_what_was_answered() -> None:
    chat = Conversation("m", system="be brief")
    first = chat.asking("one", [b"img"])
    assert [said["role"] if isinstance(said, dict) else said.role for said in first.messages] == [
        "system",
        "user",
    ]
    assert chat.messages == [], "nothing before the answer"
    chat.answered(first, "eins", "hm")
    second = chat.asking("two")
    assert len(second.messages) == 4
    chat.set_parameter("temperature", ["0.5"])
    chat.set_parameter("stop", ["a", "b"])
    saved = chat.saving("new")
    assert (saved.model, saved.from_, saved.system) == ("new", "m", "be brief")
    assert saved.parameters == {"temperature": 0.5, "stop": ["a", "b"]}
    assert saved.messages is not None
    assert all(getattr(said, "images", None) is None for said in saved.messages)
    with pytest.raises(Invalid):
        chat.set_parameter("num_ctx", ["many"])


def test_settings_as_text() -> None:
    assert format_of("json") == "json"
    assert format_of('{"type": "object"}') == {"type": "object"}
    assert [think_of(text) for text in (None, "true", "false", "high")] == [None, True, False, "high"]
    assert [keep_alive_of(text) for text in (None, "5m", "-1", "0")] == [None, "5m", -1.0, 0.0]
    for bad in ("yaml", "[1]"):
        with pytest.raises(Problem):
            format_of(bad)
    with pytest.raises(Problem):
        think_of("loudly")


# ── which server, which key ─────────────────────────────────────────────────────────


@pytest.fixture
def node_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "OLLAMA_DISTRIBUTED_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_DATA_DIR", str(tmp_path))
    (tmp_path / "admin.json").write_text(
        json.dumps({"url": "http://127.0.0.1:9999", "key": "odk_a", "ca": None})
    )
    return tmp_path


@pytest.mark.parametrize(
    ("given", "url", "key"),
    [
        ({}, "http://127.0.0.1:9999", "odk_a"),
        ({"host": "127.0.0.1:9999"}, "http://127.0.0.1:9999", "odk_a"),
        ({"host": "localhost:9999"}, "http://127.0.0.1:9999", "odk_a"),
        ({"host": "[::1]:9999"}, "http://[::1]:9999", None),
        ({"host": "127.0.0.1:9998"}, "http://127.0.0.1:9998", None),
        ({"host": "https://127.0.0.1:9999"}, "https://127.0.0.1:9999", None),
        ({"host": "http://evil.example:9999"}, "http://evil.example:9999", None),
        ({"host": "evil.example:9998", "api_key": "mine"}, "http://evil.example:9998", "mine"),
        ({"api_key": ""}, "http://127.0.0.1:9999", None),
    ],
)
def test_the_admins_key_goes_to_its_own_server_only(
    node_dir: Path, given: dict[str, Any], url: str, key: str | None
) -> None:
    target = Session(**given).target()
    assert (target.url, target.api_key) == (url, key)


def test_the_environment_comes_before_the_nodes_file(node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "other:1")
    assert Session().target() == ("http://other:1", None, None)
    monkeypatch.setenv("OLLAMA_API_KEY", "env")
    assert Session(host="127.0.0.1:9999").target().api_key == "env"


def test_where_ollamas_server_listens_is_no_address(node_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0")
    assert Session().target().url == "http://127.0.0.1:9999"
    assert Session(host="0.0.0.0").target().url == "http://127.0.0.1:11434"
    (node_dir / "admin.json").unlink()
    assert Session().target().url == "http://127.0.0.1:11434"


@pytest.mark.parametrize("content", [None, "", "[]", '{"url": 1, "key": 2}', "{broken"])
def test_without_a_good_file_there_is_the_default(node_dir: Path, content: str | None) -> None:
    (node_dir / "admin.json").unlink()
    if content is not None:
        (node_dir / "admin.json").write_text(content)
    assert Session().target() == ("http://127.0.0.1:8080", None, None)


def test_an_address_that_cannot_be_used_is_a_problem(node_dir: Path) -> None:
    with pytest.raises(Problem):
        Session(host="ftp://x").target()


def test_where_a_node_keeps_its_state_is_the_nodes_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pytest.importorskip("ollama_distributed.node.settings")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_data_dir({}) == settings.default_data_dir()
    monkeypatch.setenv("XDG_DATA_HOME", "/x")
    assert default_data_dir({"XDG_DATA_HOME": "/x"}) == settings.default_data_dir()
