// Ollama's own client for JavaScript.
import { deepStrictEqual as same, ok } from "node:assert";
import { Ollama } from "ollama";
import * as t from "./trying.mjs";

const client = new Ollama({ host: t.url });
const tools = [{ type: "function", function: { name: "get_weather", description: "Weather", parameters: t.parameters } }];
const gather = async (stream, pick) => {
  let text = "";
  for await (const part of stream) text += pick(part);
  return text;
};

t.feature("chat", async () => {
  same((await client.chat({ model: t.says, messages: t.ask })).message.content, t.answer);
  same((await client.generate({ model: t.says, prompt: "Say it." })).response, t.answer);
});
t.feature("stream", async () => {
  same(await gather(await client.chat({ model: t.says, messages: t.ask, stream: true }), (p) => p.message.content), t.answer);
  same(await gather(await client.generate({ model: t.says, prompt: "x", stream: true }), (p) => p.response), t.answer);
});
t.feature("tools", async () => {
  const asked = [{ role: "user", content: t.callText }];
  const { message } = await client.chat({ model: t.echo, messages: asked, tools });
  same(message.tool_calls[0].function.arguments, { city: "Paris" });
  const again = [...asked, message, { role: "tool", content: t.weather, tool_name: "get_weather" }];
  same((await client.chat({ model: t.echo, messages: again, tools })).message.content, t.weather);
  same((await client.chat({ model: t.calls, messages: t.ask, tools })).message.tool_calls.length, 1);
});
t.feature("structured", async () => {
  const messages = [{ role: "user", content: "The capital of France" }];
  const said = await client.chat({ model: t.talks, messages, format: t.citySchema });
  same(Object.keys(JSON.parse(said.message.content)).sort(), ["city", "is_capital"]);
});
t.feature("thinking", async () => {
  const { message } = await client.chat({ model: t.thinks, messages: t.ask, think: true });
  same([message.thinking.trim(), message.content.trim()], [t.thought, t.conclusion]);
});
t.feature("embed", async () => {
  same((await client.embed({ model: t.embeds, input: ["a", "b"] })).embeddings.map((v) => v.length), [384, 384]);
  same((await client.embeddings({ model: t.embeds, prompt: "a" })).embedding.length, 384);
});
t.feature("models", async () => {
  ok((await client.list()).models.some((one) => one.name === `${t.says}:latest`));
  same((await client.show({ model: t.says })).details.format, "gguf");
  await client.ps();
  await client.copy({ source: t.says, destination: "copied-js" });
  await client.delete({ model: "copied-js" });
  ok((await client.version?.())?.version ?? true);
});
t.feature("usage", async () => {
  const said = await client.chat({ model: t.says, messages: t.ask });
  ok(said.prompt_eval_count > 3 && said.eval_count > 5 && said.total_duration > 0);
});
t.feature("errors", async () => {
  await t.refused(() => client.chat({ model: t.absent, messages: t.ask }), "not found");
  const wrong = new Ollama({ host: t.keyedUrl, headers: { Authorization: `Bearer ${t.wrongKey}` } });
  await t.refused(() => wrong.list(), "401", "key");
});
t.feature("key", async () => {
  const keyed = new Ollama({ host: t.keyedUrl, headers: { Authorization: `Bearer ${t.key}` } });
  same((await keyed.chat({ model: t.says, messages: t.ask })).message.content, t.answer);
});
t.feature("cancel", async () => {
  const messages = [{ role: "user", content: "words ".repeat(300) }];
  const stream = await client.chat({ model: t.endless, messages, stream: true });
  let parts = 0;
  await t.refused(async () => {
    for await (const _ of stream) if (++parts === 3) stream.abort();
  }, "AbortError");
  await t.freed(t.endless);
});
t.feature("vision", async () => {
  const messages = [{ role: "user", content: "What?", images: [t.picture] }];
  await t.refused(() => client.chat({ model: t.says, messages }), "image", "vision");
});
t.feature("slow", async () => {
  const slowly = new Ollama({ host: t.slowUrl });
  same((await slowly.chat({ model: t.echo, messages: t.ask, keep_alive: 0 })).message.content, "Say it.");
});
await t.run("ollama");
