// Vercel's AI SDK with the providers openai-compatible, openai, anthropic and ollama-ai-provider-v2.
import { deepStrictEqual as same, ok } from "node:assert";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { createOllama } from "ollama-ai-provider-v2";
import { z } from "zod";
import * as t from "./trying.mjs";

const providers = (url = t.url, apiKey = "ollama") => ({
  compatible: createOpenAICompatible({ name: "node", baseURL: `${url}/v1`, apiKey, supportsStructuredOutputs: true, includeUsage: true }),
  chat: { languageModel: (name) => createOpenAI({ baseURL: `${url}/v1`, apiKey }).chat(name) },
  responses: { languageModel: (name) => createOpenAI({ baseURL: `${url}/v1`, apiKey }).responses(name) },
  anthropic: createAnthropic({ baseURL: `${url}/v1`, apiKey }),
  ollama: createOllama({ baseURL: `${url}/api`, headers: { Authorization: `Bearer ${apiKey}` } }),
});
const each = async (work, ...from) => {
  for (const [name, provider] of Object.entries(providers(...from)))
    try {
      await work((model) => (provider.languageModel ?? provider).call(provider, model), name, provider);
    } catch (error) {
      throw new Error(`${name}: ${error.message}`, { cause: error });
    }
};
const prompt = "Say it.";
const tools = {
  get_weather: ai.tool({
    description: "Weather",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => t.weather,
  }),
};

t.feature("chat", () => each(async (model) => same((await ai.generateText({ model: model(t.says), prompt })).text, t.answer)));
t.feature("stream", () =>
  each(async (model) => {
    let text = "";
    for await (const part of ai.streamText({ model: model(t.says), prompt }).textStream) text += part;
    same(text, t.answer);
  }),
);
t.feature("tools", () =>
  each(async (model) => {
    const stopWhen = (ai.stepCountIs ?? ai.isStepCount)(3);
    const said = await ai.generateText({ model: model(t.echo), prompt: t.callText, tools, stopWhen });
    ok(said.text.includes(t.weather), said.text);
    const streamed = ai.streamText({ model: model(t.echo), prompt: t.callText, tools, stopWhen });
    ok((await streamed.text).includes(t.weather));
  }),
);
t.feature("structured", () =>
  each(async (model, name) => {
    const schema = z.object({ city: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });
    const output = ai.Output.object({ schema });
    // Of models that it does not know Anthropic's provider asks by a tool.
    const said = await ai.generateText({ model: model(name === "anthropic" ? t.echo : t.talks), prompt: "The capital of France", output });
    ok(said.output.city);
  }),
);
t.feature("thinking", () =>
  each(async (model) => {
    const said = await ai.generateText({ model: model(t.thinks), prompt, providerOptions: { ollama: { think: true } } });
    same(said.text.trim(), t.conclusion);
    same((said.reasoningText ?? t.thought).trim(), t.thought);
  }),
);
t.feature("embed", async () => {
  const { compatible, ollama } = providers();
  for (const provider of [compatible, ollama]) {
    const model = (provider.embeddingModel ?? provider.textEmbeddingModel).call(provider, t.embeds);
    same((await ai.embedMany({ model, values: ["a", "b"] })).embeddings.map((v) => v.length), [384, 384]);
  }
});
t.feature("usage", () =>
  each(async (model) => {
    const stream = ai.streamText({ model: model(t.says), prompt });
    await stream.text;
    const told = await stream.usage;
    ok(told.inputTokens > 3 && told.outputTokens > 5, JSON.stringify(told));
  }),
);
t.feature("errors", async () => {
  await each((model) => t.refused(() => ai.generateText({ model: model(t.absent), prompt, maxRetries: 0 }), "not found"));
  await each(
    (model) => t.refused(() => ai.generateText({ model: model(t.says), prompt, maxRetries: 0 }), "401", "key"),
    t.keyedUrl,
    t.wrongKey,
  );
});
t.feature("key", () =>
  each(async (model) => same((await ai.generateText({ model: model(t.says), prompt })).text, t.answer), t.keyedUrl, t.key),
);
t.feature("cancel", () =>
  each(async (model) => {
    const abort = new AbortController();
    const stream = ai.streamText({ model: model(t.endless), prompt: "words ".repeat(300), abortSignal: abort.signal, onError() {} });
    let parts = 0;
    for await (const _ of stream.textStream) if (++parts === 3) abort.abort();
    await t.freed(t.endless);
  }),
);
await t.run("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic", "ollama-ai-provider-v2");
