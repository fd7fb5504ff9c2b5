// npm's openai against a server: node openai_client.mjs URL MODEL prints what it saw, as JSON.

import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, temperature: 0, max_tokens: 24 };
const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, degrees: { type: "integer", minimum: 0, maximum: 40 } },
  required: ["city", "degrees"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", description: "The weather", parameters: schema } }];

async function streamed(stream) {
  const seen = { text: "", usage: null };
  for await (const event of stream) {
    seen.text += event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "";
    seen.usage = event.usage ?? seen.usage;
  }
  return seen;
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param, requestID: error.requestID };
  }
}

const chat = await client.chat.completions.create({ ...greedy, messages });
const streaming = { stream: true, stream_options: { include_usage: true } };
const called = await client.chat.completions.create({ ...greedy, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 99 });
const response_format = { type: "json_schema", json_schema: { name: "weather", schema, strict: true } };
const parsed = await client.chat.completions.parse({ ...greedy, messages, response_format, max_tokens: 99 });
const runner = client.chat.completions.stream({ ...greedy, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 99 });
const models = await client.models.list();
const { response } = await client.models.retrieve(model).withResponse();

console.log(
  JSON.stringify({
    chat: chat.choices[0].message.content,
    requestID: chat._request_id,
    stream: await streamed(await client.chat.completions.create({ ...greedy, ...streaming, messages })),
    completion: (await client.completions.create({ ...greedy, prompt: "One, two, three," })).choices[0].text,
    completionStream: await streamed(await client.completions.create({ ...greedy, ...streaming, prompt: "One, two, three," })),
    call: called.choices[0].message.tool_calls[0].function,
    streamedCall: (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function,
    parsed: parsed.choices[0].message.parsed,
    embedding: (await client.embeddings.create({ model, input: "Paris" })).data[0].embedding.length,
    models: models.data.map((each) => each.id),
    header: response.headers.get("x-request-id"),
    badRequest: await failure(client.chat.completions.create({ ...greedy, messages, temperature: -1 })),
    notFound: await failure(client.chat.completions.create({ ...greedy, messages, model: "other" })),
  }),
);
