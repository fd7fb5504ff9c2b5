"""From the hidden states of a prompt to its embedding: one vector, whatever pieces the prompt went through in."""

from dataclasses import dataclass

import numpy as np

from pace.reference.arrays import Array, Float

POOLINGS = ("last", "mean")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How a prompt is embedded, by the model's final hidden states (after its last norm).

    pooling: `last` is that of the last token, `mean` that of all tokens, for which none of them is taken from the
    cache. normalize divides by the length (L2). ValueError for anything else.
    """

    pooling: str = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; it must be {' or '.join(POOLINGS)}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize is {self.normalize!r}; it must be True or False")


class Pool:
    """The embedding of one prompt in the making. float64 inside: sums of long prompts lose nothing that is shown."""

    def __init__(self, params: PoolingParams) -> None:
        self.params = params
        # Rows and their sum, replaced in one go: a step that is interrupted or done again counts a row once.
        self._pooled = 0, np.zeros((), np.float64)

    @property
    def needs_all(self) -> bool:
        """Whether every token's hidden state counts, so that all of them go through the model."""
        return self.params.pooling == "mean"

    def add(self, rows: Array, at: int) -> None:
        """The hidden states of the prompt's tokens from `at` on, (tokens, hidden); some may have been seen before."""
        if not self.needs_all:
            self._pooled = 1, rows[-1].astype(np.float64)
            return
        count, total = self._pooled
        with np.errstate(invalid="ignore"):  # of infinities: the embedding says so
            for row in rows[count - at :]:  # one after the other, so that the pieces do not show
                total = total + row.astype(np.float64)
        self._pooled = max(count, at + len(rows)), total

    def embedding(self) -> Float:
        """(hidden,) float32. ValueError where it is not finite."""
        count, total = self._pooled
        mean = total / count
        if not np.isfinite(mean).all():
            raise ValueError("the hidden states hold NaN or infinity")
        if self.params.normalize:  # NumPy's sum and not BLAS', which threads may divide; zeros stay zeros
            mean /= max(np.sqrt(np.square(mean).sum()), np.finfo(np.float64).tiny)
        return mean.astype(np.float32)
