// What the JavaScript programs beside this one share; as trying.py.
import { readFileSync } from "node:fs";

export const env = process.env;
export const url = env.CLIENT_URL, keyedUrl = env.CLIENT_KEYED_URL, key = env.CLIENT_KEY, slowUrl = env.CLIENT_SLOW_URL;
export const wrongKey = "odk_aaaaaaaa_" + "a".repeat(20);
export const answer = env.CLIENT_ANSWER, thought = env.CLIENT_THOUGHT, conclusion = env.CLIENT_CONCLUSION;
export const says = "scripted", calls = "scripted-tools", thinks = "scripted-thinking", talks = "smollm2:135m";
export const embeds = "minilm", echo = "echo", endless = "endless", absent = "no-such-model";
export const ask = [{ role: "user", content: "Say it." }];
export const callText = 'call get_weather {"city": "Paris"}';
export const weather = "sunny, 21 degrees";
export const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
export const citySchema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["city", "is_capital"],
  additionalProperties: false,
};
export const picture =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const freeMs = 10_000;

const features = [];
export const feature = (name, run) => features.push([name, run]);
export class NotOffered extends Error {}

export async function run(...packages) {
  const version = (name) => JSON.parse(readFileSync(`${env.CLIENT_FOLDER}/node_modules/${name}/package.json`)).version;
  console.log(JSON.stringify({ versions: Object.fromEntries(packages.map((name) => [name, version(name)])) }));
  const wanted = (env.CLIENT_FEATURES ?? "").split(/\s+/).filter(Boolean);
  for (const [name, work] of features) {
    if (wanted.length && !wanted.includes(name)) continue;
    const began = performance.now();
    const row = { feature: name, outcome: "passed" };
    try {
      await work();
    } catch (error) {
      row.outcome = error instanceof NotOffered ? "not offered" : "failed";
      row.why = `${error?.name}: ${error?.message}`.slice(0, 600);
      if (row.outcome === "failed") console.error(error);
    }
    row.took_s = Math.round((performance.now() - began) / 10) / 100;
    console.log(JSON.stringify(row));
  }
  process.exit(0);
}

export async function refused(work, ...words) {
  try {
    await work();
  } catch (error) {
    const told = [];
    for (let cause = error; cause; cause = cause.cause ?? cause.lastError)
      told.push(`${cause.name} ${cause.message} ${cause.status ?? cause.statusCode ?? cause.status_code ?? ""}`);
    if (!words.some((word) => told.join(" ").toLowerCase().includes(word.toLowerCase())))
      throw new Error(`none of ${words} in: ${told.join(" | ")}`);
    return;
  }
  throw new Error(`nothing was raised; expected ${words}`);
}

export async function freed(model) {
  for (const end = Date.now() + freeMs; ; ) {
    const { models } = await (await fetch(`${url}/api/ps`)).json();
    if (!models.some((one) => one.name.split(":")[0] === model && one.slots_busy)) return;
    if (Date.now() > end) throw new Error(`${model} still works ${freeMs} ms after the client left`);
    await new Promise((go) => setTimeout(go, 100));
  }
}
