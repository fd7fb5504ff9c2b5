"""Complete a few prompts, greedily and by sampling.

python examples/basic.py [MODEL]
"""

import sys

from pace import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")

greedy = SamplingParams(temperature=0, max_tokens=16)
for result in llm.generate(["The capital of France is", "Water boils at"], greedy):
    print(f"{result.prompt!r} → {result.outputs[0].text!r}")

# Two texts of one prompt. With a seed they are the same each time.
sampled = SamplingParams(n=2, temperature=0.8, top_p=0.9, seed=1, max_tokens=16)
for text in llm.generate("Once upon a time", sampled)[0].outputs:
    print(f"text {text.index}, {text.finish_reason}: {text.text!r}")
