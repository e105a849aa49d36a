"""Commands that ask a model: run, generate, embed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.completion import model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.cli.answer import Look, Piece
    from ollama_distributed.cli.conversation import Conversation
    from ollama_distributed.client.sync import SyncClient
    from ollama_distributed.client.wire import ChatResponse, GenerateRequest, GenerateResponse, ShowResponse

PANEL = "Ask a model"


class _ThinkCommand(Command):
    """`--think` alone means `--think=true`, as in Ollama's command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--think=true" if arg == "--think" else arg for arg in args])


Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Counts and times after each answer.")]
FormatText = Annotated[
    str | None,
    typer.Option("--format", metavar="json|SCHEMA", help="Answer in JSON, or by this JSON schema."),
]
ThinkText = Annotated[
    str | None,
    typer.Option("--think", metavar="[=LEVEL]", help="true, false, low, medium, high or max (alone: true)."),
]
KeepAliveText = Annotated[
    str | None,
    typer.Option("--keepalive", metavar="TIME", help="How long the model stays loaded: 5m, 1h, 0, -1."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Any model option, for example temperature=0."),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")]
HideThinking = Annotated[bool, typer.Option("--hidethinking", help="Do not show the thinking.")]
NoWordWrap = Annotated[bool, typer.Option("--nowordwrap", help="Let the terminal break lines.")]


def register(app: typer.Typer) -> None:
    app.command(cls=_ThinkCommand, rich_help_panel=PANEL)(run)
    app.command(cls=_ThinkCommand, rich_help_panel=PANEL)(generate)
    app.command(cls=Command, rich_help_panel=PANEL)(embed)


def run(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]")] = None,
    verbose: Verbose = False,
    format_: FormatText = None,
    think: ThinkText = None,
    hide_thinking: HideThinking = False,
    keepalive: KeepAliveText = None,
    no_word_wrap: NoWordWrap = False,
    system: System = None,
    option: Options = None,
) -> None:
    """Talk to a model; with a PROMPT, answer it and leave.

    A model that is not there is pulled first, as Ollama does. Text that is piped in is added to the
    prompt. A vision model sees the image files that the prompt names. In a conversation, /? helps and
    Ctrl-C stops an answer.

    \b
    Examples:
      ollama-distributed run mymodel
      ollama-distributed run mymodel "Why is the sky blue?" --verbose
      cat report.txt | ollama-distributed run mymodel "Sum this up:"
    """
    from ollama_distributed.cli.answer import Look

    session: Session = ctx.obj
    chat = _conversation(model, format_, think, keepalive, system, option)
    look = Look(wrap=not no_word_wrap, hide_thinking=hide_thinking, verbose=verbose)
    talk = not prompt and output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)
    text = "" if talk else _prompt(prompt)
    with session.client() as client:
        capabilities = _brought(client, model).capabilities
        chat.vision = "vision" in capabilities
        if "embedding" in capabilities and "completion" not in capabilities:
            _embed(client, session, chat, [text or _prompt(prompt)], None)
        elif talk:
            from ollama_distributed.cli.repl import Repl

            Repl(client, chat, look).talk()
        else:
            _answer(client, chat, text, look)


def _brought(client: SyncClient, model: str) -> ShowResponse:
    """The model as it is shown; pulled where it is not there, by those who may."""
    from ollama_distributed.cli.bars import bars, follow
    from ollama_distributed.cli.terminal import clean_line
    from ollama_distributed.client.errors import Forbidden, ModelNotFound

    try:
        return client.models.show(model)
    except ModelNotFound as missing:
        try:
            with bars() as progress:
                progress.console.print(f"'{clean_line(model)}' is not here; pulling it", soft_wrap=True)
                follow(client.models.pull(model), progress)
        except Forbidden:
            raise missing from None
        return client.models.show(model)


def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]")] = None,
    verbose: Verbose = False,
    format_: FormatText = None,
    think: ThinkText = None,
    hide_thinking: HideThinking = False,
    keepalive: KeepAliveText = None,
    no_word_wrap: NoWordWrap = False,
    system: System = None,
    option: Options = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt without the model's template.")] = False,
    suffix: Annotated[str | None, typer.Option(metavar="TEXT", help="Fill in before this text.")] = None,
) -> None:
    """Complete one prompt; with --output json or yaml, print the server's whole answer.

    \b
    Examples:
      ollama-distributed generate mymodel "Three colours, as JSON" --format json
      ollama-distributed generate mymodel "Hello" --option temperature=0 --output json
    """
    from ollama_distributed.cli.answer import Look, print_answer

    session: Session = ctx.obj
    chat = _conversation(model, format_, think, keepalive, system, option)
    with session.client() as client:
        # Whether it sees images is asked only when the prompt may name one.
        text = _prompt(prompt)
        if "." in text:
            chat.vision = "vision" in client.models.show(model).capabilities
        request = _request(chat, text)
        request.raw = raw
        request.suffix = suffix
        if session.output != "table":
            output.write(output.structured(client.generate(request), session.output))
            return
        look = Look(wrap=not no_word_wrap, hide_thinking=hide_thinking, verbose=verbose)
        with contextlib.closing(client.generate_stream(request)) as stream:
            print_answer(generated(stream), look)


def embed(
    ctx: typer.Context,
    model: Model,
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Default: one a line from stdin.")
    ] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers.")] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut a text that is too long, or refuse it.")
    ] = True,
    keepalive: KeepAliveText = None,
) -> None:
    """Turn texts into vectors, one JSON list a line.

    \b
    Examples:
      ollama-distributed embed all-minilm "one text" "another"
      ollama-distributed embed all-minilm --output json < lines.txt
    """
    session: Session = ctx.obj
    chat = _conversation(model, None, None, keepalive, None, None)
    texts = text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise typer.BadParameter("give at least one text")
    with session.client() as client:
        _embed(client, session, chat, texts, dimensions, truncate=truncate)


def _embed(
    client: SyncClient,
    session: Session,
    chat: Conversation,
    texts: list[str],
    dimensions: int | None,
    *,
    truncate: bool = True,
) -> None:
    import msgspec

    from ollama_distributed.client.wire import EmbeddingsRequest

    answer = client.embeddings(
        EmbeddingsRequest(
            model=chat.model,
            input=texts,
            dimensions=dimensions,
            truncate=None if truncate else False,
            keep_alive=chat.keep_alive,
            options=chat.options or None,
        )
    )
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    else:
        output.write("".join(msgspec.json.encode(vector).decode() + "\n" for vector in answer.embeddings))


def _conversation(
    model: str,
    format_: str | None,
    think: str | None,
    keepalive: str | None,
    system: str | None,
    option: list[str] | None,
) -> Conversation:
    from ollama_distributed.cli.conversation import Conversation, format_of, keep_alive_of, think_of

    chat = Conversation(
        model=model,
        system=system or "",
        format=format_of(format_),
        think=think_of(think),
        keep_alive=keep_alive_of(keepalive),
    )
    for pair in option or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r}: write NAME=VALUE", param_hint="--option")
        values = [*chat.options.get("stop", []), value] if name == "stop" else [value]
        chat.set_parameter(name, values)
    return chat


def _prompt(words: list[str] | None) -> str:
    """The prompt's words, and what is piped in after them."""
    parts = [" ".join(words)] if words else []
    if not output.is_terminal(sys.stdin):
        piped = sys.stdin.read().strip("\n")
        parts += [piped] if piped else []
    if not parts:
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    return "\n\n".join(parts)


def _request(chat: Conversation, text: str) -> GenerateRequest:
    from ollama_distributed.cli.prompt import images
    from ollama_distributed.client.wire import GenerateRequest

    prompt, found, _ = images(text) if chat.vision else (text, [], [])
    return GenerateRequest(
        model=chat.model,
        prompt=prompt,
        system=chat.system or None,
        images=found or None,
        format=chat.format,
        think=chat.think,
        keep_alive=chat.keep_alive,
        options=chat.options or None,
    )


def _answer(client: SyncClient, chat: Conversation, text: str, look: Look) -> None:
    from ollama_distributed.cli.answer import print_answer

    with contextlib.closing(client.generate_stream(_request(chat, text))) as stream:
        print_answer(generated(stream), look)


def generated(stream: Generator[GenerateResponse, None, None]) -> Iterator[Piece]:
    from ollama_distributed.cli.answer import Piece

    for chunk in stream:
        yield Piece(
            chunk.response, chunk.thinking or "", chunk.tool_calls or (), chunk if chunk.done else None
        )


def chatted(stream: Generator[ChatResponse, None, None]) -> Iterator[Piece]:
    from ollama_distributed.cli.answer import Piece

    for chunk in stream:
        said = chunk.message
        yield Piece(said.content, said.thinking or "", said.tool_calls or (), chunk if chunk.done else None)
