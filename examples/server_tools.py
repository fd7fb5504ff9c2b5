"""A tool that a served model has to call: the call is followed, and its result goes back to the model.

pace serve smollm2, and then: python examples/server_tools.py [URL]
"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id


def weather(city, unit):
    return {"city": city, "unit": unit, "degrees": 21 if unit == "celsius" else 70}


tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells how warm it is in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome", "Oslo"]},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
messages = [{"role": "user", "content": "How warm is it in Paris?"}]
asked = {"model": model, "tools": [tool], "temperature": 0, "max_tokens": 64}

# With "required" the answer is a call, whatever the model; with "auto" the model decides, and a small one seldom does.
said = client.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **asked)
messages.append(said.choices[0].message)
for call in said.choices[0].message.tool_calls:
    result = weather(**json.loads(call.function.arguments))
    print(f"{call.function.name}({call.function.arguments}) -> {result}")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})

answer = client.chat.completions.create(messages=messages, **asked)
print("assistant:", answer.choices[0].message.content)
