"""Many requests at once, beside one at a time and transformers; and what a long prompt does to the texts beside it.

Parts of `python -m benchmarks.offline`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pace import LLM, SamplingParams
from pace.cache import CACHES

REQUESTS, SINGLE, CACHE_BYTES = 32, 8, 1 << 30
STREAMS, LONG_PROMPT, IDLE_STEPS = 4, 4096, 60

# Reads a line of JSON: the model, prompts, and how many tokens of output each has. Left-padded, as generate wants it;
# it goes on to the longest output, and what is beyond a request's own is not counted.
TRANSFORMERS = """
import json, sys, time
import numpy as np
import torch, transformers
from pathlib import Path
from pace.models import open_checkpoint
transformers.utils.logging.set_verbosity_error()
asked = json.loads(sys.stdin.readline())
lengths = [len(prompt) for prompt in asked["prompts"]]
ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
mask = torch.zeros_like(ids)
for row, prompt in enumerate(asked["prompts"]):
    ids[row, max(lengths) - len(prompt):] = torch.tensor(prompt)
    mask[row, max(lengths) - len(prompt):] = 1

def generate(model, count):
    began = time.perf_counter()
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    assert made.shape == (len(lengths), max(lengths) + count)
    return time.perf_counter() - began

def load(dtype):
    with open_checkpoint(Path(asked["model"])) as checkpoint:
        config = transformers.AutoConfig.for_model(**checkpoint.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tensors = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model

seconds, fastest = {}, None
for name in ("bfloat16", "float32"):
    model = load(getattr(torch, name))
    generate(model, 2)
    seconds[name] = generate(model, 12)
    if seconds[name] == min(seconds.values()):
        fastest = model
    del model
name = min(seconds, key=seconds.get)
print(json.dumps({"dtype": name, "seconds": generate(fastest, max(asked["counts"])), "versions":
                  f"transformers {transformers.__version__}, torch {torch.__version__}"}))
"""
# What an EPYC has: oneDNN inside torch would use AMX on an Intel CPU that has it, which no rung of pace does.
AS_ON_EPYC = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts of 16 to 128 tokens, with 32 to 256 tokens of output."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(100, 250, int(length)).tolist() for length in rng.integers(16, 129, REQUESTS)]
    return prompts, rng.integers(32, 257, REQUESTS).tolist()


def throughput(model: str, dtype: str, threads: int | None) -> None:
    """Tokens of output a second: all requests at once, one at a time, and transformers with all in one batch."""
    prompts, counts = workload()
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
    llm = LLM(model, dtype=dtype, kv_cache_bytes=CACHE_BYTES)
    llm.generate(prompts[:2], SamplingParams(temperature=0, max_tokens=4))
    rates: dict[str, list[float]] = {"alone": [], "together": []}
    some = range(0, REQUESTS, REQUESTS // SINGLE)
    for _ in range(2):
        began = time.perf_counter()
        alone = [llm.generate([prompts[i]], params[i])[0].outputs[0].token_ids for i in some]
        rates["alone"].append(sum(map(len, alone)) / (time.perf_counter() - began))
        began = time.perf_counter()
        together = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
        rates["together"].append(sum(map(len, together)) / (time.perf_counter() - began))
        assert [together[i] for i in some] == alone
    del llm
    one, all_of_them = (float(np.median(rates[name])) for name in ("alone", "together"))
    print(f"{REQUESTS} requests: {all_of_them:.0f} tok/s together, {one:.1f} one at a time: {all_of_them / one:.2f} ×")
    for title, environment in peers():
        found = transformers(model, prompts, counts, environment, threads)
        rate = sum(counts) / found["seconds"]
        print(
            f"transformers, all in one batch, {found['dtype']}{title}: {rate:.0f} tok/s; pace is at "
            f"{all_of_them / rate:.2f} × that ({found['versions']})"
        )


def peers() -> list[tuple[str, dict[str, str]]]:
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and "amx_tile" in cpu.read_text():
        return [(", without AMX", AS_ON_EPYC), (", with AMX", {})]
    return [("", {})]


def transformers(
    model: str, prompts: list[list[int]], counts: list[int], environment: dict[str, str], threads: int | None
) -> dict[str, str | float]:
    """In a process of its own."""
    limits = environment | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRANSFORMERS],
        input=json.dumps({"model": model, "prompts": prompts, "counts": counts}) + "\n",
        env={**os.environ, "HF_HUB_OFFLINE": "1", **limits},
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def latency(model: str, dtype: str) -> None:
    """Seconds between the tokens of texts that are being written, before and while a long prompt comes in."""
    prompt = np.random.default_rng(3).integers(100, 250, LONG_PROMPT).tolist()
    for policy, chunk in (("decode_first", 1024), ("prefill_first", 1024)):
        llm = LLM(model, dtype=dtype, kv_cache_bytes=CACHE_BYTES, policy=policy, max_batch_tokens=chunk)
        engine = llm.engine
        endless = SamplingParams(temperature=0, max_tokens=3500, ignore_eos=True)
        texts = [engine.intake.request(list(range(100, 164 + i)), endless) for i in range(STREAMS)]
        for text in texts:
            engine.add(text)
        while not all(text.num_output_tokens for text in texts):
            engine.step()
        idle = steps(engine, IDLE_STEPS)
        long = engine.intake.request(prompt, SamplingParams(temperature=0, max_tokens=1))
        engine.add(long)
        busy, tokens = [], [text.num_output_tokens for text in texts]
        while not long.finished:
            busy += steps(engine, 1)
        got = [text.num_output_tokens - before for text, before in zip(texts, tokens, strict=True)]
        assert set(got) == {len(busy)}  # each step brought everybody a token
        idle += steps(engine, IDLE_STEPS)
        for text in texts:
            engine.cancel(text)
        middle = float(np.median(idle))
        print(
            f"{policy}: {STREAMS} texts get a token every {middle * 1e3:.1f} ms; while a prompt of {LONG_PROMPT} comes "
            f"in, every {np.median(busy) * 1e3:.1f} ms ({np.median(busy) / middle:.2f} ×; 95th percentile "
            f"{np.percentile(busy, 95) / middle:.2f} ×), for {sum(busy):.1f} s in {len(busy)} steps"
        )
        del llm, engine, texts, long


def metadata(model: str, dtype: str) -> None:
    """Microseconds to make the batch of 64 sequences that decode: ids, positions, tables and slots."""
    for cache in CACHES:
        llm = LLM(model, dtype=dtype, kv_cache_bytes=CACHE_BYTES, cache=cache)
        scheduler, intake = llm.engine.scheduler, llm.engine.intake
        endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        for n in range(64):
            llm.engine.add(intake.request(list(range(100, 108 + n)), endless))
        while scheduler.waiting or any(sequence.pending > 1 for sequence in scheduler.running):
            llm.engine.step()
        after_a_step, in_a_row = [], []
        for times, between in ((after_a_step, llm.engine.step), (in_a_row, lambda: None)):
            for _ in range(20):
                between()
                began = time.perf_counter()
                batch = scheduler.next_batch()
                times.append(time.perf_counter() - began)
                assert batch.num_decoding == len(batch.tokens) == 64
                scheduler.take_back()
        print(
            f"{cache}: the batch of 64 sequences that decode takes {np.median(in_a_row) * 1e6:.0f} µs, right after "
            f"a step, which leaves nothing of it in the CPU's caches, {np.median(after_a_step) * 1e6:.0f} µs"
        )
        del llm, scheduler, intake


def steps(engine, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds
