"""The conversation at the terminal: `run MODEL` without a prompt, used as Ollama's is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.cli import output
from ollama_distributed.cli.answer import Look, Piece, Printed, Printer
from ollama_distributed.cli.conversation import Conversation, format_of, think_of
from ollama_distributed.cli.group import HINTS
from ollama_distributed.cli.inference import chatted
from ollama_distributed.cli.library import described
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.prompt import Lines, images
from ollama_distributed.cli.session import state_dir
from ollama_distributed.cli.terminal import clean, clean_line
from ollama_distributed.client.errors import ClientError

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from ollama_distributed.client.sync import SyncClient

HELP = '''Commands:
  /set             What can be set
  /show            What can be shown of the model
  /load MODEL      Talk to another model
  /save MODEL      Save this conversation as a model
  /clear           Forget what was said
  /bye             Leave
  /?, /help        This help
  /? shortcuts     Keys

Use """ to begin and to end a message of several lines.'''
SHORTCUTS = """Keys:
  Up, Down         Earlier messages
  Ctrl-A, Ctrl-E   Start, end of the line
  Alt-B, Alt-F     One word back, on
  Ctrl-K, Ctrl-U   Delete to the end, to the start
  Ctrl-W           Delete the word before
  Ctrl-R           Search in earlier messages
  Ctrl-L           Clear the screen
  Ctrl-C           Stop the answer
  Ctrl-D           Leave"""
SET_HELP = """  /set parameter NAME VALUE   A model option: /set parameter temperature 0
  /set system TEXT            The system message
  /set history, nohistory     Keep what is typed for the next time, or not
  /set wordwrap, nowordwrap   Wrap lines at spaces, or not
  /set format json|SCHEMA     Answers in JSON; /set noformat ends it
  /set verbose, quiet         Times after each answer, or not
  /set think [LEVEL], nothink Thinking on or off"""
_SETTINGS = frozenset(
    {"parameter", "system", "history", "nohistory", "wordwrap", "nowordwrap"}
    | {"format", "noformat", "verbose", "quiet", "think", "nothink"}
)
SHOW_HELP = """  /show info, license, modelfile, parameters, system, template"""
_SHOWN = ("license", "modelfile", "parameters", "system", "template")
PLACEHOLDER = "Send a message (/? for help)"
LEAVE_HINT = "Use Ctrl-D or /bye to leave."


class Leave(Exception):
    """/bye."""


class Repl:
    """Reads messages and prints answers until the person leaves.

    `terminal_input` and `terminal_output` replace prompt_toolkit's, for tests.
    """

    def __init__(
        self,
        client: SyncClient,
        chat: Conversation,
        look: Look,
        *,
        terminal_input: Input | None = None,
        terminal_output: Output | None = None,
    ) -> None:
        self._client = client
        self._chat = chat
        self._look = look
        self._keep_history = not os.environ.get("OLLAMA_NOHISTORY")
        self._input = terminal_input
        self._output = terminal_output
        self._session = self._new_session()

    def _new_session(self) -> PromptSession[str]:
        history: History = InMemoryHistory()
        if self._keep_history:
            history = _private_history(state_dir(os.environ) / "history")
        return PromptSession(history=history, input=self._input, output=self._output)

    def talk(self) -> None:
        """Returns when the person leaves. Raises what loading the model raises."""
        self._load()
        lines = Lines()
        while True:
            try:
                line = self._session.prompt(
                    "... " if lines.open else ">>> ",
                    placeholder=None if lines.open else [("ansibrightblack", PLACEHOLDER)],
                )
            except KeyboardInterrupt:
                lines.drop()
                print(LEAVE_HINT)
                continue
            except EOFError:
                return
            message = lines.feed(line)
            if message is None or not message.strip():
                continue
            try:
                self._take(message)
            except Leave:
                return
            except KeyboardInterrupt:
                print()
            except ClientError as problem:
                output.error(str(problem), HINTS.get(problem.code, ""))
            except (OllamaDistributedError, Problem) as problem:
                output.error(str(problem))
            except OSError as problem:
                output.error(f"{problem.filename or ''}: {problem.strerror or problem}")

    def _load(self) -> None:
        """Have the model in memory before the first message."""
        console = output.progress_console()
        with console.status(f"loading {clean_line(self._chat.model)}"):
            self._client.generate(self._chat.loading())

    def _take(self, message: str) -> None:
        word, _, rest = message.strip().partition(" ")
        command = self._commands().get(word)
        if command is not None and "\n" not in message.strip():
            command(rest.strip())
        elif word.startswith("/") and "/" not in word[1:] and "." not in word and "\n" not in message.strip():
            print(f"Unknown command '{clean_line(word)}'. Type /? for help.")
        else:
            self._say(message)

    def _commands(self) -> Mapping[str, Callable[[str], None]]:
        return {
            "/?": self._help,
            "/help": self._help,
            "/bye": self._bye,
            "/exit": self._bye,
            "/clear": self._clear,
            "/load": self._load_other,
            "/save": self._save,
            "/set": self._set,
            "/show": self._show,
        }

    def _say(self, message: str) -> None:
        chat = self._chat
        found: list[bytes] = []
        if chat.vision:
            message, found, paths = images(message)
            for path in paths:
                print(f"Added image '{clean_line(str(path))}'")
        request = chat.asking(message, found)
        heard: list[Piece] = []
        printed: Printed | None = None
        try:
            with contextlib.closing(self._client.chat_stream(request)) as stream:
                printed = Printer(self._look, sys.stdout).all(_heard(chatted(stream), heard))
        except KeyboardInterrupt:
            if not heard:
                raise
            text = "".join(piece.text for piece in heard)
            printed = Printed(text, "".join(piece.thinking for piece in heard))
        chat.answered(request, printed.text, printed.thinking)

    # ── commands ────────────────────────────────────────────────────────────────────

    def _help(self, rest: str) -> None:
        print(
            {"": HELP, "shortcuts": SHORTCUTS, "set": SET_HELP, "show": SHOW_HELP}.get(rest.lstrip("/"), HELP)
        )

    def _bye(self, _: str) -> None:
        raise Leave

    def _clear(self, _: str) -> None:
        self._chat.messages.clear()
        print("Forgot what was said.")

    def _load_other(self, name: str) -> None:
        if not name:
            print("Usage: /load MODEL")
            return
        capabilities = self._client.models.show(name).capabilities  # an unknown name changes nothing
        self._chat.model = name
        self._chat.vision = "vision" in capabilities
        self._chat.messages.clear()
        self._load()
        print(f"Talking to '{clean_line(name)}'.")

    def _save(self, name: str) -> None:
        if not name:
            print("Usage: /save MODEL")
            return
        for _ in self._client.models.create(self._chat.saving(name)):
            pass
        print(f"Saved as '{clean_line(name)}'.")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        value = value.strip()
        match name:
            case "parameter" if len(value.split()) > 1:
                option, *values = value.split()
                self._chat.set_parameter(option, values)
            case "system" if value:
                self._chat.system = value.removeprefix('"""').removesuffix('"""')
            case "history" | "nohistory":
                self._keep_history = name == "history"
                self._session = self._new_session()
            case "wordwrap" | "nowordwrap":
                self._look.wrap = name == "wordwrap"
            case "verbose" | "quiet":
                self._look.verbose = name == "verbose"
            case "format" if value:
                self._chat.format = format_of(value)
            case "noformat":
                self._chat.format = None
            case "think":
                self._chat.think = think_of(value or "true")
            case "nothink":
                self._chat.think = False
            case _:
                if name and name not in _SETTINGS:
                    print(f"There is no '{clean_line(name)}' to set. There is:")
                print(SET_HELP)
                return
        print(f"Set {clean_line(rest)}.")

    def _show(self, what: str) -> None:
        if what not in ("info", *_SHOWN):
            print(SHOW_HELP)
            return
        shown = self._client.models.show(self._chat.model)
        if what == "info":
            print(described(shown), end="")
            return
        text = getattr(shown, what)
        if what == "system" and self._chat.system:
            text = self._chat.system
        if what == "parameters" and self._chat.options:
            ours = "\n".join(f"{name} {value}" for name, value in self._chat.options.items())
            text = f"Of the model:\n{text}\n\nOf this conversation:\n{ours}"
        print(clean(text) or f"The model has no {what}.")


def _heard(pieces: Iterator[Piece], heard: list[Piece]) -> Iterator[Piece]:
    """Notes each piece as it passes: an answer that is stopped stays in the conversation."""
    for piece in pieces:
        heard.append(piece)
        yield piece


def _private_history(path: Path) -> FileHistory:
    """Prompts are private: the file is its owner's alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.chmod(0o600)
    return FileHistory(str(path))
