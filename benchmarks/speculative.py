"""What drafts bring: `python -m benchmarks.speculative [--parts …]`.

- rows: what a step of a 1B model takes by its rows, which is what drafts cost.
- oracle: the same model with drafts that are right with probability p (a Llama of Llama-3.2-1B's shape with random
  weights; texts are known from a run without), beside the ideal: as many tokens at the cost of a plain step.
- ngram: SmolLM2 on prompts whose answers repeat them: copy, correct, extract.
- useless: drafts that are always wrong, and n-grams that are never found: what they lose.
- load: requests that come and go, SmolLM2 and a draft model of four of its layers' size that has to read them; the
  seconds are those of all, prompts and finding out included, with engines that know nothing.
- pard: a draft of examples/train_pard_draft.py (--draft) on prompts that it has not seen.

Each is measured in turns with the same engine without drafts, and must give the same tokens.
"""

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from pace import SamplingParams, isa
from pace.engine.engine import Engine
from pace.engine.loader import LoadedModel, load_draft, load_shared
from pace.engine.request import Request
from pace.models import load_model, open_checkpoint
from pace.models.hub import cache_directory, resolve
from pace.models.random_weights import random_checkpoint
from pace.speculative import PROPOSERS, Draft, Proposer, SpeculativeConfig
from pace.speculative.oracle import Oracle
from pace.speculative.pard import PARD

from .offline import random_model

PARTS = ("rows", "oracle", "ngram", "useless", "load", "pard")
CACHE_BYTES, CONTEXT, TOKENS, ROUNDS = 1 << 29, 128, 96, 3
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 64, 72)

PASSAGE = (
    "The harbour of Ostend was begun in 1830 and finished nine years later. Mr. Hartley, who had planned it, did not "
    "live to see the first ship come in: the Margaretha, with timber from Riga, on 4 May 1839. In its first year the "
    "harbour took in 212 ships; in 1850 it was 1,480. A storm in the winter of 1863 broke the western wall, and it was "
    "built again of granite. The lighthouse, 57 metres high, was lit by gas until 1911."
)
CODE = (
    "def total(items):\n    result = 0\n    for item in items:\n        if item.price > 0:\n"
    "            result = result + item.price * item.count\n    return result\n\n\n"
    "def average(items):\n    if len(items) == 0:\n        return 0\n    return total(items) / len(items)\n"
)
REPEATING = {
    "copy": f"Repeat this text, word for word:\n\n{PASSAGE}",
    "correct": f"Correct the spelling of this text, and change nothing else:\n\n{PASSAGE.replace('the', 'teh', 2)}",
    "rename": f"Rename the function total to sum_of in this code, and show all of it:\n\n{CODE}",
    "summarise": f"Summarise this text in three sentences that use its own words:\n\n{PASSAGE}",
}
HELD_OUT = (
    "What is a lighthouse for?",
    "Write a short letter to a friend about a holiday at the sea.",
    "Explain how bread is baked, step by step.",
    "Why do leaves fall in autumn?",
    "Describe the city of Rome to a child.",
    "Give three reasons to learn a second language.",
    "What should I look for when I buy a used bicycle?",
    "Tell me about the life of bees.",
)


class Liar(Proposer):
    """Wrong, always: one past the last token."""

    def __init__(self, config: SpeculativeConfig, target: Any, draft: Any = None, cache: Any = None) -> None:
        self._vocabulary = target.vocabulary

    def propose(self, texts: Sequence[Any], counts: Sequence[int]) -> list[list[int]]:
        return [[(text.ids[-1] + 1) % self._vocabulary] * count for text, count in zip(texts, counts, strict=True)]


class ReadingOracle(PARD):
    """Takes the time of a PARD draft, and says what an oracle does."""

    def __init__(self, config: SpeculativeConfig, target: Any, draft: Any = None, cache: Any = None) -> None:
        super().__init__(config, target, draft, cache)
        self.oracle = Oracle(config, target)

    def propose(self, texts: Sequence[Any], counts: Sequence[int]) -> list[list[int]]:
        super().propose(texts, counts)
        return self.oracle.propose(texts, counts)


PROPOSERS |= {"oracle": Oracle, "liar": Liar, "reading": ReadingOracle}


def engine_of(loaded: LoadedModel, speculative: dict[str, Any] | None, draft: Any = None) -> Engine:
    config = SpeculativeConfig.parse(speculative)
    model = LoadedModel(loaded.model, loaded.tokenizer, loaded.operators, loaded.generation_config, config, draft)
    return model.engine(CACHE_BYTES)


def decode(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[list[Request], float]:
    """The seconds are those from when all prompts are through."""
    requests = [engine.intake.request(prompt, params) for prompt in prompts]
    for request in requests:
        engine.add(request)
    while not all(request.num_output_tokens for request in requests):
        engine.step()
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return requests, time.perf_counter() - began


def tokens_of(requests: Sequence[Request]) -> list[list[int]]:
    return [request.sequences[0].token_ids for request in requests]


def in_turns(
    plain: Engine, engines: dict[str, Engine], prompts: Sequence[Sequence[int]], params: SamplingParams, rounds: int
) -> None:
    """A line for each engine: how often as fast as without drafts (the median of the turns), and what was accepted."""
    seconds: dict[str, list[float]] = {name: [] for name in ("", *engines)}
    accepted: dict[str, list[int]] = {}
    for turn in range(rounds + 1):  # the first is to learn
        for name, engine in (("", plain), *engines.items()):
            requests, took = decode(engine, prompts, params)
            if name == "":
                expected = tokens_of(requests)
            assert tokens_of(requests) == expected, f"{name} says something else"
            if turn:
                seconds[name].append(took)
                metrics = [request.metrics for request in requests]
                accepted[name] = [
                    sum(getattr(each, which) for each in metrics) for which in ("drafted", "accepted", "verifications")
                ]
    written = sum(map(len, expected)) - len(prompts)
    print(f"  without  {written / median(seconds['']):7.1f} tok/s")
    for name in engines:
        drafted, right, verified = accepted[name]
        faster = median(a / b for a, b in zip(seconds[""], seconds[name], strict=True))
        ideal = written / (written - right)
        length, share = (1 + right / verified, right / drafted) if drafted else (1, 0)
        print(
            f"  {name:8} {written / median(seconds[name]):7.1f} tok/s · {faster:.2f} × · {share:.0%} of {drafted} "
            f"drafts right · {length:.2f} tokens a verification · ideal {ideal:.2f} ×"
        )


def known(plain: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    requests, _ = decode(plain, prompts, params)
    return [prompt + tokens for prompt, tokens in zip(prompts, tokens_of(requests), strict=True)]


def rows(loaded: LoadedModel) -> None:
    """One sequence with so many new tokens, and logits for each, in turns."""
    engine = engine_of(loaded, None)
    model, cache = engine.model, engine.cache
    sequence, rng = cache.allocate(), np.random.default_rng(0)
    tokens = rng.integers(100, 250, CONTEXT + max(ROWS)).astype(np.int32)
    model.forward(tokens[:CONTEXT], cache.append([sequence], [CONTEXT]), cache)
    took: dict[int, list[float]] = {count: [] for count in ROWS}
    for _ in range(7):
        for count in ROWS:
            began = time.perf_counter()
            hidden = model.forward(tokens[CONTEXT : CONTEXT + count], cache.append([sequence], [count]), cache)
            model.logits(hidden)
            took[count].append(time.perf_counter() - began)
            cache.truncate(sequence, CONTEXT)
    cache.free(sequence)
    one = median(took[1])
    print("rows of a step: milliseconds (times one row's)")
    print("  " + " · ".join(f"{count}: {1e3 * median(t):.0f} ({median(t) / one:.2f})" for count, t in took.items()))


def oracle(loaded: LoadedModel, batches: Sequence[int], chances: Sequence[float], count: int, rounds: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    rng, plain = np.random.default_rng(1), engine_of(loaded, None)
    for batch in batches:
        prompts = [rng.integers(100, 250, CONTEXT).tolist() for _ in range(batch)]
        whole = known(plain, prompts, params)
        for chance in chances:
            engines = {
                "fixed": engine_of(loaded, {"method": "oracle", "num_tokens": count, "adaptive": False}),
                "adaptive": engine_of(loaded, {"method": "oracle", "num_tokens": count}),
            }
            for engine in engines.values():
                assert engine.scheduler.speculation is not None
                proposer = engine.scheduler.speculation.proposer
                assert isinstance(proposer, Oracle)
                proposer.knows, proposer.probability = whole, chance
            print(f"oracle, right with p = {chance}, up to {count} drafts, batch {batch}")
            in_turns(plain, engines, prompts, params, rounds)


def ngram(loaded: LoadedModel, rounds: int) -> None:
    plain, engine = engine_of(loaded, None), engine_of(loaded, {"method": "ngram"})
    for name, text in REPEATING.items():
        prompt = loaded.tokenizer.chat([{"role": "user", "content": text}])
        print(f"n-grams, {name}")
        in_turns(plain, {"ngram": engine}, [prompt], SamplingParams(temperature=0, max_tokens=192), rounds)


def useless(loaded: LoadedModel, rounds: int) -> None:
    """Random prompts and texts drawn at a high temperature, in which nothing repeats itself."""
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=256, ignore_eos=True)
    prompts = [np.random.default_rng(0).integers(100, 20000, CONTEXT).tolist()]
    engines = {
        "liar": engine_of(loaded, {"method": "liar"}),
        "ngram": engine_of(loaded, {"method": "ngram"}),
    }
    print("drafts that are of no use")
    in_turns(engine_of(loaded, None), engines, prompts, params, rounds)


def load(loaded: LoadedModel, together: Sequence[int], rounds: int) -> None:
    """Prompts of 64 to 512 tokens, answers of 32 to 256; so many at once, and the next begins when one ends."""
    rng = np.random.default_rng(2)
    asked = [(rng.integers(100, 20000, rng.integers(64, 513)).tolist(), int(rng.integers(32, 257))) for _ in range(16)]
    path = cache_directory() / "benchmarks" / "draft-random" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(resolve("smollm2")) as checkpoint:
        path.write_text(json.dumps({**checkpoint.config, "pard_token": 0}))
    with random_checkpoint(path, layers=4) as checkpoint:
        model = load_model(checkpoint, "auto", loaded.operators, progress=False)
        draft = Draft(model, checkpoint.config, loaded.operators)
    settings = {"method": "reading", "model": "random"}

    def engine(chance: float) -> Engine:
        made = engine_of(loaded, settings, draft)
        assert made.scheduler.speculation is not None
        proposer = made.scheduler.speculation.proposer
        assert isinstance(proposer, ReadingOracle)
        proposer.oracle.knows, proposer.oracle.probability = whole, chance
        return made

    for most in together:
        requests, _ = stream(engine_of(loaded, None), asked, most)
        expected = tokens_of(requests)
        whole = [prompt + tokens for (prompt, _), tokens in zip(asked, expected, strict=True)]
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, made in (
                ("without", engine_of(loaded, None)),
                ("p = 0", engine(0.0)),
                ("p = 0.5", engine(0.5)),
                ("p = 0.8", engine(0.8)),
            ):
                requests, took = stream(made, asked, most)
                assert tokens_of(requests) == expected, f"{name} says something else"
                seconds.setdefault(name, []).append(took)
        print(f"requests that come and go, {most} at once, a draft that has to read them")
        for name, took in seconds.items():
            faster = median(a / b for a, b in zip(seconds["without"], took, strict=True))
            print(f"  {name:8} {median(took):6.2f} s · {faster:.3f} ×")


def stream(engine: Engine, asked: Sequence[tuple[list[int], int]], most: int) -> tuple[list[Request], float]:
    requests: list[Request] = []
    began = time.perf_counter()
    while engine.busy or len(requests) < len(asked):
        while len(requests) < len(asked) and sum(not request.finished for request in requests) < most:
            prompt, count = asked[len(requests)]
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            requests.append(engine.intake.request(prompt, params))
            engine.add(requests[-1])
        engine.step()
    return requests, time.perf_counter() - began


def pard(loaded: LoadedModel, draft: str, counts: Sequence[int], rounds: int) -> None:
    prompts = [loaded.tokenizer.chat([{"role": "user", "content": text}]) for text in HELD_OUT]
    settings = {"method": "pard", "model": draft}
    config = SpeculativeConfig.parse(settings)
    assert config is not None
    model = load_draft(config, loaded.model, loaded.tokenizer, loaded.operators, progress=False)
    engines = {
        f"{count} fixed": engine_of(loaded, settings | {"num_tokens": count, "adaptive": False}, model)
        for count in counts
    } | {f"≤ {max(counts)}": engine_of(loaded, settings | {"num_tokens": max(counts)}, model)}
    for temperature in (0, 0.7):
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=128)
        for name, asked in (("one after the other", [[prompt] for prompt in prompts]), ("all at once", [prompts])):
            print(f"PARD on {len(prompts)} prompts that it has not seen, temperature {temperature}, {name}")
            plain = engine_of(loaded, None)
            for each in asked:
                in_turns(plain, engines, each, params, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="rows,oracle,ngram,useless", help="of these, with commas")
    parser.add_argument("--draft", help="a PARD draft of SmolLM2, for the part pard")
    parser.add_argument("--batches", default="1,8", help="of the parts oracle and load")
    parser.add_argument("--chances", default="0.8", help="of the part oracle: how often a draft is right")
    parser.add_argument("--num-tokens", type=int, default=8, help="drafts at a time, of the part oracle")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="auto", help="of the 1B: in float32, memory binds at more rows")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts is {arguments.parts}; it must be of {', '.join(PARTS)}")
    if "pard" in parts and arguments.draft is None:
        parser.error("the part pard needs a --draft: examples/train_pard_draft.py makes one")
    if arguments.threads:
        isa.set_num_threads(arguments.threads)
    if {"rows", "oracle"} & set(parts):
        large = load_shared(random_model(cache_directory() / "benchmarks" / "llama-1b-random"), arguments.dtype)
        if "rows" in parts:
            rows(large)
        if "oracle" in parts:
            chances = [float(chance) for chance in arguments.chances.split(",")]
            batches = [int(batch) for batch in arguments.batches.split(",")]
            oracle(large, batches, chances, arguments.num_tokens, arguments.rounds)
        del large
    if {"ngram", "useless", "load", "pard"} & set(parts):
        small = load_shared(resolve("smollm2"))
        if "ngram" in parts:
            ngram(small, arguments.rounds)
        if "useless" in parts:
            useless(small, arguments.rounds)
        if "load" in parts:
            load(small, [int(batch) for batch in arguments.batches.split(",")], arguments.rounds)
        if "pard" in parts:
            pard(small, arguments.draft, (4, 8, 12), arguments.rounds)


if __name__ == "__main__":
    main()
