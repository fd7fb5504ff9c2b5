"""Which experts of a mixture each token goes to, and with what weights."""

import numpy as np

from .arrays import Array, Float, check_rows, check_type


def route(logits: Float, k: int) -> tuple[Array, Float]:
    """The k experts with the largest logits, and the softmax over those alone (GPT-OSS).

    logits: (tokens, experts) float32. Returns experts (tokens, k) int32, the largest logit first and the smaller number
    first of equals, and their weights (tokens, k) float32. NaN comes after all numbers.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, or a k that is not 1 to
    the number of experts.
    """
    check_type(logits, "logits", np.float32)
    check_rows(logits, "logits")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}; it must be 1 to the {logits.shape[1]} experts there are")
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(logits, chosen, axis=1)
    with np.errstate(invalid="ignore"):  # of infinities
        powers: Float = np.exp(best - best[:, :1])
    return chosen.astype(np.int32), powers / powers.sum(axis=1, keepdims=True)
