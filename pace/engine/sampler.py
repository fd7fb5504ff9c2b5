"""From logits to tokens, each sequence by its own parameters and its own generator."""

from collections import abc

import numpy as np
from numpy.typing import NDArray

from pace.ops import OperatorConfig, Sampling
from pace.reference.arrays import Float
from pace.reference.sample import SAMPLING_DTYPE, Bias, History, Sampled

from .request import Logprob, Logprobs
from .sampling_params import SamplingParams
from .sequence import Sequence
from .tokenizer import Tokenizer

_GREEDY = SamplingParams(temperature=0).with_defaults({}).row()
NO_TOKEN = "the logits hold NaN or leave no token to draw"


class Sampler:
    """Draws for many sequences in one call of the operator; the tokenizer names tokens in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, operators: OperatorConfig) -> None:
        self._tokenizer, self._sampling = tokenizer, Sampling(operators)

    def sample(self, logits: Float, sequences: abc.Sequence[Sequence]) -> None:
        """Draw the next token of each, logits (sequences, vocabulary), and have the sequence accept it.

        What goes wrong for one of them ends that one, with the reason.
        """
        allowed = masks(sequences, logits.shape[1])
        sampled = self._sampling(
            logits,
            np.frombuffer(b"".join([sequence.row for sequence in sequences]), SAMPLING_DTYPE),
            np.array([sequence.uniforms(1)[0] for sequence in sequences]),
            history(sequences),
            biases(sequences),
            most_asked(sequences),
            allowed,
        )
        for row, (sequence, token) in enumerate(zip(sequences, sampled.tokens.tolist(), strict=True)):
            if sequence.finish_reason is not None:
                continue
            if token < 0:
                dead = allowed is not None and not allowed[row].any()
                sequence.finish("error", "the grammar allows no token" if dead else NO_TOKEN)
                continue
            try:
                if wanted(sequence) is not None:
                    noted = self._logprobs(sampled, row, token, sequence.params.logprobs or 0)
                    sequence.cumulative_logprob += noted[token].logprob
                    if sequence.params.logprobs is not None:
                        sequence.logprobs.append(noted)
                sequence.accept(token)
            except Exception as error:
                sequence.finish("error", str(error))

    def logprobs_of(self, logits: Float, tokens: NDArray[np.int32], count: int) -> list[Logprobs]:
        """Of tokens that are given, one a row, and of the `count` most probable beside each. ValueError for NaN."""
        rows = np.frombuffer(_GREEDY * len(logits), SAMPLING_DTYPE)
        sampled = self._sampling(logits, rows, None, None, None, count, None, tokens)
        return [self._logprobs(sampled, row, token, count) for row, token in enumerate(tokens.tolist())]

    def _logprobs(self, sampled: Sampled, row: int, token: int, count: int) -> Logprobs:
        assert sampled.logprobs is not None
        assert sampled.ranks is not None
        assert sampled.top_tokens is not None
        assert sampled.top_logprobs is not None
        if sampled.ranks[row] == 0:  # also where a grammar hides the NaN, and a token was drawn
            raise ValueError(NO_TOKEN)
        top = zip(sampled.top_tokens[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist(), strict=True)
        own = Logprob(float(sampled.logprobs[row]), int(sampled.ranks[row]), self._text(token))
        return {token: own} | {t: Logprob(p, rank, self._text(t)) for rank, (t, p) in enumerate(top, start=1)}

    def _text(self, token: int) -> str:
        return self._tokenizer.piece(token).decode(errors="replace")


def wanted(sequence: Sequence) -> int | None:
    """How many log-probabilities a sequence needs: best_of chooses by those of the tokens alone."""
    params = sequence.params
    return 0 if params.logprobs is None and params.chooses else params.logprobs


def most_asked(sequences: abc.Iterable[Sequence]) -> int | None:
    return max((count for sequence in sequences if (count := wanted(sequence)) is not None), default=None)


def history(sequences: abc.Sequence[Sequence]) -> History | None:
    """What the penalties look at; None where no sequence has any."""
    seen = [sequence.seen for sequence in sequences]
    if not any(seen):
        return None
    none = np.zeros(0, np.int32)
    ids = [none if each is None else each.ids for each in seen]
    counts = [none if each is None else each.counts for each in seen]
    return History(np.concatenate(ids), np.concatenate(counts), starts(ids))


def biases(sequences: abc.Iterable[Sequence]) -> Bias | None:
    """What is added to logits; None where it is nothing."""
    pairs = [sequence.bias() for sequence in sequences]
    ids = [ids for ids, _ in pairs]
    if not any(len(each) for each in ids):
        return None
    return Bias(np.concatenate(ids), np.concatenate([values for _, values in pairs]), starts(ids))


def masks(sequences: abc.Sequence[Sequence], vocabulary: int) -> NDArray[np.int32] | None:
    """The tokens that grammars allow, (sequences, words of 32 bits); None where there are no grammars.

    A grammar that fails ends its sequence.
    """
    if not any(sequence.matcher for sequence in sequences):
        return None
    allowed = np.full((len(sequences), -(-vocabulary // 32)), -1, np.int32)
    for row, sequence in enumerate(sequences):
        if sequence.matcher is not None:
            try:
                sequence.matcher.allow(allowed[row])
            except ValueError as error:
                sequence.finish("error", str(error))
    return allowed


def starts(pieces: abc.Iterable[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Where each row begins, and where the last one ends, (rows + 1,) int64."""
    return np.cumsum([0, *map(len, pieces)], dtype=np.int64)
