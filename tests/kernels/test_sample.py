from statistics import NormalDist

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pace.kernels import reference
from pace.reference.sample import SAMPLING_DTYPE, Bias, History, penalised

from .arrays import F32, SIZES, assert_same_refusal, draw, misaligned, rng, spaced_rows, swapped, threads

sample = reference("sample")

# float32 weights are within 2^-23 of exact ones, so no boundary of the cumulative distribution moves by more.
BOUNDARY = 2**-22
# A logarithm of a float64 sum of such weights, and one rounding of a number below 128.
LOGPROB_ATOL = 1e-5
# transformers' cumulative probabilities come from float32 softmaxes, one a filter.
TRANSFORMERS_BOUNDARY = 1e-5

OFF = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1}
GREEDY = {"temperature": 0}
FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.1, "top_k": 3},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.02},
    {"min_p": 1},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    {"typical_p": 0.1},
    {"typical_p": 0.9},
    {"temperature": 2, "typical_p": 0.9999},
    {"top_k": 40, "typical_p": 0.5},
    {"min_p": 0.02, "typical_p": 0.6},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7},
]


@pytest.fixture(params=["reference", "native"])
def form(request, native):
    """Each form in turn, for what is compared with something else than the twin."""
    return sample if request.param == "reference" else native("sample")


def params_of(rows, **fields):
    params = np.zeros(rows, SAMPLING_DTYPE)
    for name, value in (OFF | fields).items():
        params[name] = value
    return params


def ragged(kind, *rows):
    """History or Bias from a dict a row, of what goes with each id."""
    dtype = np.int32 if kind is History else np.float32
    ids = np.array([i for row in rows for i in row], np.int32)
    values = np.array([value for row in rows for value in row.values()], dtype)
    return kind(ids, values, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def drawn_history(generator, rows, vocab):
    return ragged(
        History,
        *(
            {int(i): int(generator.integers(4)) for i in generator.permutation(vocab)[: generator.integers(20)]}
            for _ in range(rows)
        ),
    )


def drawn_bias(generator, rows, vocab):
    return ragged(
        Bias,
        *(
            {int(i): float(generator.choice([-np.inf, -2.5, 3])) for i in generator.permutation(vocab)[: vocab // 3]}
            for _ in range(rows)
        ),
    )


def masks(vocab, *rows, past=0):
    """A mask a row, of the ids that it allows; the bits past the vocabulary are `past`."""
    bits = np.full((len(rows), -(-vocab // 32) * 32), past, np.uint8)
    bits[:, :vocab] = 0
    for mask, ids in zip(bits, rows, strict=True):
        mask[list(ids)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)


def drawn_masks(generator, rows, vocab):
    """Masks that allow few tokens, half, nearly all, all and none, in turn."""
    shares = [0.02, 0.5, 0.98, 1, 0]
    return masks(
        vocab,
        *(np.flatnonzero(generator.random(vocab) < shares[row % len(shares)]) for row in range(rows)),
        past=int(generator.integers(2)),
    )


def assert_same(actual, expected):
    assert np.array_equal(actual.tokens, expected.tokens)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            if mine.dtype == F32:
                np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=LOGPROB_ATOL)
            else:
                assert np.array_equal(mine, theirs)


# The twins. Seeds are fixed and no uniform happens to lie on a boundary, so tokens are compared with ==.


@pytest.mark.parametrize("fields", [GREEDY, *FILTERS], ids=str)
@pytest.mark.parametrize("vocab", [*SIZES, 3000])
def test_twins_agree(native, vocab, fields):
    generator = rng(vocab)
    x, params, uniforms = draw(generator, (5, vocab), scale=3), params_of(5, **fields), generator.random(5)
    for n in (None, 0, min(vocab, 7)):
        assert_same(native("sample")(x, params, uniforms, num_logprobs=n), sample(x, params, uniforms, num_logprobs=n))


@pytest.mark.parametrize("fields", [GREEDY, *FILTERS], ids=str)
def test_twins_agree_on_a_real_vocabulary(native, fields):
    generator = rng(11)
    x, params, uniforms = draw(generator, (2, 128256), scale=3), params_of(2, **fields), generator.random(2)
    assert_same(native("sample")(x, params, uniforms, num_logprobs=5), sample(x, params, uniforms, num_logprobs=5))


@pytest.mark.parametrize("fields", [GREEDY, *FILTERS], ids=str)
@pytest.mark.parametrize("vocab", [*SIZES, 63, 64, 65, 3000])
def test_twins_agree_under_masks(native, vocab, fields):
    generator = rng(vocab, 1)
    x, params, uniforms = draw(generator, (10, vocab), scale=3), params_of(10, **fields), generator.random(10)
    history, bias = drawn_history(generator, 10, vocab), drawn_bias(generator, 10, vocab)
    params["frequency_penalty"][::2] = 0.5
    mask = drawn_masks(generator, 10, vocab)
    with_mask = native("sample")(x, params, uniforms, history, bias, 1, allowed=mask)
    assert_same(with_mask, sample(x, params, uniforms, history, bias, 1, allowed=mask))
    assert_same(native("sample")(x, params, uniforms, allowed=mask), sample(x, params, uniforms, allowed=mask))
    assert_same(  # rows of the mask that are further apart, or the same one
        native("sample")(x, params, uniforms, history, bias, 1, np.pad(mask, ((0, 0), (0, 3)))[:, :-3]), with_mask
    )
    shared = np.broadcast_to(mask[1], mask.shape)
    assert_same(
        native("sample")(x, params, uniforms, None, None, 1, shared), sample(x, params, uniforms, None, None, 1, shared)
    )


@pytest.mark.parametrize("fields", [GREEDY, {"typical_p": 0.9}, {"top_p": 0.9, "typical_p": 0.5}], ids=str)
def test_twins_agree_under_masks_of_a_real_vocabulary(native, fields):
    generator = rng(12)
    x, params, uniforms = draw(generator, (5, 128256), scale=3), params_of(5, **fields), generator.random(5)
    mask = drawn_masks(generator, 5, 128256)
    actual = native("sample")(x, params, uniforms, allowed=mask, num_logprobs=2)
    assert_same(actual, sample(x, params, uniforms, allowed=mask, num_logprobs=2))


@pytest.mark.parametrize("vocab", [17, 1000, 5000])
@pytest.mark.parametrize("top_k", [1, 5, 100, 3000])
@pytest.mark.parametrize(("top_p", "typical_p"), [(1, 1), (0.9, 1), (1, 0.3), (0.9, 0.6)])
def test_twins_agree_on_many_ties(native, vocab, top_k, top_p, typical_p):
    generator = rng(vocab, top_k)
    x = generator.integers(-2, 3, (40, vocab)).astype(np.float32)
    x[x == 0] *= generator.choice([-1, 1], (x == 0).sum())  # -0 ties with 0
    params, uniforms = params_of(40, top_k=top_k, top_p=top_p, typical_p=typical_p), generator.random(40)
    assert_same(native("sample")(x, params, uniforms, num_logprobs=3), sample(x, params, uniforms, num_logprobs=3))


@settings(max_examples=60)
@hypothesis.given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1, 5, 50]),
    temperature=st.sampled_from([0, 1e-30, 0.2, 1, 3]) | st.floats(2**-10, 2**6, width=32),
    top_k=st.integers(-1, 4000),
    top_p=st.floats(0, 1, width=32),
    min_p=st.sampled_from([0, 1]) | st.floats(0, 1, width=32),
    typical_p=st.just(1) | st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0.5, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    n=st.none() | st.integers(0, 20),
    with_mask=st.booleans(),
    with_given=st.booleans(),
)
def test_twins_agree_on_drawn_parameters(native, rows, vocab, seed, scale, n, with_mask, with_given, **fields):
    generator = rng(seed)
    x, params = draw(generator, (rows, vocab), scale=scale), params_of(rows, **fields)
    history, bias = drawn_history(generator, rows, vocab), drawn_bias(generator, rows, vocab)
    allowed = drawn_masks(generator, rows, vocab) if with_mask else None
    given = generator.integers(-1, vocab, rows, np.int32) * generator.integers(0, 2, rows, np.int32)
    rest = history, bias, n if n is None else min(n, vocab), allowed, given if with_given else None
    # Seeds are free: a token must be that of a uniform, and a top_p and typical_p, within the boundaries' rounding.
    # That two shifts meet where typical_p cuts was not seen in 300,000 rows.
    uniforms = generator.uniform(BOUNDARY, 1 - BOUNDARY, rows)
    actual = native("sample")(x, params, uniforms, *rest)
    near = [sample(x, params, uniforms + shift, *rest) for shift in (0, -BOUNDARY, BOUNDARY)]
    for name in ("top_p", "typical_p"):
        for shift in (-BOUNDARY, BOUNDARY):
            moved = params.copy()
            moved[name] = np.clip(params[name] + shift, 0, 1)
            near.append(sample(x, moved, uniforms, *rest))
    assert np.any([actual.tokens == other.tokens for other in near], axis=0).all()
    if np.array_equal(actual.tokens, near[0].tokens):
        assert_same(actual, near[0])


@pytest.mark.parametrize("fields", [GREEDY, *FILTERS], ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, fields):
    generator = rng(1)
    x, params, uniforms = draw(generator, (60, 2500), scale=3), params_of(60, **fields), generator.random(60)
    mask, given = drawn_masks(generator, 60, 2500), np.full(60, -1, np.int32)
    given[::7] = 5
    for more in ((4,), (4, mask, given)):
        with threads(1):
            alone = [
                native("sample")(*(each[i : i + 1] for each in (x, params, uniforms)), None, None, more[0],
                                 *(each[i : i + 1] for each in more[1:]))
                for i in range(60)
            ]  # fmt: skip
        with threads(3):
            together = native("sample")(x, params, uniforms, None, None, *more)
        for field, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert np.array_equal(field, np.concatenate(parts), equal_nan=field.dtype == F32)


@pytest.mark.parametrize("vocab", SIZES)
def test_reads_only_its_rows_and_modifies_nothing(native, vocab):
    generator = rng(vocab)
    x, params, uniforms = draw(generator, (4, vocab)), params_of(4, frequency_penalty=1), generator.random(4)
    history, bias = drawn_history(generator, 4, vocab), drawn_bias(generator, 4, vocab)
    spaced = spaced_rows(x)  # a NaN that is read gives token -1
    spaced.setflags(write=False)
    mask = np.full((4, -(-vocab // 32) + 2), -1, np.int32)  # that is read allows more than there is
    mask[:, :-2] = drawn_masks(generator, 4, vocab)
    mask.setflags(write=False)
    for allowed in (None, mask[:, :-2]):
        actual = native("sample")(spaced, params, uniforms, history, bias, 1, allowed)
        assert_same(actual, sample(x, params, uniforms, history, bias, 1, allowed))
    assert np.array_equal(spaced, x)


# Both forms against the rest of the world.


FIELDS = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.7, "repetition_penalty": 1.7}


def as_transformers(names, vocab, **fields):
    """transformers' processors of these names, in its order, and the arguments that ask the same of `sample`: params,
    history, bias and allowed, of one row. frequency_penalty and presence_penalty, which it lacks, are vLLM's formula.
    """
    fields = FIELDS | fields
    tokens = [int(i) for i in rng(9).permutation(vocab)]
    seen, biased = tokens[: vocab // 2], {i: (-1.5, 2)[i % 2] for i in tokens[vocab // 3 : 2 * vocab // 3]}
    bad, ends, may = tokens[vocab // 3 :][:1], tokens[-1:], tokens[vocab // 4 :]
    counts = torch.zeros(1, vocab)
    counts[0, seen] = torch.arange(len(seen)).float() % 3  # none where only the prompt has it
    processors = {
        "bias": SequenceBiasLogitsProcessor({(i,): float(value) for i, value in biased.items()}),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]),
        "frequency_penalty": lambda _, scores: scores - 0.25 * counts,
        "presence_penalty": lambda _, scores: scores - 0.5 * (counts > 0),
        "bad words": NoBadWordsLogitsProcessor([[i] for i in bad]),
        "min_tokens": MinNewTokensLengthLogitsProcessor(len(seen), 1, ends),
        "mask": PrefixConstrainedLogitsProcessor(lambda batch, prompt: may, 1),
        "temperature": TemperatureLogitsWarper(float(fields["temperature"])),
        "top_k": TopKLogitsWarper(min(fields["top_k"], vocab)) if fields["top_k"] > 0 else None,
        "top_p": TopPLogitsWarper(float(fields["top_p"])),
        "min_p": MinPLogitsWarper(float(fields["min_p"])),
        "typical_p": TypicalLogitsWarper(float(fields["typical_p"])) if fields["typical_p"] < 1 else None,
    }
    assert set(names) <= processors.keys()
    chain = [processor for name, processor in processors.items() if name in names]
    penalties = {"frequency_penalty": 0.25, "presence_penalty": 0.5}
    params = params_of(1, **{name: value for name, value in (fields | penalties).items() if name in names})
    history = {i: int(counts[0, i]) for i in seen}
    bias = biased if "bias" in names else {}
    for name, ids in (("bad words", bad), ("min_tokens", ends)):
        bias = bias | dict.fromkeys(ids if name in names else [], -np.inf)
    allowed = masks(vocab, may) if "mask" in names else None
    return (
        lambda x: LogitsProcessorList(chain)(torch.tensor([seen]), torch.from_numpy(x.copy())),
        (params, ragged(History, history), ragged(Bias, bias), allowed),
    )


ALL = ["bias", "frequency_penalty", "presence_penalty", "bad words", "min_tokens", "mask", *FIELDS]


def draws(form, x, uniforms, params, history, bias, allowed):
    """The tokens of one row, (1, vocab), for many uniforms."""
    rows = len(uniforms)
    many = [
        kind(np.tile(ids, rows), np.tile(values, rows), np.arange(rows + 1) * len(ids))
        for kind, (ids, values, _) in ((History, history), (Bias, bias))
    ]
    allowed = None if allowed is None else np.broadcast_to(allowed, (rows, allowed.shape[1]))
    return form(
        np.broadcast_to(x, (rows, x.shape[1])), np.repeat(params, rows), uniforms, *many, allowed=allowed
    ).tokens


def assert_same_distribution(form, x, scores, arguments):
    """Every token's part of the unit interval begins and ends where that of the softmax of the scores does, so the same
    tokens are kept, with the same probabilities.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)[0].numpy()
    edges = np.unique(np.concatenate([[0], cumulative]))
    uniforms = np.concatenate(
        [(edges[1:] + edges[:-1]) / 2, *(edges + 1.5 * s * TRANSFORMERS_BOUNDARY for s in (-1, 1))]
    )
    uniforms = uniforms[(uniforms > 0) & (uniforms < cumulative[-1])]
    uniforms = uniforms[np.abs(uniforms[:, None] - edges).min(axis=1) > TRANSFORMERS_BOUNDARY]
    tokens = draws(form, x, uniforms, *arguments)
    assert np.array_equal(tokens, np.searchsorted(cumulative, uniforms, side="right"))
    kept = scores[0].numpy() > -np.inf
    assert kept[tokens].all()
    assert set(np.flatnonzero(np.diff(cumulative, prepend=0) > 3 * TRANSFORMERS_BOUNDARY)) <= set(tokens)


def without_ties(vocab):
    """A row of logits; where some are equal, transformers' top-k keeps all."""
    return draw(rng(vocab), (1, vocab), scale=2) + np.arange(vocab, dtype=F32) * 1e-4


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [50, 700])
def test_draws_from_the_distribution_of_transformers(form, vocab, fields):
    x = without_ties(vocab)
    processed, arguments = as_transformers(fields, vocab, **fields)
    assert_same_distribution(form, x, processed(x), arguments)


@pytest.mark.parametrize("names", [*([name] for name in ALL), ALL], ids="+".join)
@pytest.mark.parametrize("vocab", [50, 700])
def test_each_processor_and_all_together_are_those_of_transformers(form, vocab, names):
    x = without_ties(vocab)
    processed, arguments = as_transformers(names, vocab, temperature=3, top_k=vocab // 4, top_p=0.8, min_p=0.1)
    scores = processed(x)
    assert not torch.equal(scores, torch.from_numpy(x))
    assert (scores > -np.inf).sum() > 2
    assert_same_distribution(form, x, scores, arguments)


def test_typical_may_drop_the_most_probable_token(form):
    # A third of the mass in one token, the rest in 100: the entropy is closer to the rare ones'.
    x = np.zeros((1, 101), F32)
    x[0, 60] = np.log(50)
    arguments = params_of(1, typical_p=0.4), ragged(History, {}), ragged(Bias, {}), None
    assert set(draws(form, x, (np.arange(1000) + 0.5) / 1000, *arguments)) == set(range(101)) - {60}


def test_repetition_penalty_is_that_of_transformers(form):
    generator = rng(3)
    x = draw(generator, (1, 300), scale=3)
    seen = generator.permutation(300)[:250]
    scores = RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(seen)[None], torch.from_numpy(x.copy())).numpy()
    history = ragged(History, {int(i): 0 for i in seen})
    assert np.array_equal(penalised(x[0], params_of(1, repetition_penalty=1.7)[0], history[:2], None), scores[0])
    uniforms = generator.random(200)
    repeated = History(np.tile(history[0], 200), np.tile(history[1], 200), np.arange(201, dtype=np.int64) * 250)
    actual = form(np.repeat(x, 200, axis=0), params_of(200, repetition_penalty=1.7), uniforms, repeated)
    expected = form(np.repeat(scores, 200, axis=0), params_of(200), uniforms)
    assert np.array_equal(actual.tokens, expected.tokens)


def test_frequency_and_presence_count_the_output_only(form):
    # After penalties: 9 - 3·2 - 1 = 2; 8 (in the prompt only); 7 - 2 - 1 = 4; 6.
    x = np.array([[9, 8, 7, 6]], np.float32)
    history = ragged(History, {0: 3, 1: 0, 2: 1})
    order = [1, 3, 2, 0]
    params = params_of(1, temperature=0, frequency_penalty=2, presence_penalty=1)
    for last in range(4):
        bias = ragged(Bias, dict.fromkeys(order[:last], -np.inf))
        assert form(x, params, history=history, bias=bias).tokens == order[last]


def test_bias_comes_before_the_repetition_penalty(form):
    # (-1 + 3) / 2 = 1 beats 0.9; -1 · 2 + 3 = 1 would too, (1 - 3) · 2 = -4 loses to -3, 1 / 2 - 3 would not.
    params = params_of(1, temperature=0, repetition_penalty=2)
    history = ragged(History, {0: 1})
    assert form(np.array([[-1, 0.9]], F32), params, history=history, bias=ragged(Bias, {0: 3})).tokens == 0
    assert form(np.array([[1, -3]], F32), params, history=history, bias=ragged(Bias, {0: -3})).tokens == 1


def test_logprobs_are_those_of_the_unmodified_logits(form):
    generator = rng(5)
    x = draw(generator, (20, 1500), scale=4)
    params = params_of(20, temperature=0.5, top_k=50, repetition_penalty=1.3)
    history, bias = drawn_history(generator, 20, 1500), drawn_bias(generator, 20, 1500)
    result = form(x, params, generator.random(20), history, bias, 20)
    expected = torch.from_numpy(x).double().log_softmax(-1).numpy()
    order = np.argsort(-x, axis=1, kind="stable")
    picked = np.take_along_axis(expected, result.tokens[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(result.logprobs, picked, rtol=1e-6, atol=LOGPROB_ATOL)
    assert np.array_equal(result.top_tokens, order[:, :20])
    np.testing.assert_allclose(
        result.top_logprobs, np.take_along_axis(expected, order[:, :20], axis=1), rtol=1e-6, atol=LOGPROB_ATOL
    )
    assert np.array_equal(np.take_along_axis(order, result.ranks[:, None] - 1, axis=1)[:, 0], result.tokens)


SIGNIFICANCE = 1e-4  # a correct draw's chance to be refused; the seeds are fixed, so it is refused always or never


def chi_square(tokens, probabilities):
    """Pearson's statistic over the tokens that can be drawn; infinity if another was."""
    seen, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    possible = expected > 0
    assert expected[possible].min() > 5  # else it is not distributed as chi-square
    if seen[~possible].any():
        return np.inf
    return ((seen - expected)[possible] ** 2 / expected[possible]).sum()


def critical_value(freedom):
    """What chi-square exceeds with the probability SIGNIFICANCE, by the formula of Wilson and Hilferty (1931): its cube
    root is nearly normal. It errs to the lenient side: 19.29 for 2 degrees of freedom, which should be 18.42.
    """
    quantile, spread = NormalDist().inv_cdf(1 - SIGNIFICANCE), 2 / (9 * freedom)
    return freedom * (1 - spread + quantile * spread**0.5) ** 3


# Of the filters that keep the largest, all of which are in ALL, min_p is either the last that bites or does not.
CHAINS = {
    "nothing": ([], 1, []),
    **{name: ([name], 0.5, [name]) for name in ALL},
    "all but min_p bite": (ALL, 0.2, [name for name in ALL if name != "min_p"]),
    "min_p bites": (ALL, 0.65, ["min_p"]),
}


def probabilities_and_arguments(names, min_p):
    x = rng(1).permutation(np.linspace(0, 3, 12, dtype=F32))[None]
    processed, arguments = as_transformers(names, 12, temperature=3, top_k=6, top_p=0.8, min_p=min_p)
    return x, processed(x)[0].double().softmax(-1).numpy(), arguments


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.native_speed
def test_draws_follow_the_distribution(form, chain):
    names, min_p, biting = CHAINS[chain]
    x, probabilities, arguments = probabilities_and_arguments(names, min_p)
    tokens = draws(form, x, rng(2).random(20000), *arguments)
    assert chi_square(tokens, probabilities) < critical_value(np.count_nonzero(probabilities) - 1)
    for left_out in biting:  # tokens of a draw that lacks a step would be refused
        _, others, _ = probabilities_and_arguments([name for name in names if name != left_out], min_p)
        assert chi_square(tokens, others) > critical_value(np.count_nonzero(others) - 1)


@pytest.mark.parametrize("chain", ["nothing", "all but min_p bite"])
@pytest.mark.native_speed
def test_a_draw_that_is_wrong_does_not_follow_the_distribution(form, chain):
    names, min_p, _ = CHAINS[chain]
    x, probabilities, arguments = probabilities_and_arguments(names, min_p)
    bent = rng(2).random(20000) ** 1.1  # wrong by 3 % in the middle
    tokens = draws(form, x, bent, *arguments)
    assert chi_square(tokens, probabilities) > critical_value(np.count_nonzero(probabilities) - 1)


# Ties, ends and rows without a distribution.


def test_ties_go_to_the_lower_id(form):
    x = np.full((1, 50), 1, np.float32)
    x[0, [7, 20, 33]] = 2
    assert form(x, params_of(1, temperature=0)).tokens == 7
    uniforms = (np.arange(100) + 0.5) / 100
    many = np.repeat(x, 100, axis=0)
    assert set(form(many, params_of(100, top_k=2), uniforms).tokens) == {7, 20}
    assert set(form(many, params_of(100, top_k=5), uniforms).tokens) == {0, 1, 7, 20, 33}
    equal = np.zeros((100, 50), np.float32)  # weights of 1 exactly: mass 25 is reached by the 25th
    assert set(form(equal, params_of(100, top_p=0.5), uniforms).tokens) == set(range(25))
    assert set(form(equal, params_of(100, top_k=10, top_p=0.5), uniforms).tokens) == set(range(5))
    assert form(x, params_of(1, temperature=0), num_logprobs=5).top_tokens.tolist() == [[7, 20, 33, 0, 1]]


def test_typical_keeps_all_that_tie_with_the_last(form):
    def kept(x, typical_p, **fields):
        x = np.repeat(x[None], 200, axis=0)
        return set(form(x, params_of(200, typical_p=typical_p, **fields), (np.arange(200) + 0.5) / 200).tokens)

    assert kept(np.zeros(50, F32), 0.5) == set(range(50))
    assert kept(np.zeros(50, F32), 0) == set(range(50))
    # Weights of 1 exactly, and c = -2^-28: ten tokens in the middle, ten as far above as ten below.
    x = np.repeat(np.array([-(2**-27), 0, -(2**-28)], F32), 10)
    assert kept(x, 0.3) == set(range(20, 30))
    assert kept(x, 0.34) == set(range(30))
    # 0.2 of the mass, and both of two equal tokens where one would do
    assert kept(np.log(np.array([0.5, 0.2, 0.2, 0.1], F32)), 0.1) == {1, 2}
    assert kept(np.log(np.array([0.5, 0.2, 0.2, 0.1], F32)), 0.1, top_k=2) == {0}
    # What has no weight has no shift either
    assert kept(np.array([-np.inf, 3, -np.inf, -1000], F32), 0) == {1}
    assert kept(np.array([0, 3, 1], F32), 0.5, temperature=1e-30) == {1}


# Masks and given tokens.


def test_a_mask_is_the_same_as_leaving_the_other_tokens_out(form):
    generator = rng(31)
    x, uniforms = draw(generator, (40, 1000), scale=2), generator.random(40)
    ids = np.sort(generator.permutation(1000)[:300])
    for fields in (GREEDY, *FILTERS):
        params = params_of(40, **fields)
        masked = form(x, params, uniforms, allowed=masks(1000, *[ids] * 40))
        assert np.array_equal(masked.tokens, ids[form(np.ascontiguousarray(x[:, ids]), params, uniforms).tokens])


@pytest.mark.parametrize("fields", [GREEDY, {}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}], ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_bits_past_the_vocabulary_are_ignored(form, vocab, fields):
    x, params, uniforms = draw(rng(vocab), (2, vocab)), params_of(2, **fields), np.array([0.1, 0.9])
    assert form(x, params, uniforms, allowed=masks(vocab, [], [], past=1)).tokens.tolist() == [-1, -1]
    last = masks(vocab, [vocab - 1], [vocab - 1], past=1)
    assert form(x, params, uniforms, allowed=last).tokens.tolist() == [vocab - 1] * 2
    unmasked = form(x, params, uniforms)
    for past in (0, 1):
        assert_same(form(x, params, uniforms, allowed=masks(vocab, *[range(vocab)] * 2, past=past)), unmasked)


def test_a_mask_comes_after_the_penalties_and_before_top_k(form):
    x, uniforms = np.array([[4, 3, 2, 1, 0]] * 100, F32), (np.arange(100) + 0.5) / 100
    allowed = masks(5, *[[1, 3, 4]] * 100)
    assert set(form(x, params_of(100, top_k=2), uniforms, allowed=allowed).tokens) == {1, 3}
    # Penalties that raise a logit to infinity leave no distribution, unless the token is not allowed.
    history = ragged(History, *[{0: 3}] * 100)
    params = params_of(100, temperature=0, frequency_penalty=-3e38)
    assert (form(x, params, history=history).tokens == -1).all()
    assert (form(x, params, history=history, allowed=allowed).tokens == 1).all()


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("vocab", [40, 1500])
def test_a_mask_hides_what_it_does_not_allow(form, vocab, hidden):
    x = draw(rng(vocab), (2, vocab))
    x[0, 7] = hidden
    allowed, given = masks(vocab, *[set(range(vocab)) - {7}] * 2), np.full(2, -1, np.int32)
    result = form(x, params_of(2), np.full(2, 0.5), None, None, 2, allowed, given)
    assert np.array_equal(
        result.tokens, form(draw(rng(vocab), (2, vocab)), params_of(2), np.full(2, 0.5), allowed=allowed).tokens
    )
    assert np.isfinite(result.logprobs[1])
    if hidden == -np.inf:
        assert np.isfinite(result.logprobs[0])
        return
    # The log-probabilities are of the unmodified logits, which have none.
    assert np.isnan(result.logprobs[0])
    assert result.ranks[0] == 0
    assert (result.top_tokens[0] == -1).all()
    assert np.isnan(result.top_logprobs[0]).all()


def test_a_given_token_is_taken_and_reported(form):
    generator = rng(41)
    x, uniforms = draw(generator, (30, 700), scale=3), generator.random(30)
    bias = ragged(Bias, *[dict.fromkeys(range(700), -np.inf)] * 15, *[{}] * 15)
    params, allowed = params_of(30, top_k=5, typical_p=0.3), masks(700, *[[3, 50, 600]] * 30)
    given = generator.integers(0, 700, 30, np.int32)
    given[15:] = -1
    result = form(x, params, uniforms, None, bias, 4, allowed, given)
    assert np.array_equal(result.tokens[:15], given[:15])
    assert_same(  # the others draw as ever
        type(result)(*(field[15:] for field in result)),
        form(x[15:], params[15:], uniforms[15:], num_logprobs=4, allowed=allowed[15:]),
    )
    expected = torch.from_numpy(x).double().log_softmax(-1).numpy()
    order = np.argsort(-x, axis=1, kind="stable")
    picked = np.take_along_axis(expected, result.tokens[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(result.logprobs, picked, rtol=1e-6, atol=LOGPROB_ATOL)
    assert np.array_equal(np.take_along_axis(order, result.ranks[:, None] - 1, axis=1)[:, 0], result.tokens)
    assert np.array_equal(result.top_tokens, order[:, :4])
    assert np.array_equal(form(x[:15], params[:15], given=given[:15]).tokens, given[:15])  # without uniforms


@pytest.mark.parametrize("n", [None, 2])
def test_a_row_without_a_distribution_takes_no_given_token(form, n):
    x = draw(rng(6), (4, 50))
    x[0, 20], x[1, 20], x[2] = np.nan, np.inf, -np.inf
    result = form(x, params_of(4), num_logprobs=n, given=np.full(4, 9, np.int32))
    assert result.tokens.tolist() == [-1, -1, -1, 9]
    if n:
        assert result.ranks[:3].tolist() == [0, 0, 0]
        assert np.isnan(result.logprobs[:3]).all()
        assert (result.top_tokens[:3] == -1).all()


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1, 0)])
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_the_ends_of_the_unit_interval_draw_tokens_of_some_mass(form, uniform, fields):
    x = draw(rng(8), (1, 2100), scale=3)
    x[0, :1030], x[0, -1030:] = -np.inf, -np.inf
    token = form(x, params_of(1, **fields), np.array([uniform])).tokens[0]
    assert 1030 <= token < 2100 - 1030


@pytest.mark.parametrize("fields", [GREEDY, {}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("vocab", [5, 33, 1500])
def test_a_row_without_a_distribution_is_reported_alone(form, vocab, fields):
    x = draw(rng(vocab), (6, vocab))
    x[0, vocab - 1], x[1, 2], x[2] = np.nan, np.inf, -np.inf
    everything = ragged(Bias, {}, {}, {}, dict.fromkeys(range(vocab), -np.inf), {1: -np.inf}, {})
    result = form(x, params_of(6, **fields), np.full(6, 0.5), bias=everything, num_logprobs=2)
    assert (result.tokens[:4] == -1).all()
    assert (result.ranks[:4] == 0).all()
    assert (result.top_tokens[:4] == -1).all()
    assert np.isnan(result.logprobs[:4]).all()
    assert np.isnan(result.top_logprobs[:4]).all()
    assert (result.tokens[4:] >= 0).all()
    assert result.tokens[4] != 1
    assert np.isfinite(result.logprobs[4:]).all()


def test_a_vocabulary_or_a_batch_of_nothing(form):
    nothing = np.empty((2, 0), F32), params_of(2), np.zeros(2)
    assert form(*nothing).tokens.tolist() == [-1, -1]
    allowed, given = np.empty((2, 0), np.int32), np.full(2, -1, np.int32)
    assert form(*nothing, allowed=allowed, given=given).tokens.tolist() == [-1, -1]
    result = form(np.empty((0, 9), F32), params_of(0), np.empty(0), num_logprobs=3)
    assert result.tokens.shape == (0,)
    assert result.top_logprobs.shape == (0, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_p", -0.5),
        ("top_p", 1.5),
        ("min_p", 2),
        ("min_p", np.nan),
        ("typical_p", -0.25),
        ("typical_p", 1.5),
        ("typical_p", np.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", np.inf),
        ("frequency_penalty", np.nan),
        ("presence_penalty", -np.inf),
    ],
)
def test_same_refusal_of_parameters(native, field, value):
    params = params_of(3)
    params[field][1] = value
    assert_same_refusal(
        native("sample"), sample, np.ones((3, 8), F32), params, np.zeros(3),
        error=ValueError, match=rf"params\['{field}'\]\[1\] is {float(value)}",
    )  # fmt: skip


def test_same_refusals(native):
    x, params, u = np.ones((2, 8), F32), params_of(2), np.zeros(2)
    history, bias = ragged(History, {1: 2}, {7: 0}), ragged(Bias, {3: 1}, {})

    def refused(match, *args, error=ValueError, **kwargs):
        assert_same_refusal(native("sample"), sample, *args, error=error, match=match, **kwargs)

    refused("logits has dtype float64", x.astype(np.float64), params, u, error=TypeError)
    refused("logits has dtype >f4", swapped(x), params, u, error=TypeError)
    refused("logits is not aligned", misaligned(x), params, u)
    refused("uniforms has dtype >f8", x, params, swapped(u), error=TypeError)
    refused("logits is a list", [[1.0]], params, u, error=TypeError)
    refused(r"logits has shape \(8,\)", x[0], params, u)
    refused("logits has strides", x[:, ::2], params, u)
    refused(r"params has shape \(1,\)", x, params[:1], u)
    refused("params has dtype float32", x, x[:, 0], u, error=TypeError)
    refused("params has strides", x, params_of(4)[::2], u)
    refused("uniforms has dtype float32", x, params, u.astype(F32), error=TypeError)
    refused(r"uniforms has shape \(3,\)", x, params, np.zeros(3))
    refused(r"uniforms\[1\] is 1.0", x, params, np.array([0, 1.0]))
    refused(r"params\['temperature'\]\[0\] is 1.0; it must be 0 without uniforms", x, params)
    mask, given = np.full((2, 2), -1, np.int32), np.array([-1, 3], np.int32)
    wide = np.ones((2, 40), F32)
    refused("allowed has dtype uint32", wide, params, u, allowed=mask.view(np.uint32), error=TypeError)
    refused("allowed has dtype >i4", wide, params, u, allowed=swapped(mask), error=TypeError)
    refused("allowed is a list", wide, params, u, allowed=mask.tolist(), error=TypeError)
    refused("allowed is not aligned", wide, params, u, allowed=misaligned(mask))
    refused(r"allowed has shape \(2, 1\); it must be \(2, 2\)", wide, params, u, allowed=mask[:, :1])
    refused(r"allowed has shape \(1, 2\); it must be \(2, 2\)", wide, params, u, allowed=mask[:1])
    refused(r"allowed has shape \(2,\)", wide, params, u, allowed=mask[0])
    refused("allowed has strides", wide, params, u, allowed=np.full((2, 4), -1, np.int32)[:, ::2])
    refused("given has dtype int64", x, params, u, given=given.astype(np.int64), error=TypeError)
    refused("given is a list", x, params, u, given=given.tolist(), error=TypeError)
    refused(r"given has shape \(1,\)", x, params, u, given=given[:1])
    refused("given has strides", x, params, u, given=np.full(4, -1, np.int32)[::2])
    for token in (-2, 8):
        refused(
            rf"given\[1\] is {token}; it must be within \[-1, 8\)", x, params, u, given=np.array([0, token], np.int32)
        )
    refused(r"params\['temperature'\]\[0\] is 1.0; it must be 0 without uniforms", x, params, given=given)
    refused("num_logprobs is 9", x, params, u, num_logprobs=9)
    refused("num_logprobs is -1", x, params, u, num_logprobs=-1)
    for name, good in (("history", history), ("bias", bias)):
        for ids in ([8], [-1]):
            bad = good._replace(token_ids=np.array(ids * len(good.token_ids), np.int32))
            refused(rf"{name}.token_ids\[0\] is {ids[0]}", x, params, u, **{name: bad})
        for starts, index in (([1, 1, 2], 0), ([0, 2, 1], 2), ([0, 1, 3], 2)):
            bad = good._replace(row_starts=np.array(starts, np.int64))
            refused(rf"{name}.row_starts\[{index}\] is {starts[index]}", x, params, u, **{name: bad})
        bad = good._replace(row_starts=good.row_starts[:2])
        refused(rf"{name}.row_starts has shape \(2,\)", x, params, u, **{name: bad})
        bad = good._replace(token_ids=good.token_ids.astype(np.int64))
        refused(f"{name}.token_ids has dtype int64", x, params, u, error=TypeError, **{name: bad})
    short = history._replace(counts=history.counts[:1])
    refused(r"history.counts has shape \(1,\)", x, params, u, history=short)
    negative = history._replace(counts=np.array([2, -3], np.int32))
    refused(r"history.counts\[1\] is -3", x, params, u, history=negative)
    for value in (np.nan, np.inf):
        bad = bias._replace(values=np.array([value], F32))
        refused(rf"bias.values\[0\] is {value}", x, params, u, bias=bad)
