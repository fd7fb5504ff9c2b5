"""Text that follows a JSON schema, a regular expression, a choice and a grammar.

python examples/structured_output.py [MODEL]
"""

import json
import sys

from pace import LLM, SamplingParams, StructuredOutputsParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")


def ask(question, **structure):
    params = SamplingParams(temperature=0, max_tokens=96, structured_outputs=StructuredOutputsParams(**structure))
    return llm.chat([{"role": "user", "content": question}], params)[0].outputs[0].text


city = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
    },
    "required": ["name", "country", "inhabitants"],
    "additionalProperties": False,
}
print("json:", json.loads(ask("Describe Paris as JSON.", json=city)))
print("regex:", ask("When did the French Revolution begin?", regex=r"(1[0-9]{3}|20[0-9]{2})-(0[1-9]|1[0-2])"))
print("choice:", ask("Is this review good or bad? 'I loved it.'", choice=["good", "bad"]))

# llama.cpp's GBNF; Lark's form is taken too.
sums = """
root ::= number (" + " number){1,2} " = " number
number ::= [1-9] [0-9]?
"""
print("grammar:", ask("Write a sum.", grammar=sums))
