"""Arrays for kernel tests: drawn values, odd strides, guarded outputs, and the honest tolerances."""

import contextlib

import ml_dtypes
import numpy as np
import pytest

from pace import isa

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
KINDS = [F32, BF16]
SIZES = [1, 2, 15, 16, 17, 31, 33, 100, 576, 1000]  # around the vector width, and no multiple of anything

# bfloat16 keeps 8 bits: two roundings of nearly the same float32 differ by at most one unit in the last place.
BF16_RTOL = 2**-7


def rng(*seed):
    return np.random.default_rng(seed)


def draw(generator, shape, kind=F32, scale=1.0):
    """Normal values, exact in bfloat16 so that both dtypes see the same numbers."""
    values = (generator.standard_normal(shape) * scale).astype(np.float32)
    return values.astype(BF16).astype(kind)


def spaced_rows(array, extra=5):
    """The same rows, further apart in memory, with NaN between them."""
    rows, columns = array.shape
    wide = np.full((rows, columns + extra), np.nan, array.dtype)
    wide[:, :columns] = array
    return wide[:, :columns]


class Guarded:
    """An output with guard values around and between its rows; `check` says whether they are untouched."""

    def __init__(self, rows, columns, kind, extra=3):
        self.whole = np.full((rows + 2, columns + extra), 123.0, kind)
        self.out = self.whole[1:-1, :columns]

    def check(self):
        mask = np.ones(self.whole.shape, bool)
        mask[1:-1, : self.out.shape[1]] = False
        assert np.all(self.whole[mask] == 123.0), "wrote outside out"


def assert_close(actual, expected, *, rtol, atol=0.0):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol)


def frozen(array):
    """A copy that may not be written."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def swapped(array):
    """The same numbers in the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def misaligned(array):
    """The same numbers, a byte off their natural place."""
    moved = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


@contextlib.contextmanager
def threads(count):
    before = isa.get_num_threads()
    isa.set_num_threads(count)
    try:
        yield
    finally:
        isa.set_num_threads(before)


def assert_same_refusal(native, reference, *args, error, match, **kwargs):
    """Both forms refuse the arguments, with the same error and the offending value in its message."""
    messages = []
    for form in (native, reference):
        with pytest.raises(error, match=match) as caught:
            form(*args, **kwargs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
