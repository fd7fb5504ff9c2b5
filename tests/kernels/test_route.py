import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference

from .arrays import BF16, assert_close, assert_same_refusal, draw, rng, spaced_rows, threads

route = reference("route")

# Of the native exp, 0.9 ulp, twice; the division; and the order of a sum of at most 40 positive numbers.
RTOL = 3e-6


@settings(max_examples=60)
@given(tokens=st.integers(0, 40), experts=st.integers(1, 130), k=st.integers(1, 40), size=st.sampled_from([0.1, 3, 50]))
def test_twins_agree_on_drawn_shapes(native, tokens, experts, k, size):
    k = min(k, experts)
    logits = draw(rng(tokens, experts), (tokens, experts), scale=size)  # of bfloat16, so that some are equal
    (chosen, weights), (expected, shares) = (form(spaced_rows(logits), k) for form in (native("route"), route))
    assert chosen.dtype == np.int32
    assert np.array_equal(chosen, expected)
    assert_close(weights, shares, rtol=RTOL, atol=1e-37)  # of a softmax that underflows


def test_equals_transformers_router(native):
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    router = GptOssTopKRouter(GptOssConfig(num_local_experts=32, num_experts_per_tok=4, hidden_size=64))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        logits, shares, expected = router(torch.from_numpy(draw(rng(1), (50, 64))))
    for form in (native("route"), route):
        chosen, weights = form(logits.numpy(), 4)
        assert np.array_equal(chosen, expected.numpy())
        assert_close(weights, shares.numpy(), rtol=RTOL)


def test_the_smaller_number_first_of_equals_and_nan_last(native):
    inf, nan = np.inf, np.nan
    logits = np.array([[1, 2, 2, 1, 2], [0, -0.0, 0, 0, -1], [nan, -inf, nan, 3, 3], [nan] * 5, [-inf] * 5], np.float32)
    for form in (native("route"), route):
        chosen, weights = form(logits, 4)
        assert chosen.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [3, 4, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert np.array_equal(weights[1], np.full(4, 0.25))
        assert np.isnan(weights[2:]).all()
        chosen, weights = form(logits, 2)
        assert np.array_equal(weights[2], [0.5, 0.5])


def test_a_token_is_the_same_in_any_batch_on_any_number_of_threads(native):
    logits = draw(rng(3), (300, 32))
    with threads(1):
        alone = [native("route")(logits[i : i + 1], 4) for i in range(len(logits))]
    with threads(3):
        chosen, weights = native("route")(logits, 4)
    assert np.array_equal(chosen, np.concatenate([each for each, _ in alone]))
    assert np.array_equal(weights, np.concatenate([each for _, each in alone]))


def test_same_refusals(native):
    def refused(*args, error=ValueError, match):
        assert_same_refusal(native("route"), route, *args, error=error, match=match)

    logits = np.zeros((2, 5), np.float32)
    refused(logits.astype(BF16), 2, error=TypeError, match="logits has dtype bfloat16; it must be float32")
    refused(logits[0], 2, match=r"logits has shape \(5,\)")
    refused(logits.T, 2, match="logits has strides")
    refused(logits, 0, match="k is 0; it must be 1 to the 5 experts there are")
    refused(logits, 6, match="k is 6")
