"""A conversation of two turns, by the model's own chat template.

python examples/chat.py [MODEL]
"""

import sys

from pace import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2", prefix_caching=True, block_tokens=32)
params = SamplingParams(temperature=0, max_tokens=32)

messages = [{"role": "system", "content": "You answer in one short sentence."}]
for question in ("What is the capital of France?", "And of Italy?"):
    messages.append({"role": "user", "content": question})
    result = llm.chat(messages, params)[0]
    messages.append({"role": "assistant", "content": result.outputs[0].text})
    print(f"user: {question}\nassistant: {result.outputs[0].text}")
    # With prefix_caching, whole blocks of the earlier turns need not go through the model again.
    print(f"  [{result.usage.prompt_tokens} tokens of prompt, {result.usage.cached_tokens} of them cached]")
