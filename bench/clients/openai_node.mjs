// OpenAI's own client for JavaScript.
import { deepStrictEqual as same, ok } from "node:assert";
import OpenAI from "openai";
import * as t from "./trying.mjs";

const made = (url, apiKey) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const client = made(t.url, "ollama");
const tools = [{ type: "function", function: { name: "get_weather", description: "Weather", parameters: t.parameters } }];
const say = async (one, model = t.says, messages = t.ask, more = {}) =>
  (await one.chat.completions.create({ model, messages, ...more })).choices[0];

t.feature("chat", async () => same((await say(client)).message.content, t.answer));
t.feature("stream", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ model: t.says, messages: t.ask, stream: true }))
    text += chunk.choices[0]?.delta.content ?? "";
  same(text, t.answer);
  same(await client.chat.completions.stream({ model: t.says, messages: t.ask }).finalContent(), t.answer);
});
t.feature("responses", async () => {
  same((await client.responses.create({ model: t.says, input: "Say it." })).output_text, t.answer);
  const stream = client.responses.stream({ model: t.thinks, input: "Say it.", reasoning: { effort: "low" } });
  same((await stream.finalResponse()).output_text.trim(), t.conclusion);
  const tool = { type: "function", name: "get_weather", parameters: t.parameters, strict: false };
  const input = [{ role: "user", content: t.callText }];
  const first = await client.responses.create({ model: t.echo, input, tools: [tool] });
  const call = first.output.find((item) => item.type === "function_call");
  const again = [...input, ...first.output, { type: "function_call_output", call_id: call.call_id, output: t.weather }];
  same((await client.responses.create({ model: t.echo, input: again, tools: [tool] })).output_text, t.weather);
});
t.feature("tools", async () => {
  const ran = client.chat.completions.runTools({
    model: t.echo,
    messages: [{ role: "user", content: t.callText }],
    tools: [
      {
        type: "function",
        function: { name: "get_weather", parse: JSON.parse, parameters: t.parameters, function: () => t.weather },
      },
    ],
  });
  same(await ran.finalContent(), t.weather);
  const { message } = await say(client, t.calls, t.ask, { tools });
  same(JSON.parse(message.tool_calls[0].function.arguments), { city: "Paris" });
});
t.feature("structured", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: t.citySchema } };
  const messages = [{ role: "user", content: "The capital of France" }];
  const said = await client.chat.completions.parse({ model: t.talks, messages, response_format });
  same(Object.keys(JSON.parse(said.choices[0].message.content)).sort(), ["city", "is_capital"]);
});
t.feature("thinking", async () => {
  const { message } = await say(client, t.thinks, t.ask, { reasoning_effort: "low" });
  same([message.reasoning_content.trim(), message.content.trim()], [t.thought, t.conclusion]);
});
t.feature("embed", async () => {
  const { data } = await client.embeddings.create({ model: t.embeds, input: ["a", "b"] });
  same(data.map((row) => row.embedding.length), [384, 384]);
});
t.feature("models", async () => {
  const names = [];
  for await (const one of client.models.list()) names.push(one.id);
  ok(names.includes(`${t.says}:latest`));
  same((await client.models.retrieve(t.says)).object, "model");
});
t.feature("usage", async () => {
  let last;
  const stream_options = { include_usage: true };
  for await (const chunk of await client.chat.completions.create({ model: t.says, messages: t.ask, stream: true, stream_options }))
    last = chunk;
  ok(last.usage.prompt_tokens > 3 && last.usage.completion_tokens > 5);
});
t.feature("errors", async () => {
  await t.refused(() => say(client, t.absent), "not found");
  await t.refused(() => say(made(t.keyedUrl, t.wrongKey)), "401");
});
t.feature("key", async () => same((await say(made(t.keyedUrl, t.key))).message.content, t.answer));
t.feature("cancel", async () => {
  const messages = [{ role: "user", content: "words ".repeat(300) }];
  const stream = await client.chat.completions.create({ model: t.endless, messages, stream: true });
  let parts = 0;
  for await (const _ of stream) if (++parts === 3) break;
  await t.freed(t.endless);
});
t.feature("vision", async () => {
  const content = [{ type: "image_url", image_url: { url: `data:image/png;base64,${t.picture}` } }];
  await t.refused(() => say(client, t.says, [{ role: "user", content }]), "400");
});
t.feature("slow", async () => same((await say(made(t.slowUrl, "ollama"), t.echo, t.ask, { keep_alive: 0 })).message.content, "Say it."));
await t.run("openai");
