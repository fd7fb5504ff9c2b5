"""A running server asked by the openai package: an answer, a stream, a schema, and vLLM's fields.

pace serve smollm2, and then: python examples/openai_client.py [URL]
"""

import sys
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is the capital of France?"}]

answer = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=32)
print("answer:", answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model,
    messages=question,
    temperature=0,
    max_tokens=32,
    stream=True,
    stream_options={"include_usage": True},
)
print("stream:", end=" ")
for event in stream:
    if event.choices:
        print(event.choices[0].delta.content or "", end="", flush=True)
    else:  # the last event has the counts
        print(f"\n{event.usage.prompt_tokens} tokens read, {event.usage.completion_tokens} written")


class City(BaseModel):
    name: Literal["Paris", "Rome", "Madrid"]
    large: bool


parsed = client.chat.completions.parse(
    model=model, messages=question, response_format=City, temperature=0, max_tokens=64
)
print("schema:", parsed.choices[0].message.parsed)

chosen = client.chat.completions.create(
    model=model, messages=question, temperature=0, extra_body={"structured_outputs": {"choice": ["Paris", "Lyon"]}}
)
print("choice:", chosen.choices[0].message.content)

vectors = client.embeddings.create(model=model, input=["Paris", "Rome"])
print("embeddings:", [len(each.embedding) for each in vectors.data])
