"""How near the machine's limits a model runs offline: `python -m benchmarks.offline [MODEL]`.

Without MODEL, a Llama of Llama-3.2-1B's shape with random bfloat16 weights, made once in the cache directory. Measured:
start to first token in a process of its own, peak memory, prefill of 512 tokens, decode of 128, and what a decode step
spends outside of the kernels; beside read bandwidth and FMA peak, measured in the same run before and after. Then 32
requests at once, beside one at a time and transformers' generate; and what a prompt of 4096 tokens does to the texts
that are being written beside it (benchmarks/batches.py).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pace import LLM, SamplingParams, isa, kernels, roofline
from pace.models.hub import cache_directory, resolve
from pace.ops import registry
from pace.reference.arrays import bfloat16, float32

from . import batches
from .limits import Limits

PARTS = ("single", "throughput", "latency", "metadata")
PROMPT, DECODE, ROUNDS, CACHE_BYTES = 512, 128, 3, 1 << 28
SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# The first token of a process: what a user waits for after pressing return.
FIRST_TOKEN = """
import sys, time
from pathlib import Path
from pace import LLM, SamplingParams
llm = LLM(sys.argv[1], kv_cache_bytes=int(sys.argv[2]))
stream = llm.stream(list(range(100, 116)), SamplingParams(temperature=0, max_tokens=2))
next(stream)
at = time.time()
used = llm.cache.stats().used_bytes  # the pages of the rest of the pool are not resident
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(at, int(peak) * 1024, llm.model.weight_bytes, used)
"""


def random_model(directory: Path) -> Path:
    """The random model with a tokenizer of bytes, so that nothing has to be fetched."""
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    hidden, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 8 * 64

    def weight(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= 0.02
        return values.astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(SHAPE["vocab_size"], hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    for layer in range(SHAPE["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for which, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{name}.{which}.weight"] = weight(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(SHAPE))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def first_token(model: str) -> dict[str, float]:
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, model, str(CACHE_BYTES)], check=True, capture_output=True, text=True
    )
    at, peak, weights, used = map(float, done.stdout.split())
    return {"first_token_s": at - started, "peak_bytes": peak, "over_bytes": peak - weights - used}


class Stopwatch:
    """How long the functions of the operators take, bindings included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*arguments, **named):
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds += time.perf_counter() - began
            return result

        return timed

    def install(self) -> None:
        """Have NATIVE's functions timed, for models that are built from now on."""
        assert registry.missing("NATIVE") is None
        for operator, names in registry.OPERATORS.items():
            functions = {name: self.wrap(kernels.native(name)) for name in names}
            registry.register(operator, "NATIVE", functions, (float32, bfloat16))
        registry.resolve.cache_clear()


def decode_beside_reads(llm: LLM, tokens: list[int], watch: Stopwatch, machine: Limits) -> dict[str, np.ndarray]:
    """One token after the other, memory's rate measured before and after each: what each step reached of it."""
    stream = llm.stream(tokens, SamplingParams(temperature=0, max_tokens=DECODE + 1, ignore_eos=True))
    began = time.perf_counter()
    next(stream)
    figures: dict[str, list[float]] = {"prefill": [time.perf_counter() - began]}
    before = machine.read()
    for step in range(DECODE):
        watch.seconds, began = 0.0, time.perf_counter()
        next(stream)
        seconds = time.perf_counter() - began
        after = machine.read()
        num_bytes = llm.model.bytes_of_step() + (len(tokens) + step) * llm.model.cache_shape.bytes_per_token
        for name, value in (
            ("step", seconds),
            ("rate", num_bytes / seconds),
            ("share", num_bytes / seconds / ((before + after) / 2)),
            ("outside", 1 - watch.seconds / seconds),
        ):
            figures.setdefault(name, []).append(value)
        before = after
    stream.close()
    return {name: np.array(values) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, with commas")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts is {arguments.parts}; it must be of {', '.join(PARTS)}")
    if arguments.threads:
        isa.set_num_threads(arguments.threads)
    model = str(
        resolve(arguments.model)
        if arguments.model
        else random_model(cache_directory() / "benchmarks" / "llama-1b-random")
    )
    if "throughput" in parts:
        batches.throughput(model, arguments.dtype, arguments.threads)
    if "latency" in parts:
        batches.latency(model, arguments.dtype)
    if "metadata" in parts:
        batches.metadata(model, arguments.dtype)
    if "single" in parts:
        single(model, arguments.dtype)


def single(model: str, dtype: str) -> None:
    """One request: start to first token, memory, prefill and decode."""
    start = first_token(model)
    peak, over = start["peak_bytes"] / 1e6, start["over_bytes"] / 1e6
    print(f"first token {start['first_token_s']:.2f} s after process start")
    print(f"peak memory {peak:.0f} MB, {over:.0f} MB over weights and the cache that is used")

    watch, machine = Stopwatch(), Limits()
    watch.install()
    llm = LLM(model, dtype=dtype, kv_cache_bytes=CACHE_BYTES)
    tokens = np.random.default_rng(1).integers(100, 250, PROMPT).tolist()
    multiplied = (llm.model.bytes_of_step() - llm.model.head.head.nbytes) / llm.model.dtype.itemsize
    flops = 2 * PROMPT * multiplied  # the head is multiplied for the last token only; attention is not counted
    limits = roofline.measure()
    for _ in range(ROUNDS):
        figures = decode_beside_reads(llm, tokens, watch, machine)
        limits = roofline.best(limits, roofline.measure())
        rate, prefill = flops / figures["prefill"][0], PROMPT / figures["prefill"][0]
        step, share, outside = (float(np.median(figures[name])) for name in ("step", "share", "outside"))
        print(
            f"{limits.rung} · prefill {prefill:.0f} tok/s, {rate / 1e9:.0f} GFLOP/s, {rate / limits.fma_flops:.0%} of "
            f"the fp32 FMA peak, {rate / limits.bf16_flops:.0%} of the bf16 peak · decode {1 / step:.1f} tok/s, "
            f"{np.median(figures['rate']) / 1e9:.1f} GB/s, {share:.0%} of memory's rate beside it, "
            f"{outside:.1%} outside of kernels"
        )


if __name__ == "__main__":
    main()
