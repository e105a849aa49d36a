"""`make accept-quota`: three real nodes, one key, 10,000 tokens a minute, three times that asked for.

Clients ask all three gateways, one of them most of the time, which changes. What was had in each whole
minute of the clock is summed up from the answers; it must stay within 2 % of the limit, first with all
there, then with every coordination server stopped (SIGSTOP), when no write and no election is possible.
At the end each node is asked for the usage of all, and one is killed (SIGKILL) and asked again.

    python -m bench.quota [--minutes 2]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from tests.nodes import NodeProcess, Nodes, until

LIMIT = 10_000
OVER = 1.02
USED = 0.85
"""Of the limit, with everything there and three times as much asked for."""
CLIENTS = 12
PAUSE_S = 1.5
"""Of each client between requests, on average."""
ENGINES = "[{name: echo, kind: echo, options: {tokens_per_s: 400}}]"
WORDS = ("one", "sentence", "after", "another", "and", "so", "on", "until", "it", "ends")


class Had:
    """What was had, by minute of the clock."""

    def __init__(self) -> None:
        self.tokens: Counter[int] = Counter()
        self.answers = 0
        self.refused = 0
        self.other: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, minute: int, status: int, tokens: int) -> None:
        with self._lock:
            if status == 200:
                self.answers += 1
                self.tokens[minute] += tokens
            elif status == 429:
                self.refused += 1
            else:
                self.other[status] += 1


def ask(client: httpx.Client, chance: random.Random) -> tuple[int, int, int]:
    """(minute in which it began, status, tokens)."""
    prompt = " ".join(chance.choice(WORDS) for _ in range(chance.randint(40, 250)))
    body = {
        "model": "echo",
        "prompt": prompt,
        "stream": False,
        "options": {"num_predict": chance.randint(20, 400)},
    }
    minute = int(time.time() // 60)
    answer = client.post("/api/generate", json=body)
    if answer.status_code != 200:
        return minute, answer.status_code, 0
    told = answer.json()
    return minute, 200, told["prompt_eval_count"] + told["eval_count"]


def client(urls: list[str], key: str, had: Had, stop: threading.Event, seed: int) -> None:
    chance = random.Random(seed)
    clients = [
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30) for url in urls
    ]
    while not stop.wait(chance.expovariate(1 / PAUSE_S)):
        favourite = int(time.time() // 20) % len(clients)
        node = favourite if chance.random() < 0.8 else chance.randrange(len(clients))
        had.add(*ask(clients[node], chance))


def load(urls: list[str], key: str, minutes: int) -> Had:
    """Whole minutes of it."""
    had, stop = Had(), threading.Event()
    threads = [
        threading.Thread(target=client, args=(urls, key, had, stop, seed), daemon=True)
        for seed in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    first = int(time.time() // 60) + 1
    while time.time() < (first + minutes) * 60:
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    for minute in [minute for minute in had.tokens if not first <= minute < first + minutes]:
        del had.tokens[minute]
    return had


def told(name: str, had: Had) -> float:
    worst = max(had.tokens.values(), default=0)
    minutes = ", ".join(f"{tokens:,}" for _, tokens in sorted(had.tokens.items()))
    print(
        f"{name}: {minutes} tokens a minute of {LIMIT:,}; {had.answers} answered, "
        f"{had.refused} refused (429), others {dict(had.other)}; worst {100 * worst / LIMIT:.1f} %",
        flush=True,
    )
    return worst / LIMIT


def key_of(node: NodeProcess) -> str:
    admin = json.loads((node.data_dir / "admin.json").read_text())["key"]
    with httpx.Client(base_url=node.url, headers={"authorization": f"Bearer {admin}"}, timeout=30) as http:
        policy = {"name": "limited", "limits": {"tokens_per_minute": LIMIT}}
        http.post("/api/v1/policies", json=policy).raise_for_status()
        made = http.post("/api/v1/keys", json={"name": "quota", "role": "user", "policy": "limited"})
        made.raise_for_status()
        found: str = made.json()["key"]
        return found


def known(node: NodeProcess, key: str) -> bool:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{node.url}/api/v1/auth/whoami", headers=headers, timeout=10).status_code == 200


def servers(nodes: list[NodeProcess]) -> list[psutil.Process]:
    found = []
    for node in nodes:
        children = psutil.Process(node.pid).children(recursive=True)
        found += [child for child in children if child.name().startswith("nats")]
    return found


def usage(node: NodeProcess, key_id: str) -> tuple[int, int]:
    """Requests that were answered, and tokens, as this node says."""
    with node.admin() as sdk:
        total = sdk.usage.get(by=["node"], key=key_id).total
        return total.requests - total.errors, total.prompt_tokens + total.completion_tokens


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=int, default=2)
    minutes = parser.parse_args().minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        Nodes(Path(folder), {"OLLAMA_DISTRIBUTED_ENGINES": ENGINES}) as lab,
    ):
        nodes = [lab.serve("n1", "--listen", "127.0.0.1:0")]
        nodes += [lab.join(name, "n1", "--listen", "127.0.0.1:0") for name in ("n2", "n3")]
        with nodes[0].admin() as sdk:
            until(lambda: sum(n.status == "online" for n in sdk.nodes.list()) == 3, 60, "three nodes")
        key = key_of(nodes[0])
        until(lambda: all(known(node, key) for node in nodes), 30, "the key everywhere")
        urls = [node.url for node in nodes]
        whole = load(urls, key, minutes)
        shares = [told("all there", whole)]
        good = sum(whole.tokens.values()) >= USED * LIMIT * minutes
        stopped = servers(nodes)
        print(f"stopping {len(stopped)} coordination servers", flush=True)
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:
            down = load(urls, key, minutes)
            shares.append(told("consensus down", down))
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
        good = good and down.answers > 0 and not (whole.other or down.other)
        key_id = key.split("_")[1]
        time.sleep(5)  # copies go out every 3 s
        counts = [usage(node, key_id) for node in nodes]
        nodes[2].process.send_signal(signal.SIGKILL)
        nodes[2].process.wait()
        after = usage(nodes[0], key_id)
        print(f"usage as each node tells it: {counts}; after n3 was killed: {after}", flush=True)
        good = good and len(set(counts)) == 1 and after == counts[0]
    held = max(shares) <= OVER
    print(f"{'ok' if held and good else 'FAILED'}: at most {100 * max(shares):.1f} % of the limit")
    return 0 if held and good else 1


if __name__ == "__main__":
    sys.exit(main())
