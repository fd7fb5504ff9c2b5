import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pace.kernels import reference
from pace.reference.sample import SAMPLING_DTYPE, Bias, History, penalised

from .arrays import F32, SIZES, assert_same_refusal, draw, misaligned, rng, spaced_rows, swapped, threads

sample = reference("sample")

# float32 weights are within 2^-23 of exact ones, so no boundary of the cumulative distribution moves by more.
BOUNDARY = 2**-22
# A logarithm of a float64 sum of such weights, and one rounding of a number below 128.
LOGPROB_ATOL = 1e-5

OFF = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
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


@pytest.mark.parametrize("vocab", [17, 1000, 5000])
@pytest.mark.parametrize("top_k", [1, 5, 100, 3000])
@pytest.mark.parametrize("top_p", [1, 0.9])
def test_twins_agree_on_many_ties(native, vocab, top_k, top_p):
    generator = rng(vocab, top_k)
    x = generator.integers(-2, 3, (40, vocab)).astype(np.float32)
    x[x == 0] *= generator.choice([-1, 1], (x == 0).sum())  # -0 ties with 0
    params, uniforms = params_of(40, top_k=top_k, top_p=top_p), generator.random(40)
    assert_same(native("sample")(x, params, uniforms, num_logprobs=3), sample(x, params, uniforms, num_logprobs=3))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1, 5, 50]),
    temperature=st.sampled_from([0, 1e-30, 0.2, 1, 3]) | st.floats(2**-10, 2**6, width=32),
    top_k=st.integers(-1, 4000),
    top_p=st.floats(0, 1, width=32),
    min_p=st.sampled_from([0, 1]) | st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0.5, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    n=st.none() | st.integers(0, 20),
)
def test_twins_agree_on_drawn_parameters(native, rows, vocab, seed, scale, n, **fields):
    generator = rng(seed)
    x, params = draw(generator, (rows, vocab), scale=scale), params_of(rows, **fields)
    history, bias = drawn_history(generator, rows, vocab), drawn_bias(generator, rows, vocab)
    # Seeds are free here: a token must be that of a uniform, and a top_p, within the boundaries' rounding.
    uniforms = generator.uniform(BOUNDARY, 1 - BOUNDARY, rows)
    n = n if n is None else min(n, vocab)
    actual = native("sample")(x, params, uniforms, history, bias, n)
    near = [sample(x, params, uniforms + shift, history, bias, n) for shift in (0, -BOUNDARY, BOUNDARY)]
    for shift in (-BOUNDARY, BOUNDARY):
        moved = params.copy()
        moved["top_p"] = np.clip(params["top_p"] + shift, 0, 1)
        near.append(sample(x, moved, uniforms, history, bias, n))
    assert np.any([actual.tokens == other.tokens for other in near], axis=0).all()
    if np.array_equal(actual.tokens, near[0].tokens):
        assert_same(actual, near[0])


@pytest.mark.parametrize("fields", [GREEDY, *FILTERS], ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, fields):
    generator = rng(1)
    x, params, uniforms = draw(generator, (60, 2500), scale=3), params_of(60, **fields), generator.random(60)
    with threads(1):
        alone = [
            native("sample")(x[i : i + 1], params[i : i + 1], uniforms[i : i + 1], num_logprobs=4) for i in range(60)
        ]
    with threads(3):
        together = native("sample")(x, params, uniforms, num_logprobs=4)
    for field, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(field, np.concatenate(parts))


@pytest.mark.parametrize("vocab", SIZES)
def test_reads_only_its_rows_and_modifies_nothing(native, vocab):
    generator = rng(vocab)
    x, params, uniforms = draw(generator, (4, vocab)), params_of(4, frequency_penalty=1), generator.random(4)
    history, bias = drawn_history(generator, 4, vocab), drawn_bias(generator, 4, vocab)
    spaced = spaced_rows(x)  # a NaN that is read gives token -1
    spaced.setflags(write=False)
    actual = native("sample")(spaced, params, uniforms, history, bias, 1)
    assert_same(actual, sample(x, params, uniforms, history, bias, 1))
    assert np.array_equal(spaced, x)


# Both forms against the rest of the world.


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [50, 700])
def test_draws_from_the_distribution_of_transformers(form, vocab, fields):
    x = draw(rng(vocab), (1, vocab), scale=2) + np.arange(vocab, dtype=F32) * 1e-4  # no ties: transformers keeps all
    chosen = OFF | fields
    warpers = [TemperatureLogitsWarper(float(chosen["temperature"]))] if chosen["temperature"] != 1 else []
    if chosen["top_k"] > 0:
        warpers.append(TopKLogitsWarper(min(chosen["top_k"], vocab)))
    if chosen["top_p"] < 1:
        warpers.append(TopPLogitsWarper(float(chosen["top_p"])))
    if chosen["min_p"] > 0:
        warpers.append(MinPLogitsWarper(float(chosen["min_p"])))
    scores = torch.from_numpy(x)
    for warper in warpers:
        scores = warper(None, scores)
    cumulative = scores.double().softmax(-1).cumsum(-1)[0].numpy()

    uniforms = (np.arange(2000) + 0.5) / 2000
    uniforms = uniforms[np.abs(uniforms[:, None] - cumulative).min(axis=1) > 1e-5]  # float32 softmaxes on the way
    rows = len(uniforms)
    result = form(np.repeat(x, rows, axis=0), params_of(rows, **fields), uniforms)
    assert np.array_equal(result.tokens, np.searchsorted(cumulative, uniforms, side="right"))


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


@pytest.mark.parametrize("fields", [{}, {"top_k": 6}, {"top_p": 0.9}], ids=str)
@pytest.mark.native_speed
def test_draws_follow_the_distribution(form, fields):
    x, rows = np.linspace(0, 3, 10, dtype=np.float32)[None], 20000
    result = form(np.repeat(x, rows, axis=0), params_of(rows, **fields), rng(2).random(rows))
    order = np.arange(10)[::-1]
    mass = np.exp(x[0][order])
    kept = order[: {"top_k": 6}.get(*fields, 10) if "top_k" in fields else 10]
    if "top_p" in fields:
        kept = order[: np.searchsorted(np.cumsum(mass) / mass.sum(), 0.9) + 1]
    expected = np.zeros(10)
    expected[kept] = np.exp(x[0][kept]) / np.exp(x[0][kept]).sum() * rows
    seen = np.bincount(result.tokens, minlength=10)
    assert not seen[expected == 0].any()
    statistic = ((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < 27.9  # the 99.9 % point of chi-square with 9 degrees of freedom, the most there are


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
    assert form(np.empty((2, 0), F32), params_of(2), np.zeros(2)).tokens.tolist() == [-1, -1]
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
