"""Show a text while it is written, and how long it took.

python examples/streaming.py [MODEL]
"""

import sys

from pace import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")

for output in llm.stream("The three primary colours are", SamplingParams(temperature=0, max_tokens=32)):
    print(output.outputs[0].new_text, end="", flush=True)

metrics, usage = output.metrics, output.usage
print(f"\n\nfirst token after {metrics.first_token - metrics.arrived:.2f} s")
print(f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written")
print(f"ended by: {output.outputs[0].finish_reason}")
