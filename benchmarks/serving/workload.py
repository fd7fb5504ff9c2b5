"""What is asked and when: lengths, texts and arrivals, drawn with a seed; or prompts from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

# Words that the tokenizers of most models know as one token each, with the space before them.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment
air teacher force education foot boy age policy process music market sense nation plan college interest death
experience effect use class control field development role effort rate heart drug show leader light voice wife police
mind price report decision son view relationship town road arm difference value building action season society tax
director position player record paper space ground form event official matter center couple site project activity
star table need court oil situation cost industry figure street image phone data picture practice piece land product
doctor wall news test movie north love support technology
""".split()
_OWN_WORDS = 4  # that a prompt opens with, so that nothing of it is in the server's cache from an earlier run


@dataclass(frozen=True)
class Ask:
    prompt: str
    output_tokens: int


@dataclass(frozen=True)
class Span:
    """Lengths from `least` to `most`, each as likely."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Span":
        """From "128" or "64:256"."""
        least, _, most = text.partition(":")
        span = cls(int(least), int(most or least))
        if not 1 <= span.least <= span.most:
            raise ValueError(f"the lengths are {text!r}; they must be like 128 or 64:256")
        return span

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        return [int(length) for length in rng.integers(self.least, self.most + 1, count)]

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}–{self.most}"


@dataclass(frozen=True)
class Measure:
    """How many tokens the server counts for a prompt of words: so many a word, and so many around."""

    per_word: float = 1.0
    around: float = 0.0

    @classmethod
    def of(cls, few: tuple[int, int], many: tuple[int, int]) -> "Measure":
        """From the words and tokens of two prompts."""
        per_word = (many[1] - few[1]) / (many[0] - few[0])
        return cls(per_word, few[1] - per_word * few[0])

    def words(self, tokens: int) -> int:
        return max(1, round((tokens - self.around) / self.per_word))


def text_of(words: int, rng: np.random.Generator, own: np.random.Generator) -> str:
    """Words without sense; the first few are drawn from `own`."""
    first = min(words, _OWN_WORDS)
    picked = [*own.integers(len(WORDS), size=first), *rng.integers(len(WORDS), size=words - first)]
    return " ".join(WORDS[i] for i in picked)


def drawn_asks(count: int, prompt: Span, output: Span, measure: Measure, seed: int) -> list[Ask]:
    """The same lengths for each seed, and words that begin otherwise each time."""
    rng, own = np.random.default_rng(seed), np.random.default_rng()
    prompts, outputs = prompt.draw(count, rng), output.draw(count, rng)
    texts = [text_of(measure.words(tokens), rng, own) for tokens in prompts]
    return [Ask(text, tokens) for text, tokens in zip(texts, outputs, strict=True)]


def asks_of_file(path: Path, count: int, output: Span, seed: int) -> list[Ask]:
    """A prompt a line, as JSON ({"prompt": "…", "output_tokens": 64}, the latter may be left out) or as it is; taken
    in order, from the start again at the end.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no prompts; it must have one a line")
    drawn = output.draw(count, np.random.default_rng(seed))
    return [_ask(line, tokens) for line, tokens in zip(islice(cycle(lines), count), drawn, strict=True)]


def _ask(line: str, output_tokens: int) -> Ask:
    if not line.lstrip().startswith("{"):
        return Ask(line, output_tokens)
    read = json.loads(line)
    return Ask(read["prompt"], read.get("output_tokens", output_tokens))


def arrivals(rate: float, count: int, seed: int, poisson: bool = True) -> Sequence[float]:
    """Seconds from the start at which requests are due, the first at once; `inf` has all of them there.

    Poisson's gaps are drawn, then stretched so that the rate of these few is what was asked for too.
    """
    if np.isinf(rate) or count < 2:
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(size=count - 1) if poisson else np.ones(count - 1)
    gaps *= (count - 1) / rate / gaps.sum()
    return [0.0, *map(float, np.cumsum(gaps))]
