"""Proposers of every kind, good and bad, and engines that have them."""

import numpy as np

from pace.engine.loader import LoadedModel
from pace.ops import OperatorConfig
from pace.speculative import Draft, Proposer, SpeculativeConfig
from tests.engine.fakes import EOS, VOCABULARY


class Liar(Proposer):
    """Always wrong, or nearly: whoever would draw its draft has drawn another token before."""

    def __init__(self, config, target, draft=None, cache=None):
        pass

    def propose(self, texts, counts):
        return [[3 + (text.ids[-1] + i) % 50 for i in range(count)] for text, count in zip(texts, counts, strict=True)]


class Wild(Proposer):
    """Too many, too few, none, ends in the middle, and ids that are nobody's."""

    def __init__(self, config, target, draft=None, cache=None):
        self.turn = 0

    def propose(self, texts, counts):
        drafts = []
        for text, count in zip(texts, counts, strict=True):
            self.turn += 1
            last = text.ids[-1]
            kinds = [
                [],
                [last] * (count + 50),
                [last, EOS, last, EOS],
                [EOS] * count,
                [VOCABULARY, last],
                [last, -1, last],
                [2**40],
                np.array([last, last + 1], np.int64),
                [last],
            ]
            drafts.append(kinds[self.turn % len(kinds)])
        return drafts


class Failing(Proposer):
    """Works a few times."""

    def __init__(self, config, target, draft=None, cache=None):
        self.left = 3

    def propose(self, texts, counts):
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("the proposer is at fault")
        return [[5] * count for count in counts]


class Knowing(Proposer):
    """What a list of whole texts says: each draft is right, where the text is one of them."""

    knows = ()

    def __init__(self, config, target, draft=None, cache=None):
        pass

    def propose(self, texts, counts):
        drafts = []
        for text, count in zip(texts, counts, strict=True):
            length = len(text.ids)
            whole = next((whole for whole in self.knows if whole[:length] == text.ids), [])
            drafts.append(whole[length : length + count])
        return drafts


OUTSIDE = {"liar": Liar, "wild": Wild, "failing": Failing, "knowing": Knowing}


def make_engine(llm, cache, capacity, prefix_caching=None, speculative=None, draft=None, block_tokens=16, **limits):
    """An engine with `capacity` tokens in its cache, and as many in that of the draft model."""
    models = [llm.model] if draft is None else [llm.model, draft.model]
    total = sum(capacity * model.cache_shape.bytes_per_token for model in models)
    config = SpeculativeConfig.parse(speculative)
    loaded = LoadedModel(llm.model, llm.tokenizer, OperatorConfig(), {"eos_token_id": EOS}, config, draft)
    return loaded.engine(total, cache, block_tokens, prefix_caching, **limits)


def draft_of(llm, **config):
    """A draft model that has been loaded as a model."""
    return Draft(llm.model, config, OperatorConfig())
