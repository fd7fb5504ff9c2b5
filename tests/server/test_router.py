"""Which engine takes a request."""

from pace.server.router import BLOCK, REMEMBERED, Bearer, chain_of, choose


def prompt(length, start=0):
    return list(range(start, start + length))


def test_a_chain_names_whole_blocks_and_all_before_them():
    long, other = prompt(3 * BLOCK + 5), prompt(BLOCK) + prompt(2 * BLOCK, 7)
    assert len(chain_of(long)) == 3
    assert chain_of(prompt(BLOCK - 1)) == []
    assert chain_of(long)[0] == chain_of(other)[0]
    assert chain_of(long)[1:] != chain_of(other)[1:]
    shifted = prompt(BLOCK, 1) + long[BLOCK:]
    assert set(chain_of(shifted)).isdisjoint(chain_of(long))  # a block after another beginning is another


def test_the_least_loaded_takes_it_and_the_lowest_number_among_equals():
    bearers = [Bearer(index, capacity=10_000) for index in range(3)]
    taken = []
    for _ in range(6):
        bearer = choose(bearers, 100, [])
        bearer.take(100, [])
        taken.append(bearer.index)
    assert taken == [0, 1, 2, 0, 1, 2]
    bearers[1].release(100)
    assert choose(bearers, 100, []).index == 1


def test_a_smaller_cache_is_full_sooner():
    small, large = Bearer(0, capacity=1_000), Bearer(1, capacity=10_000)
    assert choose([small, large], 500, []) is large


def test_a_prompt_goes_where_its_beginning_is():
    first, second = Bearer(0, capacity=10_000), Bearer(1, capacity=10_000)
    chain = chain_of(prompt(4 * BLOCK))
    second.take(4 * BLOCK, chain)
    second.release(4 * BLOCK)
    longer = prompt(5 * BLOCK)
    assert choose([first, second], len(longer), chain_of(longer)) is second
    assert choose([first, second], len(longer), chain_of(prompt(5 * BLOCK, 3))) is first


def test_a_beginning_does_not_hold_a_prompt_at_an_engine_that_has_much_to_do():
    first, second = Bearer(0, capacity=10_000), Bearer(1, capacity=10_000)
    chain = chain_of(prompt(4 * BLOCK))
    second.take(4 * BLOCK, chain)
    second.take(4 * BLOCK + 1, [])
    assert choose([first, second], 4 * BLOCK, chain) is first


def test_what_is_remembered_is_bounded_and_the_oldest_goes():
    bearer = Bearer(0)
    old, new = chain_of(prompt(2 * BLOCK)), [bytes([i % 256, i // 256]) for i in range(REMEMBERED)]
    bearer.take(0, old)
    bearer.take(0, new)
    assert len(bearer.blocks) == REMEMBERED
    assert bearer.cached(old) == 0
    assert bearer.cached(new) == REMEMBERED * BLOCK


def test_an_engine_that_begins_anew_has_nothing():
    bearer = Bearer(0)
    chain = chain_of(prompt(BLOCK))
    bearer.take(BLOCK, chain)
    bearer.forget()
    assert (bearer.load, bearer.cached(chain)) == (0, 0)
