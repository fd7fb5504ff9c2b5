"""A smaller model writes ahead, and the model checks it: the same text, whatever the temperature.

python examples/speculative_draft_model.py [MODEL] [DRAFT]

Without DRAFT, the model is its own: it is always right, and nothing is won.
"""

import sys

from pace import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
draft = sys.argv[2] if len(sys.argv) > 2 else model
question = [{"role": "user", "content": "Tell me a short story about a robot."}]
params = SamplingParams(temperature=0.7, seed=1, max_tokens=48)

plain = LLM(model).chat(question, params)[0]
llm = LLM(model, speculative={"method": "draft_model", "model": draft, "num_tokens": 4, "adaptive": False})
drafted = llm.chat(question, params)[0]

print(drafted.outputs[0].text)
print("the same text:", drafted.outputs[0].token_ids == plain.outputs[0].token_ids)
print(f"{drafted.metrics.acceptance_rate:.0%} right, {drafted.metrics.mean_accepted_length:.1f} tokens a step")
