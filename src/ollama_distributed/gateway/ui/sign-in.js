// Signs in with name and password. The session comes as a cookie that no script can read.

const form = document.getElementById("form");
const user = document.getElementById("user");
const password = document.getElementById("password");
const button = document.getElementById("submit");
const problem = document.getElementById("problem");
const told = document.getElementById("told");

document.getElementById("host").textContent = location.host;
if (location.hash === "#signed-out") {
  told.textContent = "You are signed out.";
  history.replaceState(null, "", location.pathname);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (button.disabled) return;
  told.textContent = problem.textContent = "";
  button.disabled = true;
  try {
    const refused = await signIn();
    if (!refused) {
      location.replace("/ui/");
      return; // the button stays as it is until the page is gone
    }
    problem.textContent = refused;
  } catch {
    problem.textContent = "This node does not answer. Is it running, and the network up?";
  }
  button.disabled = false;
  password.focus();
  password.select();
});

/** What went wrong, in words; empty: nothing. */
async function signIn() {
  const answer = await fetch("/api/v1/auth/login", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ name: user.value.trim(), password: password.value, cookie: true }),
  });
  if (answer.ok) return "";
  const error = await errorOf(answer);
  const wait = Number(answer.headers.get("Retry-After"));
  return wait > 0 ? `${error} (${wait} s)` : error;
}

async function errorOf(answer) {
  try {
    const text = (await answer.json()).error.message;
    return text[0].toUpperCase() + text.slice(1);
  } catch {
    return `The node answered ${answer.status}.`;
  }
}
