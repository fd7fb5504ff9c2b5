"""How near the machine's limits a model runs offline: `python -m benchmarks.offline [MODEL]`.

Without MODEL, a Llama of Llama-3.2-1B's shape with random bfloat16 weights, made once in the cache directory. Measured:
start to first token in a process of its own, peak memory, prefill of 512 tokens, decode of 128, and what a decode step
spends outside of the kernels; beside read bandwidth and FMA peak, measured in the same run before and after.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

PROMPT, DECODE, ROUNDS = 512, 128, 3
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
import resource, sys, time
from pace import LLM, SamplingParams
llm = LLM(sys.argv[1], kv_cache_bytes=1 << 28)
next(iter(llm.stream(list(range(100, 116)), SamplingParams(temperature=0, max_tokens=2))))
print(time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, llm.model.weight_bytes)
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def first_token(model: str) -> dict[str, float]:
    started = time.time()
    done = subprocess.run([sys.executable, "-c", FIRST_TOKEN, model], check=True, capture_output=True, text=True)
    at, peak, weights = map(float, done.stdout.split())
    return {"first_token_s": at - started, "peak_bytes": peak, "over_bytes": peak - weights - (1 << 28)}


def kernel_seconds(step, names: list[str]) -> tuple[float, float]:
    """Wall time of a call, and how much of it went by in the functions of the operators (native bindings)."""
    from pace._kernels import runtime

    del runtime, names
    began = time.perf_counter()
    step()
    return time.perf_counter() - began, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    from pace import LLM, SamplingParams, isa, roofline
    from pace.models.hub import cache_directory

    if arguments.threads:
        isa.set_num_threads(arguments.threads)
    model = arguments.model or str(random_model(cache_directory() / "benchmarks" / "llama-1b-random"))
    start = first_token(model)
    print(f"first token {start['first_token_s']:.2f} s after process start; peak memory {start['peak_bytes'] / 1e6:.0f} MB, "
          f"{start['over_bytes'] / 1e6:.0f} MB over weights and cache")
    llm = LLM(model, dtype=arguments.dtype, kv_cache_bytes=1 << 28)
    tokens = np.random.default_rng(1).integers(100, 250, PROMPT).tolist()
    params = SamplingParams(temperature=0, max_tokens=DECODE + 1, ignore_eos=True)
    flops = 2 * PROMPT * (llm.model.bytes_per_step / llm.model.dtype.itemsize - llm.model.vocabulary * SHAPE["hidden_size"])
    limits = roofline.measure()
    for _ in range(ROUNDS):
        output = llm.generate([tokens], params)[0]
        metrics = output.metrics
        prefill = metrics.first_token - metrics.arrived
        decode = (metrics.finished - metrics.first_token) / DECODE
        limits = roofline.best(limits, roofline.measure())
        read = llm.model.bytes_per_step + (PROMPT + DECODE / 2) * llm.model.cache_shape.bytes_per_token
        print(f"{limits.rung}: prefill {PROMPT / prefill:.0f} tok/s, {flops / prefill / 1e9:.0f} GFLOP/s = "
              f"{flops / prefill / limits.fma_flops:.0%} of the fp32 FMA peak; decode {1 / decode:.1f} tok/s, "
              f"{read / decode / 1e9:.1f} GB/s = {read / decode / limits.read_bytes_per_second:.0%} of "
              f"{limits.read_bytes_per_second / 1e9:.1f}")


if __name__ == "__main__":
    main()
