"""How many drafts there are, on machines that are made up: nearly the best number of them, and never at a loss."""

from dataclasses import dataclass

import numpy as np
import pytest

from pace.speculative.adaptive import Adaptive, Times, bucket_of

STEPS = 1000
LENGTH = 300  # tokens, at most, until a text ends and another begins
PROMPT = 100  # tokens of it
MOST_LOSS = 1.03


class Text:
    pass


@dataclass
class Machine:
    """Seconds of a step: `weights` are read in any case, and a row costs `row`; of a proposer, once and a draft, and to
    read a prompt.
    """

    weights: float = 0.100
    row: float = 0.003
    proposing: float = 0.0
    draft: float = 0.0
    noise: float = 0.0
    bend: int = 1  # rows that cost nothing
    reading: float = 0.0

    def step(self, rows):
        return self.weights + self.row * max(0, rows - self.bend)

    def drafts(self, depth):
        return self.proposing + self.draft * depth if depth else 0.0


def tokens_expected(rate, count):
    return sum(rate**i for i in range(count + 1))


def best_speed(machine, number, rate, most):
    """Tokens a second of the best fixed number of drafts, and without."""
    speeds = [
        number * tokens_expected(rate, count) / (machine.step(number * (1 + count)) + machine.drafts(count))
        for count in range(most + 1)
    ]
    return max(speeds), speeds[0]


def simulate(
    machine, number=1, rate=lambda step, text: 0.8, most=12, steps=STEPS, adaptive=None, seed=0, length=LENGTH
):
    """Tokens, their seconds, and the seconds that they would take without drafts."""
    rng = np.random.default_rng(seed)
    adaptive = adaptive or Adaptive(most)
    texts, left = [Text() for _ in range(number)], [int(rng.integers(1, length)) for _ in range(number)]
    unread = [PROMPT if machine.reading else 0] * number
    tokens = seconds = 0.0
    counted = []

    def noisy(value):
        return value * (1 + machine.noise * rng.standard_normal()) if value else value

    for step in range(steps):
        limits = [n - 1 for n in left]
        for i in adaptive.worth_reading(texts, limits, unread):
            took = noisy(machine.reading)
            adaptive.observe_reading([texts[i]], [unread[i]], [0], took)
            unread[i], seconds = 0, seconds + took
        counts = adaptive.choose(texts, [0 if far else limit for far, limit in zip(unread, limits, strict=True)])
        accepted = []
        for i, count in enumerate(counts):
            right = rng.random(count) < rate(step, i)
            accepted.append(count if right.all() else int(right.argmin()))
        proposing = noisy(machine.drafts(max(counts)))
        if any(counts):
            asked = [text for text, count in zip(texts, counts, strict=True) if count]
            adaptive.observe_proposing(asked, number, max(counts), proposing)
        took = noisy(machine.step(number + sum(counts)))
        adaptive.observe(texts, counts, accepted, proposing, took)
        tokens += number + sum(accepted)
        seconds += took + proposing
        counted.append(sum(counts))
        for i in range(number):
            left[i] -= 1 + accepted[i]
            if left[i] <= 0:
                adaptive.forget(texts[i])
                texts[i], left[i] = Text(), int(rng.integers(1, length))
                unread[i] = PROMPT if machine.reading else 0
    return tokens, seconds, tokens * machine.step(number) / number, counted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("number", [1, 3, 16])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("machine", "rate"),
    [
        (Machine(), 0.0),
        (Machine(draft=0.012), 0.0),
        (Machine(draft=0.012), 0.1),
        (Machine(proposing=0.1), 0.5),  # a draft model as slow as the target
        (Machine(draft=0.1), 0.95),
        (Machine(row=0.1), 0.9),  # bound by arithmetic
        (Machine(row=0.08, draft=0.005), 0.7),
    ],
)
def test_no_loss_where_nothing_is_to_be_won(machine, rate, noise, number, seed):
    machine = Machine(**vars(machine) | {"noise": noise})
    _, seconds, plain, counts = simulate(machine, number, lambda *_: rate, seed=seed)
    assert seconds / plain < MOST_LOSS
    assert np.mean(counts[300:]) < 0.5 * number


@pytest.mark.parametrize("number", [1, 3, 16])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("machine", "rate"),
    [
        (Machine(), 0.8),
        (Machine(), 0.95),
        (Machine(row=0.012), 0.8),
        (Machine(row=0.012, bend=9), 0.8),
        (Machine(proposing=0.010), 0.8),
        (Machine(draft=0.008), 0.75),
        (Machine(row=0.03, draft=0.002), 0.5),
    ],
)
def test_nearly_the_best(machine, rate, noise, number):
    """Of all fixed numbers of drafts: what is lost is learning, and the ends of texts."""
    machine = Machine(**vars(machine) | {"noise": noise})
    tokens, seconds, plain, _ = simulate(machine, number, lambda *_: rate)
    best, without = best_speed(machine, number, rate, 12)
    assert seconds / plain < MOST_LOSS
    assert tokens / seconds > 0.85 * best or best < 1.1 * without


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("number", [1, 3, 16])
@pytest.mark.parametrize(
    ("rate", "length", "reading"),
    [
        (0.0, 300, 1.0),  # what is read is of no use
        (0.1, 300, 1.0),
        (0.9, 12, 3.0),  # texts are too short to repay it
        (0.9, 300, 40.0),
    ],
)
def test_no_loss_by_reading(rate, length, reading, number, noise):
    """Beyond the price of finding out, once."""
    machine = Machine(draft=0.004, noise=noise, reading=reading / number)
    _, seconds, plain, _ = simulate(machine, number, lambda *_: rate, length=length, steps=4000)
    assert (seconds - reading / number) / plain < MOST_LOSS


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("number", [1, 3, 16])
@pytest.mark.parametrize("reading", [0.1, 1.0, 4.0])
def test_reading_that_pays(reading, number, noise):
    """Nearly as fast as where each text is read as it begins."""
    machine = Machine(draft=0.004, noise=noise, reading=reading / number)
    tokens, seconds, _, _ = simulate(machine, number, steps=2000)
    best, without = best_speed(machine, number, 0.8, 12)
    of_a_text = LENGTH / 2 * number  # tokens, while each text is read once
    best = of_a_text / (of_a_text / best + machine.reading * number)
    assert tokens / seconds > max(0.85 * best, without)


def test_drafts_go_on_while_others_are_read():
    """What it takes to read a text is not the others' debt."""
    machine, rng = Machine(row=0.004), np.random.default_rng(0)
    adaptive, texts = Adaptive(8), [Text()]
    given = []

    def step(unread):
        for i in adaptive.worth_reading(texts, [500] * len(texts), unread):
            adaptive.observe_reading([texts[i]], [unread[i]], [0], 5.0)  # as long as 50 steps
            unread[i] = 0
        counts = adaptive.choose(texts, [0 if far else 500 for far in unread])
        right = [rng.random(count) < 0.9 for count in counts]
        accepted = [len(each) if each.all() else int(each.argmin()) for each in right]
        adaptive.observe(texts, counts, accepted, 0.0, machine.step(len(texts) + sum(counts)))
        given.append(counts[0])
        return unread

    unread = [0]
    for _ in range(100):
        unread = step(unread)
    texts, unread = [*texts, Text()], [*unread, 400]
    for _ in range(100):
        unread = step(unread)
    assert unread == [0, 0]
    assert np.mean(given[50:100]) > 4
    assert np.mean(given[100:]) > 4


def test_each_text_by_itself():
    """Where one text's drafts are right and another's are wrong, it is the first that gets them."""
    machine, adaptive = Machine(row=0.01), Adaptive(8)
    given = np.zeros(4)
    texts = [Text() for _ in range(4)]
    rates = [0.9, 0.0, 0.9, 0.1]
    rng = np.random.default_rng(0)
    for _ in range(400):
        counts = adaptive.choose(texts, [8] * 4)
        right = [rng.random(count) < rate for count, rate in zip(counts, rates, strict=True)]
        accepted = [len(each) if each.all() else int(each.argmin()) for each in right]
        adaptive.observe(texts, counts, accepted, 0.0, machine.step(4 + sum(counts)))
        given += counts
    assert given[[0, 2]].min() > 5 * given[[1, 3]].max()


def test_what_changes():
    """Drafts that become wrong are given up, and taken up again when they are right."""
    machine = Machine(draft=0.005, noise=0.05)
    *_, counts = simulate(machine, 1, lambda step, _: 0.9 if step // 500 % 2 == 0 else 0.0, steps=1500, length=10**6)
    used = np.array(counts).reshape(3, 500)[:, 150:].mean(axis=1)
    assert used[0] > 4
    assert used[1] < 0.3
    assert used[2] > 4


def test_a_machine_that_others_use():
    """Everything takes half as much again for a while: what is known of it follows."""
    adaptive, rng = Adaptive(8), np.random.default_rng(0)
    text, chosen = [Text()], []
    for step in range(900):
        machine = Machine(row=0.02) if step // 300 % 2 == 0 else Machine(weights=0.15, row=0.03)
        (count,) = adaptive.choose(text, [8])
        right = rng.random(count) < 0.7
        accepted = count if right.all() else int(right.argmin())
        adaptive.observe(text, [count], [accepted], 0.0, machine.step(1 + count) * (1 + 0.05 * rng.standard_normal()))
        chosen.append(count)
    for part in np.array(chosen).reshape(3, 300):
        assert 1.5 < part[100:].mean() < 5  # 3 is best


def test_limits():
    adaptive, texts = Adaptive(12), [Text(), Text()]
    for _ in range(60):
        counts = adaptive.choose(texts, [3, 0])
        assert counts[0] <= 3
        assert counts[1] == 0
        adaptive.observe(texts, counts, counts, 0.0, 0.1)
    assert counts[0] == 3


def test_speed_up():
    machine = Machine(row=0.0)
    adaptive = Adaptive(8)
    simulate(machine, 1, lambda *_: 1.0, most=8, adaptive=adaptive, length=10**6)
    assert adaptive.plain_seconds / adaptive.seconds == pytest.approx(9, rel=0.05)


# --- times ---


def test_times_are_a_line_through_what_was_measured():
    times = Times()
    assert times.at(5) == 0
    times.observe(1, 0.1)
    assert times.at(1) == times.at(50) == pytest.approx(0.1)
    times.observe(11, 0.2)
    assert times.at(6) == pytest.approx(0.15)
    assert times.at(21) == pytest.approx(0.3)
    times.observe(5, 0.09)  # no step of more rows is quicker
    assert times.at(5) == pytest.approx(0.1)
    counts = np.array([0.5, 1.0, 3.0, 8.0, 11.0, 12.5, 40.0])
    assert times.of(counts) == pytest.approx([times.at(count) for count in counts])


def test_times_follow():
    times = Times()
    for _ in range(20):
        times.observe(1, 0.1)
        times.observe(10, 0.2)
    times.observe(1, 5.0)  # something else took the machine
    assert times.at(1) < 0.15
    for _ in range(20):
        times.observe(1, 0.2)
    assert times.at(1) == pytest.approx(0.2, rel=0.05)
    assert times.at(10) > 0.22  # that the machine is slower holds for all


def test_buckets():
    assert [bucket_of(count) for count in range(1, 17)] == list(range(1, 17))
    assert bucket_of(100) == bucket_of(103) != bucket_of(104)
    assert all(bucket_of(count) <= count < 1.13 * bucket_of(count) for count in range(1, 5000))
