"""What each proposer proposes."""

import json
import shutil
import time

import numpy as np
import pytest

from pace import LLM, SamplingParams
from pace.cache import CACHES, CacheFull
from pace.engine.loader import load_engine
from pace.engine.speculation import SpeculationStats
from pace.errors import ModelError
from pace.ops import OperatorConfig
from pace.speculative import PROPOSERS, NGram, Proposer, SpeculativeConfig
from pace.speculative.oracle import Oracle
from pace.speculative.reader import NEARBY
from tests.engine.fakes import VOCABULARY, write_model, write_tokenizer

from .conftest import PARD_TOKEN
from .proposers import draft_of, make_engine

GREEDY = SamplingParams(temperature=0).with_defaults({}).row()


class Words:
    """A text as proposers see it."""

    def __init__(self, ids, row=GREEDY, origin=None):
        self.ids, self.row, self.origin = list(ids), row, origin or self

    def uniforms(self, count):
        return [0.25 + 0.1 * i for i in range(count)]


def ngram(**options):
    return NGram(SpeculativeConfig(method="ngram", options=options), None)


def proposed(proposer, ids, count):
    return proposer.propose([Words(ids)], [count])[0]


# --- n-grams ---


@pytest.mark.parametrize(
    ("ids", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 1, [4]),
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 3, [8, 1, 2]),  # the latest
        ([5, 2, 3, 7, 1, 2, 3, 8, 0, 5, 2, 3], 3, [7, 1, 2]),  # the longest, though others are later
        ([1, 2, 9, 8, 7, 2], 3, []),  # one token is too few
        ([4, 4, 4], 5, [4] * 5),  # what repeats itself goes on
        ([1, 2, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([1], 3, []),
        ([1, 2, 3, 4], 3, []),
    ],
)
def test_ngram(ids, count, expected):
    assert proposed(ngram(), ids, count) == expected


def test_ngram_options():
    assert proposed(ngram(shortest=1), [1, 2, 9, 8, 7, 2], 3) == [9, 8, 7]
    assert proposed(ngram(longest=2), [5, 2, 3, 7, 1, 2, 3, 8, 0, 5, 2, 3], 1) == [8]
    with pytest.raises(ValueError, match=r"longest of speculative is 2; it must be at least 3, as shortest is"):
        ngram(longest=2, shortest=3)


def slow_ngram(ids, count, longest, shortest):
    for size in range(longest, shortest - 1, -1):
        for place in range(len(ids) - 1, size - 1, -1):
            if ids[place - size : place] == ids[-size:]:
                whole = list(ids)
                for i in range(count):
                    whole.append(whole[place + i])
                return whole[len(ids) :]
    return []


def test_ngram_as_a_text_grows():
    """The index is that of a search through all of the text, whenever it is asked."""
    generator = np.random.default_rng(0)
    proposer, text = ngram(shortest=1, longest=3), Words([1])
    for _ in range(300):
        text.ids += generator.integers(0, 6, generator.integers(1, 5)).tolist()
        assert proposer.propose([text], [4]) == [slow_ngram(text.ids, 4, 3, 1)]
    proposer.forget(text)
    assert not proposer._indices


def test_ngram_reads_nothing_twice():
    """A step of a long text takes microseconds."""
    text = Words(np.random.default_rng(0).integers(0, 40000, 30000).tolist())
    proposer = ngram()
    proposer.propose([text], [8])
    took = []
    for token in range(200):
        text.ids.append(token)
        began = time.perf_counter()
        proposer.propose([text], [8])
        took.append(time.perf_counter() - began)
    assert np.median(took) < 1e-4  # 5 µs on a quiet machine, 3 ms for a search


# --- draft models ---


def speculator(llm, method, draft, cache="PAGED", capacity=1 << 12, **more):
    """The proposer of an engine."""
    config = {"method": method, "model": "draft"}
    return make_engine(llm, cache, capacity, None, config, draft, **more).scheduler.speculation.proposer


class Alone:
    """The draft model by itself, a sequence at a time."""

    def __init__(self, llm):
        self.model = llm.model

    def logits(self, ids):
        cache = CACHES["DYNAMIC"](self.model.cache_shape, 8 << 20, OperatorConfig())
        placement = cache.append([cache.allocate()], [len(ids)])
        return self.model.logits(self.model.forward(np.array(ids, np.int32), placement, cache))

    def draft_model(self, ids, count):
        drafts = []
        for _ in range(count):
            drafts.append(int(self.logits(ids + drafts)[-1].argmax()))
        return drafts

    def pard(self, ids, count):
        return self.logits(ids + [PARD_TOKEN] * (count - 1))[-count:].argmax(axis=1).tolist()


@pytest.mark.parametrize("method", ["draft_model", "pard"])
@pytest.mark.parametrize("cache", CACHES)
def test_drafts_are_the_draft_models(llm, other, method, cache):
    """Through a life of several texts: drafts that are taken up, in part or not; texts that come, go and come back."""
    proposer, expected = speculator(llm, method, draft_of(other, pard_token=PARD_TOKEN), cache), Alone(other)
    generator = np.random.default_rng(0)
    texts = [Words(generator.integers(3, VOCABULARY, length)) for length in (1, 5, 40, 90)]
    for step in range(12):
        asked = [text for text in texts if generator.random() < 0.8] or texts[:1]
        counts = generator.integers(1, 6, len(asked)).tolist()
        drafts = proposer.propose(asked, counts)
        assert drafts == [getattr(expected, method)(*each) for each in zip((t.ids for t in asked), counts, strict=True)]
        for text, more in zip(asked, drafts, strict=True):
            text.ids += [*more[: generator.integers(0, len(more) + 1)], int(generator.integers(3, VOCABULARY))]
        if step == 5:
            proposer.forget(texts[2])
        if step == 7:
            proposer.forget(texts[0])
            texts[0] = Words([*texts[1].ids[:7], 5, 6], origin=texts[1])
    for text in texts:
        proposer.forget(text)
        proposer.forget(text)
    assert proposer.cache.stats().used_tokens == 0


@pytest.mark.parametrize("method", ["draft_model", "pard"])
def test_drafts_where_nothing_was_accepted(llm, other, method):
    """As after a step that was interrupted: the same drafts again."""
    proposer = speculator(llm, method, draft_of(other, pard_token=PARD_TOKEN))
    text = Words(range(3, 20))
    first = proposer.propose([text], [4])
    assert proposer.propose([text], [4]) == first
    assert proposer.propose([text], [1]) == [first[0][:1]]


@pytest.mark.parametrize("method", ["draft_model", "pard"])
def test_long_prompts_are_read_in_pieces(llm, other, method, monkeypatch):
    """What was read need not be read with the drafts."""
    proposer, expected = speculator(llm, method, draft_of(other, pard_token=PARD_TOKEN)), Alone(other)
    generator, forwards, forward = np.random.default_rng(0), [], other.model.forward

    def counted(tokens, placement, cache):
        forwards.append(len(tokens))
        return forward(tokens, placement, cache)

    one, two, near = (Words(generator.integers(3, VOCABULARY, length)) for length in (200, 300, NEARBY))
    with monkeypatch.context() as patch:
        patch.setattr(other.model, "forward", counted)
        assert [proposer.unread(text) for text in (one, two, near)] == [200, 300, 0]
        for left in ([100, 300], [0, 299], [0, 199], [0, 99], [0, 0], [0, 0]):
            proposer.read([one, two], 100)
            assert [proposer.unread(text) for text in (one, two)] == left
        assert forwards == [100, 100, 100, 100, 98]
        forwards.clear()
        drafts = proposer.propose([one, two], [2, 2])
    assert forwards[0] == (2 if method == "draft_model" else 4)
    assert drafts == [getattr(expected, method)(text.ids, 2) for text in (one, two)]
    # Of drafts, those that turned out right are read.
    one.ids += [*drafts[0], *generator.integers(3, VOCABULARY, NEARBY - 1).tolist()]
    assert proposer.unread(one) == (0 if method == "draft_model" else NEARBY + 1)


@pytest.mark.parametrize("method", ["draft_model", "pard"])
@pytest.mark.parametrize("cache", ["PAGED", "SLAB_POOL"])
def test_a_draft_cache_without_room(llm, other, method, cache):
    """The last have no drafts; with room they have."""
    proposer = speculator(llm, method, draft_of(other, pard_token=PARD_TOKEN), cache, capacity=64)
    texts = [Words(range(3 + i, 30 + i)) for i in range(4)]
    expected = Alone(other)
    drafts = proposer.propose(texts, [3] * 4)
    assert drafts[:2] == [getattr(expected, method)(text.ids, 3) for text in texts[:2]]
    assert drafts[2:] == [[], []]
    assert proposer.propose(texts, [3] * 4) == drafts
    proposer.forget(texts[0])
    assert proposer.propose(texts[1:3], [3, 3])[1] == getattr(expected, method)(texts[2].ids, 3)
    with pytest.raises(CacheFull):
        proposer.cache.append([proposer.cache.allocate()], [64])


@pytest.mark.parametrize("method", ["draft_model", "pard"])
def test_the_end_of_the_draft_models_context(llm, other, method):
    proposer = speculator(llm, method, draft_of(other, pard_token=PARD_TOKEN))
    longest = other.model.max_positions
    ids = np.random.default_rng(0).integers(3, VOCABULARY, longest + 5).tolist()
    text = Words(ids[: longest - 2])
    counts = []
    for length in range(longest - 2, longest + 3):
        text.ids = ids[:length]
        drafts = proposer.propose([text], [4])
        while not any(drafts) and length < longest and len(counts) == 0:
            drafts = proposer.propose([text], [4])
        counts.append(len(drafts[0]))
    assert counts == [2, 1, 0, 0, 0]


def test_tokens_that_the_draft_lacks(llm, other):
    """A target's table may be longer than the draft's."""
    proposer = speculator(llm, "draft_model", draft_of(other))
    assert len(proposer.propose([Words([5, VOCABULARY + 7, 6])], [3])[0]) == 3


def test_drafts_with_a_temperature(llm, other):
    """Drawn with the numbers of the places that they are for."""
    row = SamplingParams(temperature=1.0, top_k=5).with_defaults({}).row()
    proposer = speculator(llm, "draft_model", draft_of(other))
    drafts = proposer.propose([Words(range(3, 20), row)], [3])[0]
    model, ids = Alone(other), list(range(3, 20))
    for draft, uniform in zip(drafts, (0.25, 0.35, 0.45), strict=True):
        logits = model.logits(ids)[-1].astype(np.float64)
        kept = np.sort(np.argsort(-logits)[:5])
        mass = np.exp(logits[kept] - logits.max()).cumsum()
        assert draft == kept[np.searchsorted(mass, uniform * mass[-1], side="right")]
        ids.append(draft)


def test_forks_take_what_the_first_text_has(llm, other, monkeypatch):
    """The texts of one request: the prompt is read once."""
    proposer = speculator(llm, "draft_model", draft_of(other), "DYNAMIC")
    first = Words(range(3, 150))
    proposer.propose([first], [3])
    forward, tokens = other.model.forward, []

    def counted(given, placement, cache):
        tokens.extend(given.tolist())
        return forward(given, placement, cache)

    second = Words([*range(3, 150), 9], origin=first)
    monkeypatch.setattr(other.model, "forward", counted)
    assert len(proposer.propose([second], [1])[0]) == 1
    assert tokens == [9]


# --- the oracle ---


def test_oracle(llm):
    oracle = Oracle(SpeculativeConfig(method="ngram", num_tokens=8), llm.model, probability=0.7)
    whole = np.random.default_rng(0).integers(3, VOCABULARY, 4000).tolist()
    oracle.knows = [[1, 2, 3], whole]
    text, right, drafted = Words(whole[:5]), 0, 0
    for length in range(5, 3900, 8):
        text.ids = whole[:length]
        (drafts,) = oracle.propose([text], [8])
        right += sum(a == b for a, b in zip(drafts, whole[length:], strict=False))
        drafted += len(drafts)
    assert right / drafted == pytest.approx(0.7, abs=0.03)  # 4 σ of 3900 draws
    assert oracle.propose([Words([9, 9])], [8]) == [[]]


# --- configuration, and what others register ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", r"speculative is '\{'; it must be such as"),
        ("[1]", "it must be such as"),
        ({}, "it must name a method"),
        ({"method": "magic"}, "method of speculative is 'magic'; it must be draft_model, "),
        ({"method": "ngram", "num_tokens": 0}, "num_tokens of speculative is 0; it must be an integer, at least 1"),
        ({"method": "ngram", "cache": "LRU"}, "cache of speculative is 'LRU'; it must be SLAB_POOL, "),
        ({"method": "ngram", "num_tokens": True}, "num_tokens of speculative is True"),
        ({"method": "ngram", "adaptive": 1}, "adaptive of speculative is 1; it must be true or false"),
        ({"method": "ngram", "model": "x"}, "model of speculative is 'x'; the method ngram has none"),
        ({"method": "pard"}, "model of speculative is None; the method pard needs the name of one"),
        (
            {"method": "ngram", "k": 3},
            "k is no option of speculative ngram; they are method, model, .*longest, shortest",
        ),
        ({"method": "ngram", "longest": "3"}, "longest of speculative is '3'; it must be a number above 0"),
    ],
)
def test_what_can_not_be(given, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.parse(given)


def test_as_json_or_mapping():
    assert SpeculativeConfig.parse(None) is None
    config = SpeculativeConfig.parse('{"method": "ngram", "num_tokens": 3, "longest": 6}')
    assert config == SpeculativeConfig.parse({"method": "ngram", "num_tokens": 3, "longest": 6})
    assert (config.option("longest"), config.option("shortest")) == (6, 2)
    assert SpeculativeConfig.parse(config) is config


def test_a_proposer_from_outside(directory, monkeypatch):
    """Registered by name, with an option of its own."""

    class Repeat(Proposer):
        OPTIONS = {"token": 7}  # noqa: RUF012
        made = []  # noqa: RUF012

        def __init__(self, config, target, draft=None, cache=None):
            self.token = config.option("token")
            self.made.append(self)

        def propose(self, texts, counts):
            return [[self.token] * count for count in counts]

    monkeypatch.setitem(PROPOSERS, "repeat", Repeat)
    llm = LLM(directory, kv_cache_bytes=4 << 20, speculative={"method": "repeat", "token": 9, "adaptive": False})
    plain = LLM(directory, kv_cache_bytes=4 << 20)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    one, other = (each.generate([[5, 6]], params)[0] for each in (llm, plain))
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert Repeat.made[0].token == 9
    assert one.metrics.drafted == llm.stats().speculation.drafted > 100
    assert plain.stats().speculation == SpeculationStats()
    assert other.metrics.mean_accepted_length is None


# --- loading ---


@pytest.fixture(scope="module")
def pard_directory(other_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("pard")
    shutil.copytree(other_directory, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pard_token": PARD_TOKEN}))
    return path


def test_models_are_loaded_and_share_a_budget(directory, pard_directory):
    """As many tokens in one cache as in the other; either model has its own dtype."""
    speculative = {"method": "pard", "model": str(pard_directory), "num_tokens": 40, "adaptive": False}
    engine = load_engine(directory, "float32", 4 << 20, "PAGED", 16, speculative=speculative | {"dtype": "bfloat16"})
    proposer = engine.scheduler.speculation.proposer
    assert (str(engine.model.dtype), str(proposer.model.dtype)) == ("float32", "bfloat16")
    target, draft = engine.cache.stats(), proposer.cache.stats()
    assert abs(target.capacity_tokens - draft.capacity_tokens) <= 16
    assert 0.99 * (4 << 20) < target.capacity_bytes + draft.capacity_bytes <= 4 << 20
    llm = LLM(directory, dtype="float32", kv_cache_bytes=4 << 20)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    expected = llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    llm.engine = engine
    output = llm.generate([[5, 6, 7]], params)[0]
    assert output.outputs[0].token_ids == expected
    assert output.metrics.drafted > 60
    assert output.metrics.verifications < 60


def test_a_draft_that_is_no_pard_draft(directory, other_directory):
    speculative = {"method": "pard", "model": str(other_directory)}
    with pytest.raises(ModelError, match=r"pard_token in the config.json of .* is None; it must be a token below 267"):
        load_engine(directory, kv_cache_bytes=4 << 20, speculative=speculative)


def test_a_draft_of_other_tokens(directory, tmp_path):
    write_model(tmp_path, vocab_size=300)
    speculative = {"method": "draft_model", "model": str(tmp_path)}
    engine = load_engine(directory, kv_cache_bytes=4 << 20, speculative=speculative)  # the same tokens, more rows
    assert engine.scheduler.speculation is not None
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["h"], vocabulary["q"] = vocabulary["q"], vocabulary["h"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"token \d+ is b'q' for the draft .*, and b'h' for the model: a draft needs"):
        load_engine(directory, kv_cache_bytes=4 << 20, speculative=speculative)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"the draft .* has 300 tokens, and the model 267: a draft needs the model's own"
    ):
        load_engine(directory, kv_cache_bytes=4 << 20, speculative=speculative)
    write_tokenizer(tmp_path)


def test_what_is_wrong_is_said_before_a_model_is_read(tmp_path):
    with pytest.raises(ValueError, match="method of speculative is 'magic'"):
        LLM(tmp_path / "nothing", speculative={"method": "magic"})
