"""One answer as it streams to stdout, and its figures."""

import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Self

from pace import isa
from pace.engine.intake import Prompt
from pace.engine.request import RequestOutput
from pace.engine.sampling_params import SamplingParams
from pace.errors import ModelError
from pace.llm import LLM


@dataclass(frozen=True)
class Answer:
    output: RequestOutput
    stopped: bool  # by Ctrl-C

    @property
    def text(self) -> str:
        return self.output.outputs[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.output.outputs[0].finish_reason

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the answer."""
        return len(self.output.prompt_token_ids) + len(self.output.outputs[0].token_ids)


class _CtrlC:
    """Ctrl-C interrupts until the first token is there; from then on it only asks for the answer to stop, because an
    exception in the middle of the engine's work would leave it half done.
    """

    def __enter__(self) -> Self:
        self.asked = self.streaming = False
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if not self.streaming:
            raise KeyboardInterrupt
        self.asked = True


def stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> Answer:
    """Writes the answer to stdout as it comes. KeyboardInterrupt for a Ctrl-C before its first token."""
    with _CtrlC() as ctrl_c:
        for output in llm.stream(prompt, params):
            ctrl_c.streaming = True
            sys.stdout.write(output.outputs[0].new_text)
            sys.stdout.flush()
            if ctrl_c.asked:
                break
    answer = Answer(output, ctrl_c.asked)
    if not answer.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if answer.finish_reason == "error":
        raise ModelError(f"the model failed after {answer.num_tokens} tokens: {output.outputs[0].stop_reason}")
    return answer


@dataclass(frozen=True)
class Figures:
    """How fast an answer came. Rates are None where nothing was decoded after the first token."""

    prompt_rate: float  # tokens a second
    first_token: float  # seconds from the request
    first_token_from_start: float  # seconds from the start of the process
    decode_rate: float | None
    bytes_per_second: float | None  # of weights, keys and values
    rung: str
    tokens_a_step: float | None = None  # where drafts were taken up

    @classmethod
    def of(cls, llm: LLM, output: RequestOutput, started: float) -> Self:
        metrics, prompt, tokens = output.metrics, len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        assert metrics.first_token is not None
        assert metrics.finished is not None
        first_token = metrics.first_token - metrics.arrived
        rate = (tokens - 1) / (metrics.finished - metrics.first_token) if tokens > 1 else None
        average_length = prompt + tokens / 2
        step_bytes = llm.model.bytes_of_step() + average_length * llm.model.cache_shape.bytes_per_token
        a_step = (tokens - 1) / (tokens - 1 - metrics.accepted) if metrics.accepted else 1
        return cls(
            prompt_rate=prompt / first_token,
            first_token=first_token,
            first_token_from_start=metrics.first_token - started,
            decode_rate=rate,
            bytes_per_second=rate and rate / a_step * step_bytes,
            rung=isa.RUNG,
            tokens_a_step=a_step if metrics.drafted else None,
        )

    def line(self, peak: float | None, width: int) -> str:
        """In the longer form where it fits. `peak`: bytes a second that the machine's memory gives."""
        long, short = self._line(peak, brief=False), self._line(peak, brief=True)
        return long if len(long) <= width else short

    def _line(self, peak: float | None, brief: bool) -> str:
        unit, of_memory = ("/s", "") if brief else (" tok/s", " of memory")
        start = "" if brief else f" ({self.first_token_from_start:.2f} s from start)"
        parts = [f"prompt {self.prompt_rate:.0f}{unit}", f"first token {self.first_token:.2f} s{start}"]
        if self.decode_rate is not None and self.bytes_per_second is not None:
            share = f" ({self.bytes_per_second / peak:.0%}{of_memory})" if peak else ""
            parts.append(f"decode {self.decode_rate:.1f}{unit}")
            if self.tokens_a_step is not None:
                parts.append(f"{self.tokens_a_step:.1f}{'/step' if brief else ' tokens a step'}")
            parts.append(f"{self.bytes_per_second / 1e9:.1f} GB/s{share}")
        return " · ".join([*parts, self.rung])
