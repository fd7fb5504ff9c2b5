"""A PARD draft guesses several tokens in one pass: the same text, in fewer steps of the model.

python examples/speculative_pard.py [MODEL] [DRAFT]

DRAFT: a directory or a repository of the hub, such as amd/PARD-Llama-3.2-1B for Llama 3.1 and 3.2;
examples/train_pard_draft.py makes one of SmolLM2 in `pard-draft`.
"""

import sys

from pace import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
draft = sys.argv[2] if len(sys.argv) > 2 else "pard-draft"
questions = [
    [{"role": "user", "content": text}]
    for text in ("Why is the sky blue?", "How is bread baked?", "What are bees for?")
]
params = SamplingParams(temperature=0, max_tokens=48)

plain = LLM(model).chat(questions, params)
llm = LLM(model, speculative={"method": "pard", "model": draft, "num_tokens": 6})
drafted = llm.chat(questions, params)

for one, other in zip(drafted, plain, strict=True):
    print("the same text:", one.outputs[0].token_ids == other.outputs[0].token_ids)
speculation = llm.stats().speculation
print(f"{speculation.accepted} of {speculation.drafted} drafts were right")
print(f"steps took {speculation.speed_up:.2f} times less than without")
