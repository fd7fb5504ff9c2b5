"""Many prompts at once, each with its own parameters, with a progress bar and what the engine did.

python examples/batch.py [MODEL]
"""

import sys

from pace import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")

countries = ["France", "Italy", "Japan", "Egypt", "Peru", "Norway"]
prompts = [f"The capital of {country} is" for country in countries]
params = [
    SamplingParams(temperature=0, max_tokens=8)
    if i % 2 == 0
    else SamplingParams(temperature=0.7, min_p=0.1, seed=i, max_tokens=12, stop=".")
    for i in range(len(prompts))
]

for result in llm.generate(prompts, params, use_tqdm=True):
    print(f"{result.prompt}{result.outputs[0].text!r} ({result.outputs[0].finish_reason})")

stats = llm.stats()
print(f"{stats.requests} requests in {stats.steps} steps; ended by {stats.finished}")
print(f"{stats.prompt_tokens} tokens read, {stats.output_tokens} written, {stats.preemptions} preemptions")
print(f"cache: {stats.cache.used_bytes} of {stats.cache.capacity_bytes} bytes in use")
