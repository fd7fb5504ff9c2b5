"""How many requests may wait."""

import pytest

from pace.server.admission import Admission
from pace.server.errors import APIError


def test_requests_wait_up_to_a_number_until_their_first_token():
    admission = Admission(2, 1000)
    first, _ = admission.enter(1, 10), admission.enter(1, 10)
    with pytest.raises(APIError, match="2 requests wait, and max_waiting is 2") as refused:
        admission.enter(1, 10)
    assert refused.value.status_code == 429
    assert refused.value.headers == {"Retry-After": "1"}
    first.begun()
    third = admission.enter(1, 10)
    assert (admission.waiting, admission.waiting_tokens, admission.in_flight) == (2, 20, 3)
    first.begun()  # again: nothing
    first.leave()
    third.leave()  # without a token
    assert (admission.waiting, admission.waiting_tokens, admission.in_flight) == (1, 10, 1)


def test_tokens_wait_up_to_a_number_but_one_request_always_may():
    admission = Admission(10, 100)
    large = admission.enter(1, 500)
    with pytest.raises(APIError, match="about 500 tokens of prompts wait, and max_waiting_tokens is 100"):
        admission.enter(1, 1)
    large.leave()
    admission.enter(1, 60)
    admission.enter(1, 40)
    with pytest.raises(APIError, match="no room for 1 more"):
        admission.enter(1, 1)


def test_a_request_counts_as_the_texts_it_asks_for():
    admission = Admission(4, 100)
    admission.enter(3, 1)
    with pytest.raises(APIError, match="3 requests wait"):
        admission.enter(2, 1)


def test_a_server_that_ends_takes_nothing():
    admission = Admission(4, 100)
    admission.closed = True
    with pytest.raises(APIError, match="shutting down") as refused:
        admission.enter(1, 1)
    assert refused.value.status_code == 503
