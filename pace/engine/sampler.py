"""From logits to tokens, each request by its own parameters and its own generator."""

from collections.abc import Sequence

import numpy as np

from pace.ops import OperatorConfig, Sampling
from pace.reference.arrays import Float
from pace.reference.sample import Bias, History, Sampled

from .request import Logprob, Request
from .tokenizer import Tokenizer


class Sampler:
    """Draws for many requests in one call of the operator; the tokenizer names tokens in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, operators: OperatorConfig) -> None:
        self._tokenizer, self._sampling = tokenizer, Sampling(operators)

    def sample(self, logits: Float, requests: Sequence[Request]) -> None:
        """Draw the next token of each request, logits (requests, vocabulary), and have the request accept it."""
        asked = [request.params.logprobs for request in requests if request.params.logprobs is not None]
        sampled = self._sampling(
            logits,
            np.concatenate([request.row for request in requests]),
            np.array([0.0 if r.params.temperature == 0 else r.generator.random() for r in requests]),
            history(requests),
            bans(requests),
            max(asked) if asked else None,
        )
        for row, request in enumerate(requests):
            token = int(sampled.tokens[row])
            if token < 0:
                request.fail("the logits hold NaN or leave no token to draw")
                continue
            if request.params.logprobs is not None:
                self._note_logprobs(sampled, row, token, request)
            request.accept(token)

    def _note_logprobs(self, sampled: Sampled, row: int, token: int, request: Request) -> None:
        assert sampled.logprobs is not None
        assert sampled.ranks is not None
        assert sampled.top_tokens is not None
        assert sampled.top_logprobs is not None
        count = request.params.logprobs
        top = zip(sampled.top_tokens[row, :count], sampled.top_logprobs[row, :count], strict=True)
        noted = {int(t): Logprob(float(p), rank, self._text(int(t))) for rank, (t, p) in enumerate(top, start=1)}
        own = Logprob(float(sampled.logprobs[row]), int(sampled.ranks[row]), self._text(token))
        request.logprobs.append({token: own} | noted)
        request.cumulative_logprob += own.logprob

    def _text(self, token: int) -> str:
        return self._tokenizer.piece(token).decode(errors="replace")


def history(requests: Sequence[Request]) -> History | None:
    """What the penalties look at; None where no request has any."""
    if not any(request.counts for request in requests):
        return None
    ids = [token for request in requests for token in request.counts]
    counts = [count for request in requests for count in request.counts.values()]
    return History(np.array(ids, np.int32), np.array(counts, np.int32), starts([len(r.counts) for r in requests]))


def bans(requests: Sequence[Request]) -> Bias | None:
    """The tokens that would end a text before its min_tokens; None where there are none."""
    ends = [sorted(r.end_tokens) if len(r.token_ids) < r.params.min_tokens else [] for r in requests]
    ids = [token for tokens in ends for token in tokens]
    if not ids:
        return None
    return Bias(np.array(ids, np.int32), np.full(len(ids), -np.inf, np.float32), starts([len(e) for e in ends]))


def starts(counts: Sequence[int]) -> np.ndarray:
    """Where each row begins, and where the last one ends, (rows + 1,) int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
