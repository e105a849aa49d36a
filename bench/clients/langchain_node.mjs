// LangChain.js: @langchain/ollama, @langchain/openai, @langchain/anthropic.
import { deepStrictEqual as same, ok } from "node:assert";
import { ChatAnthropic } from "@langchain/anthropic";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOllama, OllamaEmbeddings } from "@langchain/ollama";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import * as t from "./trying.mjs";

const chats = (model, url = t.url, apiKey = "ollama", more = {}) => [
  new ChatOllama({ model, baseUrl: url, headers: apiKey === "ollama" ? undefined : { Authorization: `Bearer ${apiKey}` }, ...more }),
  new ChatOpenAI({ model, apiKey, configuration: { baseURL: `${url}/v1` }, maxRetries: 0, ...more }),
  new ChatOpenAI({ model, apiKey, configuration: { baseURL: `${url}/v1` }, maxRetries: 0, useResponsesApi: true, ...more }),
  new ChatAnthropic({ model, apiKey, anthropicApiUrl: url, maxRetries: 0, maxTokens: 2000, ...more }),
];
const weather = tool(async () => t.weather, {
  name: "get_weather",
  description: "Weather",
  schema: z.object({ city: z.string() }),
});

t.feature("chat", async () => {
  for (const one of chats(t.says)) same((await one.invoke("Say it.")).text, t.answer);
});
t.feature("stream", async () => {
  for (const one of chats(t.says)) {
    let text = "";
    for await (const part of await one.stream("Say it.")) text += part.text;
    same(text, t.answer);
  }
});
t.feature("tools", async () => {
  for (const one of chats(t.echo)) {
    const bound = one.bindTools([weather]);
    const called = await bound.invoke([new HumanMessage(t.callText)]);
    const [call] = called.tool_calls;
    same(call.args, { city: "Paris" });
    const result = new ToolMessage({ content: t.weather, tool_call_id: call.id, name: call.name });
    same((await bound.invoke([new HumanMessage(t.callText), called, result])).text, t.weather);
  }
});
t.feature("structured", async () => {
  const schema = z.object({ city: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });
  for (const one of chats(t.talks).slice(0, 3))
    ok((await one.withStructuredOutput(schema, { method: "jsonSchema" }).invoke("The capital of France")).city);
});
t.feature("thinking", async () => {
  const said = await new ChatOllama({ model: t.thinks, baseUrl: t.url, think: true }).invoke("Say it.");
  same(said.text.trim(), t.conclusion);
});
t.feature("embed", async () => {
  const found = await new OllamaEmbeddings({ model: t.embeds, baseUrl: t.url }).embedDocuments(["a", "b"]);
  same(found.map((v) => v.length), [384, 384]);
});
t.feature("usage", async () => {
  for (const one of chats(t.says)) {
    const { usage_metadata: told } = await one.invoke("Say it.");
    ok(told.input_tokens > 3 && told.output_tokens > 5);
  }
});
t.feature("errors", async () => {
  for (const one of chats(t.absent)) await t.refused(() => one.invoke("x"), "not found", "404");
  for (const one of chats(t.says, t.keyedUrl, t.wrongKey)) await t.refused(() => one.invoke("x"), "401", "key");
});
t.feature("key", async () => {
  for (const one of chats(t.says, t.keyedUrl, t.key)) same((await one.invoke("Say it.")).text, t.answer);
});
t.feature("cancel", async () => {
  // ChatOllama stops reading and leaves the connection open: its request ends with the program.
  for (const one of chats(t.endless).slice(1)) {
    const abort = new AbortController();
    let parts = 0;
    try {
      for await (const _ of await one.stream("words ".repeat(300), { signal: abort.signal })) if (++parts === 3) abort.abort();
    } catch (error) {
      if (parts < 3) throw error;
    }
    await t.freed(t.endless);
  }
});
await t.run("@langchain/ollama", "@langchain/openai", "@langchain/anthropic");
