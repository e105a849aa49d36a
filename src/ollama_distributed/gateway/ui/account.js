// Says who one is and what for; all text goes in as text.

const ROLES = {
  admin: "may do everything, and change who may do what",
  operator: "runs the cluster and its models",
  user: "asks models",
  viewer: "may look, and change nothing",
  local: "a person at this machine, without signing in",
};
const VERBS = { inference: "ask", read: "look", models: "change", admin: "administer" };

const at = (id) => document.getElementById(id);

/** The answer's JSON; null where there is none for us. */
async function read(path) {
  const answer = await fetch(path, { headers: { Accept: "application/json" } });
  if (answer.status === 401) {
    location.replace("/ui/sign-in");
    return new Promise(() => {}); // this page is over
  }
  return answer.ok ? answer.json() : null;
}

function row(list, name, text, isCode = false) {
  const value = document.createElement("dd");
  value.append(isCode ? Object.assign(document.createElement("code"), { textContent: text }) : text);
  list.append(Object.assign(document.createElement("dt"), { textContent: name }), value);
}

const time = (seconds) =>
  new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

async function show() {
  const who = await read("/api/v1/auth/whoami");
  if (who === null) throw new Error("the node does not say who you are");
  const [session, version] = await Promise.all([
    who.user ? read("/api/v1/auth/session") : null,
    read("/api/v1/version"),
  ]);
  at("who").textContent = who.user || who.key_name || (who.role === "local" ? "You are at this machine" : who.role);
  at("role").textContent = `Role ${who.role}: ${ROLES[who.role] ?? "as its key says"}.`;
  const facts = at("facts");
  row(facts, "Team", who.team);
  if (who.policy) row(facts, "Policy", who.policy.name);
  if (session) {
    row(facts, "Signed in by", session.user.source === "oidc" ? "your organisation" : "password");
    row(facts, "Until", `${time(session.expires_at)}, or ${Math.round(session.idle_s / 3600)} hours unused`);
  }
  const may = new Map(); // what one may do alike stands in one line
  for (const [what, verbs] of Object.entries(who.may)) {
    const words = verbs.map((verb) => VERBS[verb] ?? verb).join(", ");
    may.set(words, [...(may.get(words) ?? []), what]);
  }
  for (const [words, whats] of may) row(at("may"), words, whats.join(", "));
  if (version) {
    const engines = (version.engines ?? []).map((one) => `${one.name} ${one.version}`.trim()).join(", ");
    at("node").textContent = `Version ${version.version}, node ${version.node || "?"}${engines && `, ${engines}`}.`;
  }
  for (const link of at("links").children) link.hidden = !(who.may[link.dataset.of] ?? []).includes("read");
  at("sign-out").hidden = !session;
  at("sign-in").hidden = Boolean(session);
  at("you").hidden = false;
}

async function signOut() {
  const session = await read("/api/v1/auth/session"); // its token may be a new one by now
  const answer = await fetch("/api/v1/auth/logout", {
    method: "POST",
    headers: { "X-CSRF-Token": session?.csrf ?? "" },
  });
  // 401, 404: it is over already.
  if (!answer.ok && session) throw new Error(`the node answered ${answer.status}; you are still signed in`);
  location.replace("/ui/sign-in#signed-out");
}

/** Does it, and says what went wrong. */
function attempt(what) {
  at("problem").textContent = "";
  what().catch((failure) => {
    const text = failure instanceof TypeError ? "this node does not answer" : failure.message;
    at("problem").textContent = `That did not work: ${text}.`;
  });
}

for (const [name, path] of [["Ollama", ""], ["OpenAI", "/v1"], ["Anthropic", ""]]) {
  row(at("addresses"), name, location.origin + path, true);
}
at("sign-out").addEventListener("click", () => attempt(signOut));
attempt(show);
