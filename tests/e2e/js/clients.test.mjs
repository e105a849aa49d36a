// The unmodified official JavaScript clients against a node; NODE_URL names it.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";
import OpenAI from "openai";

const url = process.env.NODE_URL;
const answer = process.env.ANSWER;
const embedder = process.env.EMBEDDER;
const messages = [{ role: "user", content: "Say it." }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["city", "is_capital"],
  additionalProperties: false,
};
const ask = [{ role: "user", content: "The capital of France, as JSON." }];

const ollama = new Ollama({ host: url });
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });

test("ollama: chat", async () => {
  const said = await ollama.chat({ model: "scripted", messages });
  assert.equal(said.message.content, answer);
  assert.equal(said.done_reason, "stop");
});

test("ollama: stream", async () => {
  let text = "";
  let last;
  for await (const part of await ollama.chat({ model: "scripted", messages, stream: true })) {
    text += part.message.content;
    last = part;
  }
  assert.equal(text, answer);
  assert.equal(last.done, true);
});

test("ollama: an aborted stream ends", async () => {
  const stream = await ollama.generate({ model: "smollm2:135m", prompt: "Count to 1000.", stream: true });
  let parts = 0;
  await assert.rejects(async () => {
    for await (const _ of stream) if (++parts === 3) stream.abort();
  }, { name: "AbortError" });
});

test("ollama: tools", async () => {
  const said = await ollama.chat({ model: "scripted-tools", messages, tools });
  assert.deepEqual(said.message.tool_calls[0].function, { ...said.message.tool_calls[0].function, name: "get_weather", arguments: { city: "Paris" } });
});

test("ollama: structured output", async () => {
  const said = await ollama.chat({ model: "smollm2:135m", messages: ask, format: schema, options: { temperature: 0 } });
  assert.equal(typeof JSON.parse(said.message.content).city, "string");
});

test("ollama: embeddings", async () => {
  const { embeddings } = await ollama.embed({ model: embedder, input: ["a cat", "a dog"] });
  assert.deepEqual(embeddings.map((vector) => vector.length), [384, 384]);
});

test("ollama: list, show, create, copy, delete", async () => {
  const names = (await ollama.list()).models.map((model) => model.name);
  assert.ok(names.includes("scripted:latest"));
  assert.equal((await ollama.show({ model: "smollm2:135m" })).details.family, "llama");
  await ollama.create({ model: "made-by-js", from: "scripted", system: "Be brief." });
  await ollama.copy({ source: "made-by-js", destination: "copied-by-js" });
  assert.equal((await ollama.chat({ model: "copied-by-js", messages })).message.content, answer);
  await ollama.delete({ model: "made-by-js" });
  await ollama.delete({ model: "copied-by-js" });
  await assert.rejects(ollama.show({ model: "copied-by-js" }), /not found/);
});

test("openai: chat", async () => {
  const said = await openai.chat.completions.create({ model: "scripted", messages });
  assert.equal(said.choices[0].message.content, answer);
  assert.equal(said.choices[0].finish_reason, "stop");
});

test("openai: stream", async () => {
  let text = "";
  for await (const chunk of await openai.chat.completions.create({ model: "scripted", messages, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, answer);
});

test("openai: tools, whole and streamed", async () => {
  const said = await openai.chat.completions.create({ model: "scripted-tools", messages, tools });
  assert.equal(said.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(JSON.parse(said.choices[0].message.tool_calls[0].function.arguments), { city: "Paris" });
  const final = await openai.chat.completions.stream({ model: "scripted-tools", messages, tools }).finalChatCompletion();
  assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), { city: "Paris" });
});

test("openai: structured output", async () => {
  const said = await openai.chat.completions.create({
    model: "smollm2:135m",
    messages: ask,
    temperature: 0,
    response_format: { type: "json_schema", json_schema: { name: "capital", schema, strict: true } },
  });
  assert.equal(typeof JSON.parse(said.choices[0].message.content).is_capital, "boolean");
});

test("openai: embeddings", async () => {
  const made = await openai.embeddings.create({ model: embedder, input: ["a cat", "a dog"] });
  assert.deepEqual(made.data.map((row) => row.embedding.length), [384, 384]);
});

test("openai: models and responses", async () => {
  const names = [];
  for await (const model of openai.models.list()) names.push(model.id);
  assert.ok(names.includes("scripted:latest"));
  const said = await openai.responses.create({ model: "scripted", input: "Say it." });
  assert.equal(said.output_text, answer);
});

test("openai: an unknown model is a 404", async () => {
  await assert.rejects(openai.chat.completions.create({ model: "absent", messages }), { status: 404 });
});
