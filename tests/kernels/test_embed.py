import numpy as np
import pytest

from pace.kernels import reference

from .arrays import KINDS, Guarded, assert_same_refusal, draw, misaligned, rng, swapped

embed, pack_linear = reference("embed"), reference("pack_linear")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 15, 64, 77])
def test_gives_the_rows_that_were_packed(native, kind, hidden):
    generator = rng(hidden)
    table = draw(generator, (50, hidden), kind)
    tokens = generator.integers(0, 50, 30).astype(np.int32)
    guarded = Guarded(30, hidden, kind)
    for form in (native("embed"), embed):
        assert np.array_equal(form(tokens, pack_linear(table), out=guarded.out), table[tokens])
        guarded.check()
    assert native("embed")(tokens[:0], pack_linear(table)).shape == (0, hidden)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 15, 16, 17, 77])
def test_rows_are_scaled_and_rounded_once(native, kind, hidden):
    generator = rng(hidden)
    table = draw(generator, (50, hidden), kind)
    table[7, 0] = np.inf
    tokens = generator.permutation(50).astype(np.int32)
    expected = (table[tokens].astype(np.float32) * np.float32(33.94112)).astype(kind)
    guarded = Guarded(50, hidden, kind)
    for form in (native("embed"), embed):
        assert np.array_equal(form(tokens, pack_linear(table), 33.94112, guarded.out), expected)
        guarded.check()


def test_same_refusals(native):
    table = pack_linear(np.zeros((50, 4), np.float32))
    twins = native("embed"), embed
    for token in (-1, 50):
        tokens = np.array([3, token], np.int32)
        assert_same_refusal(*twins, tokens, table, error=ValueError, match=f"token {token} is outside the vocabulary")
    assert_same_refusal(*twins, np.array([1], np.int64), table, error=TypeError, match="tokens has dtype int64")
    tokens = np.array([1, 2], np.int32)
    assert_same_refusal(*twins, swapped(tokens), table, error=TypeError, match="tokens has dtype >i4")
    assert_same_refusal(*twins, misaligned(tokens), table, error=ValueError, match="tokens is not aligned")
