"""Sampling: one token a row from a model's logits, and the log-probabilities that are asked for."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .arrays import Float, check_rows, check_type, check_vector

SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),  # 0 takes the most probable token
        ("top_k", np.int32),  # 0 or less: off
        ("top_p", np.float32),  # 1: off
        ("min_p", np.float32),  # 0: off
        ("typical_p", np.float32),  # 1: off
        ("repetition_penalty", np.float32),  # 1: off
        ("frequency_penalty", np.float32),  # 0: off
        ("presence_penalty", np.float32),  # 0: off
    ]
)

Array = NDArray[Any]
Int = NDArray[np.int32]


class History(NamedTuple):
    """The tokens that each row has seen, row after row; row r's are [row_starts[r], row_starts[r + 1])."""

    token_ids: Array  # (total,) int32: the ids in prompt and output, each once a row
    counts: Array  # (total,) int32: how often each is in the output; 0 where it is in the prompt only
    row_starts: Array  # (rows + 1,) int64


class Bias(NamedTuple):
    """What is added to the logits of a few tokens a row, laid out as in History; -inf bans a token."""

    token_ids: Array  # (total,) int32, each id once a row
    values: Array  # (total,) float32
    row_starts: Array  # (rows + 1,) int64


class Sampled(NamedTuple):
    """What `sample` gives; all but the tokens is None unless log-probabilities were asked for."""

    tokens: Int  # (rows,); -1 where the row had no distribution to draw from
    logprobs: Float | None  # (rows,)
    ranks: Int | None  # (rows,): the token's place in the row, from 1
    top_tokens: Int | None  # (rows, num_logprobs), the most probable first
    top_logprobs: Float | None  # (rows, num_logprobs)


def sample(
    logits: Array,
    params: Array,
    uniforms: Array | None = None,
    history: History | None = None,
    bias: Bias | None = None,
    num_logprobs: int | None = None,
    allowed: Array | None = None,
    given: Array | None = None,
) -> Sampled:
    """Draw one token for each row, by the row's own parameters.

    logits: (rows, vocab) float32, not modified. params: (rows,) SAMPLING_DTYPE. uniforms: (rows,) float64 in [0, 1),
    one a row; not needed where every row that draws has temperature 0. allowed: (rows, ceil(vocab / 32)) int32, any row
    stride, the layout of llguidance's and xgrammar's masks: token i may be drawn if bit i % 32 of word i // 32 is set;
    bits past the vocabulary are ignored. given: (rows,) int32, the token that a row takes instead of drawing, or -1.

    In this order, which is that of transformers' processors and warpers (for the penalties, of vLLM's):

    1. bias         z = x + bias
    2. repetition   z = z / penalty where z > 0, z · penalty elsewhere, for all of the history (Keskar et al., 2019)
    3. frequency    z = z - penalty · count
    4. presence     z = z - penalty where count > 0
    5. mask         z = -inf where the token is not allowed, whatever z was there
    6. temperature  d = (z - max z) / temperature, weight w = e^d. At 0 the token is argmax z
    7. top-k        keeps exactly the k largest z (Fan et al., 2018)
    8. top-p        keeps the fewest tokens, the largest z first, whose mass reaches top_p of what top-k kept; at least
                    one (Holtzman et al., 2019)
    9. min-p        keeps the tokens with w ≥ min_p (the largest w is 1), after top-p (Nguyen et al., 2024)
    10. typical     keeps the fewest tokens, those closest to the entropy first, whose mass reaches typical_p of what
                    min-p kept, and all that are as close as the last of them; at least one (Meister et al., 2022).
                    Tokens of w = 0 are left out. With p = w / Σ w, -log p - entropy = c - d where c = Σ w·d / Σ w, so
                    closest is the smallest shift |d - c|
    11. draw        the first token, in the order of ids, at which the kept mass so far exceeds uniform · (kept mass)

    Among equal z the lower id comes first. z, d, w, w·d, c and the shift are float32, rounded at each operation; masses
    and Σ w·d are summed in float64. So two forms may differ in a token only where a mass meets uniform, top_p or
    typical_p, w meets min_p, or two shifts meet, to within the rounding of w.

    A row whose z holds a NaN or +inf, or nothing but -inf, gives token -1, rank 0, NaN for log-probabilities and -1
    for top tokens; the other rows are not concerned.

    A row whose token is given takes it, whatever its parameters, history, bias and mask say; it gives -1 if its
    unmodified logits hold a NaN or +inf, or nothing but -inf.

    num_logprobs: None for no log-probabilities; else the row's are those of its unmodified logits, log softmax(x) with
    the sum in float64: of the row's token, with its rank (by logit, then by id), and of the num_logprobs largest. Where
    a mask hides a NaN or +inf of the logits, the token is drawn, and the rest is as in a row without a token.

    TypeError for another dtype. ValueError for another shape, rows that are not contiguous, ids outside of the
    vocabulary, and numbers out of range: temperature, the penalties and bias must be finite (bias may be -inf),
    temperature and counts at least 0, repetition_penalty above 0, top_p, min_p and typical_p within [0, 1],
    num_logprobs within [0, vocab], given within [-1, vocab). That the ids of a row are distinct is not checked.
    """
    check(logits, params, uniforms, history, bias, num_logprobs, allowed, given)
    rows = len(logits)
    n = 0 if num_logprobs is None else num_logprobs
    result = Sampled(
        np.full(rows, -1, np.int32),
        np.full(rows, np.nan, np.float32),
        np.zeros(rows, np.int32),
        np.full((rows, n), -1, np.int32),
        np.full((rows, n), np.nan, np.float32),
    )
    assert result.logprobs is not None
    assert result.ranks is not None
    assert result.top_tokens is not None
    assert result.top_logprobs is not None
    for row in range(rows):
        if given is not None and given[row] >= 0:
            token = int(given[row]) if has_distribution(logits[row]) else -1
        else:
            z = penalised(logits[row], params[row], part(history, row), part(bias, row))
            if allowed is not None:
                z = masked(z, allowed[row])
            token = choose(z, params[row], None if uniforms is None else uniforms[row])
        result.tokens[row] = token
        if num_logprobs is not None and token >= 0 and has_distribution(logits[row]):
            logprobs, order = log_softmax(logits[row]), descending(logits[row])
            result.logprobs[row] = logprobs[token]
            result.ranks[row] = np.flatnonzero(order == token)[0] + 1
            result.top_tokens[row] = order[:n]
            result.top_logprobs[row] = logprobs[order[:n]]
    return result if num_logprobs is not None else Sampled(result.tokens, None, None, None, None)


def part(ragged: History | Bias | None, row: int) -> tuple[Array, Array] | None:
    """The ids of a row and what goes with them."""
    if ragged is None:
        return None
    span = slice(*ragged.row_starts[row : row + 2])
    return ragged[0][span], ragged[1][span]


def penalised(
    x: Array, params: np.void, history: tuple[Array, Array] | None, bias: tuple[Array, Array] | None
) -> Float:
    z: Float = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if bias is not None:
            ids, values = bias
            z[ids] += values
        if history is not None:
            ids, counts = history
            seen = z[ids]
            seen = np.where(seen > 0, seen / params["repetition_penalty"], seen * params["repetition_penalty"])
            seen -= params["frequency_penalty"] * counts.astype(np.float32)
            z[ids] = seen - params["presence_penalty"] * (counts > 0).astype(np.float32)
    return z


def masked(z: Float, words: Array) -> Float:
    """-inf in place of each token whose bit is not set."""
    ids = np.arange(z.size)
    allowed = words[ids // 32] >> (ids % 32) & 1
    return np.where(allowed == 1, z, np.float32(-np.inf))


def has_distribution(z: Float) -> bool:
    return not np.isnan(z).any() and bool(np.isfinite(z.max(initial=-np.inf)))


def choose(z: Float, params: np.void, uniform: float | None) -> int:
    """The row's token; -1 where there is none."""
    if not has_distribution(z):
        return -1
    if params["temperature"] == 0:
        return int(np.argmax(z))
    assert uniform is not None
    return draw(z, params, uniform)


def descending(z: Array) -> NDArray[np.intp]:
    """Ids from the largest z to the smallest, the lower id first among equals."""
    return np.argsort(-z, kind="stable")


def draw(z: Float, params: np.void, uniform: float) -> int:
    with np.errstate(over="ignore"):
        d = (z - z.max()) / params["temperature"]
    w = np.exp(d.astype(np.float64)).astype(np.float32)
    order = descending(z)
    if params["top_k"] > 0:
        order = order[: params["top_k"]]
    if params["top_p"] < 1:
        reached = np.cumsum(w[order], dtype=np.float64)
        needed = np.float64(params["top_p"]) * reached[-1]
        order = order[: np.searchsorted(reached, needed) + 1]
    kept = np.sort(order[w[order] >= params["min_p"]])
    if params["typical_p"] < 1:
        kept = typical(kept[w[kept] > 0], d, w, params["typical_p"])
    mass = np.cumsum(w[kept], dtype=np.float64)
    place = np.searchsorted(mass, uniform * mass[-1], side="right")
    last = np.flatnonzero(w[kept])[-1]
    return int(kept[min(place, last)])


def typical(kept: NDArray[np.intp], d: Float, w: Float, typical_p: np.float32) -> NDArray[np.intp]:
    """Of the kept ids, those closest to the entropy."""
    d, w = d[kept], w[kept]
    center = np.float32((w * d).sum(dtype=np.float64) / w.sum(dtype=np.float64))
    shift = np.abs(d - center)
    order = np.argsort(shift, kind="stable")
    reached = np.cumsum(w[order], dtype=np.float64)
    last = min(np.searchsorted(reached, np.float64(typical_p) * reached[-1]), len(kept) - 1)
    closest: NDArray[np.intp] = kept[shift <= shift[order[last]]]
    return closest


def log_softmax(x: Array) -> Float:
    d = x - x.max()
    mass = np.exp(d.astype(np.float64)).sum()
    logprobs: Float = (d - np.log(mass)).astype(np.float32)
    return logprobs


def check(
    logits: Array,
    params: Array,
    uniforms: Array | None,
    history: History | None,
    bias: Bias | None,
    num_logprobs: int | None,
    allowed: Array | None,
    given: Array | None,
) -> None:
    """Raise what `sample` raises; the native form tests for the same, faster, and comes here for the message."""
    check_type(logits, "logits", np.float32)
    check_rows(logits, "logits")
    rows, vocab = logits.shape
    check_vector(params, "params", rows, SAMPLING_DTYPE)
    finite = {name: np.isfinite(params[name]) for name in SAMPLING_DTYPE.names or ()}
    for name, fits, wanted in (
        ("temperature", params["temperature"] >= 0, "finite and at least 0"),
        ("top_p", (params["top_p"] >= 0) & (params["top_p"] <= 1), "within [0, 1]"),
        ("min_p", (params["min_p"] >= 0) & (params["min_p"] <= 1), "within [0, 1]"),
        ("typical_p", (params["typical_p"] >= 0) & (params["typical_p"] <= 1), "within [0, 1]"),
        ("repetition_penalty", params["repetition_penalty"] > 0, "finite and above 0"),
        ("frequency_penalty", True, "finite"),
        ("presence_penalty", True, "finite"),
    ):
        check_values(params[name], f"params[{name!r}]", finite[name] & fits, wanted)
    greedy = params["temperature"] == 0
    if given is not None:
        check_vector(given, "given", rows, np.int32)
        check_values(given, "given", (given >= -1) & (given < vocab), f"within [-1, {vocab})")
        greedy |= given >= 0
    if uniforms is not None:
        check_vector(uniforms, "uniforms", rows, np.float64)
        check_values(uniforms, "uniforms", (uniforms >= 0) & (uniforms < 1), "within [0, 1)")
    else:
        check_values(params["temperature"], "params['temperature']", greedy, "0 without uniforms")
    if history is not None:
        check_ragged(history, "history", rows, vocab, np.int32)
        check_values(history.counts, "history.counts", history.counts >= 0, "at least 0")
    if bias is not None:
        check_ragged(bias, "bias", rows, vocab, np.float32)
        check_values(bias.values, "bias.values", bias.values < np.inf, "finite, or -inf")
    if allowed is not None:
        check_type(allowed, "allowed", np.int32)
        words = -(-vocab // 32)
        if allowed.shape != (rows, words):
            raise ValueError(f"allowed has shape {allowed.shape}; it must be ({rows}, {words})")
        check_rows(allowed, "allowed")
    if num_logprobs is not None and not 0 <= num_logprobs <= vocab:
        raise ValueError(f"num_logprobs is {num_logprobs}; it must be within [0, {vocab}]")


def check_ragged(ragged: History | Bias, name: str, rows: int, vocab: int, dtype: DTypeLike) -> None:
    ids, values, starts = ragged
    check_type(ids, f"{name}.token_ids", np.int32)
    check_vector(ids, f"{name}.token_ids", ids.size, np.int32)
    check_vector(values, f"{name}.{ragged._fields[1]}", ids.size, dtype)
    check_vector(starts, f"{name}.row_starts", rows + 1, np.int64)
    fits = np.diff(starts, prepend=0) >= 0
    fits[0] = starts[0] == 0
    fits[-1] &= starts[-1] == ids.size
    check_values(starts, f"{name}.row_starts", fits, f"ascending from 0 to {ids.size}")
    check_values(ids, f"{name}.token_ids", (ids >= 0) & (ids < vocab), f"within [0, {vocab})")


def check_values(values: Array, name: str, fits: NDArray[np.bool_], wanted: str) -> None:
    if not fits.all():
        index = int(np.argmin(fits))
        raise ValueError(f"{name}[{index}] is {values[index].item()}; it must be {wanted}")
