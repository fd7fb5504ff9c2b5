"""`pace chat`: a conversation, turn by turn. Ctrl-C stops an answer; what was said of it stays in the conversation."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pace.engine.images import NO_IMAGES, Pixels, read
from pace.engine.sampling_params import SamplingParams
from pace.errors import ModelError
from pace.llm import LLM

from .answer import Answer, Figures, stream
from .terminal import complain, note

COMMANDS = {
    "/clear": "start a new conversation",
    "/system TEXT": "tell the model who it is; without TEXT, nothing",
    "/image FILE": "ask about an image with the next message",
    "/help": "this list",
    "/exit": "leave (Ctrl-D does too; Ctrl-C stops an answer)",
}


@dataclass
class Chat:
    llm: LLM
    params: SamplingParams
    system: str = ""
    stats: bool = True
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Pixels] = field(default_factory=list)  # of the next message

    def __post_init__(self) -> None:
        if "default" not in self.llm.tokenizer.chat_templates:
            raise ModelError("the model has no chat template, so it is not made for chats: use `pace generate`")
        self.context = min(self.llm.model.max_positions, self.llm.cache.stats().capacity_tokens)

    def run(self) -> None:
        if sys.stdin.isatty():
            note(f"{self.llm.model.dtype} · a context of {self.context} tokens · /help lists the commands")
        for line in lines():
            if line.startswith("/"):
                if line.split()[0] == "/exit":
                    return
                self._command(*line.split(maxsplit=1))
            elif line.strip():
                self._turn(line)

    def _command(self, name: str, text: str = "") -> None:
        match name:
            case "/clear":
                self.messages.clear()
                self.images.clear()
            case "/system":
                self.system = text
            case "/image":
                self._attach(text)
            case "/help":
                for usage, meaning in COMMANDS.items():
                    note(f"{usage:<14}{meaning}")
            case _:
                complain(f"no command {name}; there are {', '.join(usage.split()[0] for usage in COMMANDS)}")

    def _attach(self, path: str) -> None:
        processor = self.llm.model.images
        if processor is None:
            complain(NO_IMAGES)
            return
        try:
            self.images.append(read(path.strip(), processor))
        except (ValueError, ImportError) as error:
            complain(str(error))

    def _turn(self, text: str) -> None:
        """One message and its answer. Where there is no answer, the message is forgotten."""
        seen = [{"type": "image", "image": image} for image in self.images]
        self.images.clear()
        self.messages.append({"role": "user", "content": [*seen, {"type": "text", "text": text}] if seen else text})
        answer = self._answer()
        if answer is None or not answer.text:
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": answer.text})
        if self.stats:
            note(self._figures(answer))
        if answer.num_tokens >= self.context:
            complain("the context is full: /clear starts a new conversation", style="bold yellow")

    def _answer(self) -> Answer | None:
        try:
            prompt = self.llm.engine.intake.chat([*self._system_messages(), *self.messages])
            length = len(prompt["prompt"] if isinstance(prompt, Mapping) else prompt)
            if length >= self.context:
                raise ValueError(
                    f"the conversation has come to {length} tokens and the context holds {self.context}: "
                    "/clear starts a new one"
                )
            return stream(self.llm, prompt, self.params)
        except ValueError as error:
            complain(str(error))
        except KeyboardInterrupt:
            note("stopped")
        return None

    def _system_messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _figures(self, answer: Answer) -> str:
        figures = Figures.of(self.llm, answer.output, started=0)
        rate = "" if figures.decode_rate is None else f" · {figures.decode_rate:.1f} tok/s"
        return f"first token {figures.first_token:.2f} s{rate} · context {answer.num_tokens} of {self.context}"


def lines() -> Iterator[str]:
    """What the user types, with editing and history, until Ctrl-D or Ctrl-C; or the lines of a file or pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 (what input() edits with)

    # Between \1 and \2 stands what takes no room on the line. The prompt is no part of what the model says.
    on_screen = sys.stdout.isatty()
    prompt = "> " if "NO_COLOR" in os.environ else "\1\033[1;36m\2> \1\033[0m\2"
    while True:
        try:
            if not on_screen:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input(prompt if on_screen else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        yield line
