"""The conversation at the terminal, typed through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from tests.integration.server_double import Asked, Double, Reply, server_double
from tests.limits import SOON_S

from ollama_distributed.cli.answer import Look
from ollama_distributed.cli.conversation import Conversation
from ollama_distributed.cli.repl import Repl
from ollama_distributed.client import ModelNotFound, SyncClient

pytestmark = pytest.mark.integration

CTRL_C, CTRL_D = "\x03", "\x04"
Talk = Callable[..., str]


def said(text: str, *, done: bool = False) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": text}, "done": done}


@pytest.fixture
def server() -> Iterator[Double]:
    with server_double() as double:
        double.on("POST", "/api/v1/generate", Reply(body={"done": True, "done_reason": "load"}))
        double.on("POST", "/api/v1/chat", Reply(lines=[said("Hi"), said("", done=True)]))
        double.on("POST", "/api/show", Reply(body={"capabilities": ["completion"], "system": "theirs"}))
        yield double


@pytest.fixture
def talk(
    server: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_NOHISTORY", raising=False)

    def type_in(*keys: str, chat: Conversation | None = None) -> str:
        with create_pipe_input() as pipe, SyncClient(server.url, "", retries=0) as client:
            pipe.send_text("".join(keys))
            Repl(
                client, chat or Conversation("m"), Look(), terminal_input=pipe, terminal_output=DummyOutput()
            ).talk()
        shown = capsys.readouterr()
        return shown.out + shown.err

    return type_in


def chats(server: Double) -> list[Asked]:
    return [asked for asked in server.asked if asked.path == "/api/v1/chat"]


def test_it_remembers_what_was_said(server: Double, talk: Talk) -> None:
    shown = talk("one\r", '"""two\r', 'lines"""\r', "/bye\r")
    assert shown.count("Hi") == 2
    assert server.asked[0].json == {"model": "m"}, "loads first"
    assert [message["content"] for message in chats(server)[1].json["messages"]] == [
        "one",
        "Hi",
        "two\nlines",
    ]


def test_ctrl_d_leaves_and_ctrl_c_does_not(talk: Talk) -> None:
    shown = talk(CTRL_C, "x\r", CTRL_D)
    assert "Use Ctrl-D or /bye to leave." in shown
    assert "Hi" in shown


def test_settings_go_with_the_next_message(server: Double, talk: Talk) -> None:
    talk(
        "/set parameter temperature 0.5\r",
        "/set parameter stop a b\r",
        "/set system be brief\r",
        "/set format json\r",
        "/set think high\r",
        "x\r",
        "/set noformat\r/set nothink\r/clear\r",
        "y\r/bye\r",
    )
    first, second = (asked.json for asked in chats(server))
    assert first["options"] == {"temperature": 0.5, "stop": ["a", "b"]}
    assert first["messages"][0] == {"role": "system", "content": "be brief"}
    assert (first["format"], first["think"]) == ("json", "high")
    assert "format" not in second
    assert second["think"] is False
    assert [message["content"] for message in second["messages"]] == ["be brief", "y"], "cleared"


def test_what_cannot_be_set_is_named(talk: Talk) -> None:
    shown = talk("/set paramter x 1\r", "/set parameter\r", "/bye\r")
    assert shown.count("There is no 'paramter' to set") == 1
    assert shown.count("/set system TEXT") == 2


def test_errors_do_not_end_it(server: Double, talk: Talk) -> None:
    failed = {"error": {"code": "runner_died", "message": "it died"}}
    server.on("POST", "/api/v1/chat", Reply(lines=[said("a"), failed]), Reply(lines=[said("b", done=True)]))
    shown = talk("x\r", "/set parameter num_ctx many\r", "/nonsense\r", "y\r", "/bye\r")
    assert "it died" in shown
    assert "num_ctx" in shown
    assert "Unknown command '/nonsense'" in shown
    assert [message["content"] for message in chats(server)[1].json["messages"]] == ["y"], (
        "a failed turn is forgotten"
    )


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    server: Double, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = Event()
    real_stdout = sys.stdout

    class PressesCtrlC:
        """The person does so when the word `half` is on the screen."""

        def write(self, text: str) -> int:
            real_stdout.write(text)
            if text == "half":
                signal.raise_signal(signal.SIGINT)
            return len(text)

        def __getattr__(self, name: str) -> object:
            return getattr(real_stdout, name)

    monkeypatch.setattr(sys, "stdout", PressesCtrlC())
    server.on(
        "POST",
        "/api/v1/chat",
        Reply(lines=[said("half")], hold=hold),
        Reply(lines=[said("whole", done=True)]),
    )
    shown = talk("x\r", "y\r", "/bye\r")
    assert server.hung_up.wait(SOON_S), "the generation was stopped"
    hold.set()
    assert "half" in shown
    assert "whole" in shown
    assert [message["content"] for message in chats(server)[1].json["messages"]] == ["x", "half", "y"]


def test_load_and_save(server: Double, talk: Talk) -> None:
    server.on("POST", "/api/create", Reply(lines=[{"status": "success"}]))
    talk("hello\r", "/save mine\r", "/load other\r", "again\r", "/bye\r")
    saved = next(asked.json for asked in server.asked if asked.path == "/api/create")
    assert saved == {
        "model": "mine",
        "from": "m",
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi"}],
    }
    assert chats(server)[1].json["model"] == "other"
    assert len(chats(server)[1].json["messages"]) == 1


def test_loading_an_unknown_model_changes_nothing(server: Double, talk: Talk) -> None:
    server.on("POST", "/api/show", Reply(404, {"error": {"code": "model_not_found", "message": "no such"}}))
    shown = talk("/load nope\r", "x\r", "/bye\r")
    assert "no such" in shown
    assert "pull NAME" in shown
    assert chats(server)[0].json["model"] == "m"
    server.on("POST", "/api/v1/generate", Reply(404, {"error": {"code": "model_not_found", "message": "no"}}))
    with pytest.raises(ModelNotFound):
        talk("/bye\r")


def test_show_and_help(talk: Talk) -> None:
    shown = talk("/?\r", "/? shortcuts\r", "/set\r", "/show\r", "/show system\r", "/show license\r", "/bye\r")
    for expected in ("/load MODEL", "Ctrl-D", "/set parameter", "/show info", "theirs", "has no license"):
        assert expected in shown


def test_images_go_to_a_vision_model(server: Double, talk: Talk, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"PNG")
    shown = talk(f"look: {image}\r/bye\r", chat=Conversation("m", vision=True))
    assert f"Added image '{image}'" in shown
    assert chats(server)[0].json["messages"][0] == {"role": "user", "content": "look:", "images": ["UE5H"]}


def test_history_is_kept_private_or_not_at_all(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk("secret words\r", "/set nohistory\r", "not kept\r", "/bye\r")
    file = tmp_path / "ollama-distributed" / "history"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "secret words" in file.read_text()
    assert "not kept" not in file.read_text()
    monkeypatch.setenv("OLLAMA_NOHISTORY", "1")
    talk("nor this\r", "/bye\r")
    assert "nor this" not in file.read_text()
