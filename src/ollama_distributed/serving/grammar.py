"""A grammar that holds after the thoughts: two runs of one runner that are heard as one.

The first goes without the grammar until the thoughts end (`reasoning.py` decides), the second with it,
after them. Knows nothing of queues, of leases' ends and of what is tried again.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.inference import Generation
from ollama_distributed.base.paced import Paced
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, EngineSink, Progress, Tokens
from ollama_distributed.serving import prompts
from ollama_distributed.serving.ports import CompletionRequest
from ollama_distributed.serving.prompts import Prompt
from ollama_distributed.serving.reasoning import Reasoning
from ollama_distributed.serving.residents import Lease


class GrammarAfterThoughts(Paced[Generation]):
    """Implements `Generation`. Its sink hears what it would of one run."""

    __slots__ = ("_ask", "_held", "_lease", "_over", "_prompt", "_reasoning", "_sink", "_thought")

    def __init__(self, lease: Lease, prompt: Prompt, sink: EngineSink) -> None:
        """`prompt`: asks for a format, of a model that may think before it answers."""
        super().__init__()
        assert isinstance(prompt.ask, CompletionRequest)
        assert prompt.thinking_tags is not None
        self._lease = lease
        self._prompt = prompt
        self._ask = prompt.ask
        self._sink = sink
        self._reasoning: Reasoning | None = Reasoning(prompt.thinking_tags, inside=prompt.starts_in_thinking)
        """Watches the first run; None: the second is at work."""
        self._held: list[Tokens] = []
        """Tokens of which it is not clear yet whether they are thoughts."""
        self._thought = 0
        """Tokens of the thoughts, once the grammar holds."""
        self._over = False
        self._stand_before(lease.runner.generate(msgspec.structs.replace(self._ask, format=None), self._hear))

    def cancel(self) -> None:
        self._over = True
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.cancel()

    def _hear(self, event: EngineEvent) -> None:
        if self._over:
            return
        self._lease.heard()
        if isinstance(event, Tokens) and self._reasoning is not None:
            self._watch(self._reasoning, event)
        elif isinstance(event, Done):
            self._flush()
            self._end(self._counted(event))
        elif isinstance(event, EngineFailed):
            self._end(event)
        elif not (self._thought and isinstance(event, Progress)):
            # Of the thoughts, which the runner read as a prompt, nobody wants to hear progress.
            self._sink(event)

    def _end(self, event: Done | EngineFailed) -> None:
        if self._over:
            return
        self._over = True
        self._generation = None  # it holds this in its turn
        self._sink(event)

    def _counted(self, done: Done) -> Done:
        """Counts and times of two runs: the prompt's are the first's, seen on the way."""
        if not self._thought:
            return done
        return Done(
            reason=done.reason,
            prompt_tokens=0,
            cached_tokens=0,
            completion_tokens=self._thought + done.completion_tokens,
        )

    def _watch(self, reasoning: Reasoning, event: Tokens) -> None:
        """Thoughts pass; where they end, or if there are none, the grammar begins to hold."""
        verdict, thoughts = reasoning.feed(event.text)
        self._held.append(event)
        if verdict == "unclear":
            return
        if verdict == "answers":
            self._held.clear()
            self._constrain("", 0)
            return
        if verdict == "closed":
            self._held[-1] = msgspec.structs.replace(event, text=event.text[:thoughts])
        reasoning.tokens += sum(len(held.ids) or 1 for held in self._held)
        self._flush()
        if verdict == "closed" and not self._over:
            self._constrain(reasoning.text + "\n\n", reasoning.tokens)

    def _flush(self) -> None:
        held, self._held = self._held, []
        for event in held:
            if not self._over:
                self._sink(event)

    def _constrain(self, thoughts: str, emitted: int) -> None:
        """Generate the answer with its grammar, after these thoughts, on the same lease."""
        lease, prompt = self._lease, self._prompt
        self._reasoning = None
        self._thought = emitted
        if self._generation is not None:
            self._generation.cancel()
        ask = msgspec.structs.replace(
            self._ask,
            sampling=prompts.bounded(self._ask.sampling, lease.plan.context_tokens, emitted),
            prompt=(prompt.ids, thoughts) if prompt.ids else prompt.rendered + thoughts,
        )
        self._stand_before(lease.runner.generate(ask, self._hear))
