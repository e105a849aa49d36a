// Anthropic's own client for JavaScript.
import { deepStrictEqual as same, ok } from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import * as t from "./trying.mjs";

const made = (baseURL, apiKey) => new Anthropic({ baseURL, apiKey, maxRetries: 0 });
const client = made(t.url, "ollama");
const tools = [{ name: "get_weather", description: "Weather", input_schema: t.parameters }];
const say = (one, model = t.says, messages = t.ask, more = {}) =>
  one.messages.create({ model, messages, max_tokens: 2000, ...more });

t.feature("chat", async () => same((await say(client)).content[0].text, t.answer));
t.feature("stream", async () => {
  const stream = client.messages.stream({ model: t.says, messages: t.ask, max_tokens: 500 });
  let text = "";
  stream.on("text", (part) => (text += part));
  same((await stream.finalMessage()).stop_reason, "end_turn");
  same(text, t.answer);
});
t.feature("tools", async () => {
  const asked = [{ role: "user", content: t.callText }];
  const first = await client.messages.stream({ model: t.echo, messages: asked, tools, max_tokens: 500 }).finalMessage();
  const call = first.content.at(-1);
  same([first.stop_reason, call.input], ["tool_use", { city: "Paris" }]);
  const result = { type: "tool_result", tool_use_id: call.id, content: [{ type: "text", text: t.weather }] };
  const again = [...asked, { role: "assistant", content: first.content }, { role: "user", content: [result] }];
  same((await say(client, t.echo, again, { tools })).content[0].text, t.weather);
  const forced = await say(client, t.calls, t.ask, { tools, tool_choice: { type: "any" } });
  same(forced.content.at(-1).name, "get_weather");
});
t.feature("structured", async () => {
  const output_config = { format: { type: "json_schema", schema: t.citySchema } };
  const said = await say(client, t.talks, [{ role: "user", content: "The capital of France" }], { output_config });
  same(Object.keys(JSON.parse(said.content[0].text)).sort(), ["city", "is_capital"]);
});
t.feature("thinking", async () => {
  const said = await say(client, t.thinks, t.ask, { thinking: { type: "enabled", budget_tokens: 1024 } });
  same(said.content.map((block) => block.type), ["thinking", "text"]);
});
t.feature("models", async () => {
  const names = [];
  for await (const one of client.models.list()) names.push(one.id);
  ok(names.includes(`${t.says}:latest`));
  same((await client.models.retrieve(t.says)).type, "model");
});
t.feature("usage", async () => {
  const { usage } = await say(client);
  ok(usage.output_tokens > 5);
  same((await client.messages.countTokens({ model: t.says, messages: t.ask })).input_tokens, usage.input_tokens);
});
t.feature("errors", async () => {
  await t.refused(() => say(client, t.absent), "404");
  await t.refused(() => say(made(t.keyedUrl, t.wrongKey)), "401");
});
t.feature("key", async () => {
  same((await say(made(t.keyedUrl, t.key))).content[0].text, t.answer);
  const token = new Anthropic({ baseURL: t.keyedUrl, apiKey: null, authToken: t.key });
  same((await say(token)).content[0].text, t.answer);
});
t.feature("cancel", async () => {
  const messages = [{ role: "user", content: "words ".repeat(300) }];
  const stream = client.messages.stream({ model: t.endless, messages, max_tokens: 5000 });
  let parts = 0;
  await t.refused(async () => {
    for await (const _ of stream) if (++parts === 5) stream.abort();
  }, "abort");
  await t.freed(t.endless);
});
t.feature("vision", async () => {
  const content = [{ type: "image", source: { type: "base64", media_type: "image/png", data: t.picture } }];
  await t.refused(() => say(client, t.says, [{ role: "user", content }]), "400");
});
t.feature("slow", async () => same((await say(made(t.slowUrl, "ollama"), t.echo, t.ask, { keep_alive: 0 })).content[0].text, "Say it."));
await t.run("@anthropic-ai/sdk");
