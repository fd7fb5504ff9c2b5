"""Answers that repeat what they were given, with drafts that are looked up in it: no second model, the same text.

python examples/speculative_ngram.py [MODEL]
"""

import sys

from pace import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
passage = "The harbour was begun in 1830 and finished nine years later. In its first year it took in 212 ships."
question = [{"role": "user", "content": f"Repeat this text, word for word:\n\n{passage}"}]
params = SamplingParams(temperature=0, max_tokens=48)

plain = LLM(model).chat(question, params)[0]
llm = LLM(model, speculative={"method": "ngram", "num_tokens": 8})
drafted = llm.chat(question, params)[0]

print(drafted.outputs[0].text)
print("the same text:", drafted.outputs[0].token_ids == plain.outputs[0].token_ids)
metrics, stats = drafted.metrics, llm.stats()
print(f"{metrics.accepted} of {metrics.drafted} drafts were right; {stats.steps} steps")
