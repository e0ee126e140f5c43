"""Forty thousand requests that are wrong in some way, against a real engine: what it answers, and what it costs in memory.

    uv run python benchmarks/gateway_fuzz.py [REQUESTS] [SEED] [--save]

The fuzzer is an agent like any other: it knows its base_url and key, and those of an attempt that has ended. Prints the
answers by kind and status, and the replica's resident memory after each fifth. Exit code 1 where an answer is a 5xx, an error is
not in the vendor's shape, the engine does not serve a right request afterwards, or its memory grew by more than MOST_GROWTH_MIB
behind the first fifth (2.5 KiB a request; of ten thousand, much of it would still be what each first kind of request loads).
Needs examples/sql/model (`python examples/sql/prepare.py`). --save puts what was answered into
benchmarks/results/gateway_fuzz.json.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from raygent.actors.gateway import MAX_BODY_BYTES, mint_key

PARALLEL = 16
MOST_GROWTH_MIB = 80.0
RESULTS = Path(__file__).resolve().parent / "results" / "gateway_fuzz.json"
APIS = {
    "/chat/completions": {"model": "policy", "max_tokens": 2, "messages": [{"role": "user", "content": "how many ?"}]},
    "/completions": {"model": "policy", "max_tokens": 2, "prompt": "how many ?"},
    "/responses": {"model": "policy", "max_output_tokens": 2, "input": "how many ?"},
    "/messages": {"model": "policy", "max_tokens": 2, "messages": [{"role": "user", "content": "how many ?"}]},
}
OPTIONS = (
    "stream", "n", "temperature", "top_p", "top_k", "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "tools",
    "tool_choice", "response_format", "stream_options", "user", "metadata", "best_of", "echo", "system", "instructions",
    "presence_penalty", "previous_response_id", "thinking", "reasoning", "prompt_logprobs", "min_tokens", "suffix",
    "max_tokens", "max_completion_tokens", "messages", "prompt", "input", "model", "store", "include", "priority",
    "structured_outputs", "chat_template", "chat_template_kwargs", "echo", "return_token_ids", "stop_token_ids",
    "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "cache_salt", "kv_transfer_params", "vllm_xargs",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 3, 1.5, -0.5, 1e308, 2**31, 2**63, 2**70, 10**400, "", "x", "\u0000", "\ud800", "🙂" * 50, "a" * 5000,
    [], {}, [[]], [None], [1, 2, 3], ["a", "b"], {"type": "json_object"}, {"a": {"b": {"c": []}}}, [{"role": "user"}],
    [{"role": "nobody", "content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": 7}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}, {"type": "function", "function": {"name": "f"}},
    "auto", "none", "required", "json_object", {"1": 5}, {"99999999": 5}, {"x": "y"},
)  # fmt: skip

REWARD = ("value", "name", "agent", "components", "call", "other")
KINDS = {
    "json": 2, "bytes": 1, "type": 4, "value": 2, "key": 1, "ended": 1, "path": 1, "huge": 1, "model": 1, "reward": 1,
    "over": 0.02,
}  # and how often  # fmt: skip


def request(chance: random.Random, base_url: str, key: str, ended: str) -> tuple[str, str, dict[str, str], bytes]:
    """(what is wrong with it, URL, headers, body)"""
    path, right = chance.choice(list(APIS.items()))
    body, headers, url = dict(right), {"authorization": f"Bearer {key}"}, base_url + path
    root = base_url.partition("/a/")[0]
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    text = json.dumps(body)
    if kind == "json":
        text = text[: chance.randrange(len(text))]
    elif kind == "bytes":
        return kind, url, headers, chance.randbytes(chance.randint(0, 200))
    elif kind in ("type", "value"):
        for _ in range(chance.randint(1, 3)):
            body[chance.choice([*right, *OPTIONS] if kind == "value" else OPTIONS)] = chance.choice(VALUES)
        text = json.dumps(chance.choice(VALUES) if chance.random() < 0.1 else body)
    elif kind == "key":
        foreign = mint_key("another run's secret", "rollout", 1, "train", time.time() + 1e6)
        forged = chance.choice(
            ["", "rg-", "rg-AAAA.BBBB", key[:-1], key[:-2] + "AA", key + "A", "sk-" + "x" * 40, "ü", foreign]
        )
        headers = {"x-api-key": forged} if forged.isascii() else {}
        url = root + "/v1" + path if chance.random() < 0.5 else f"{root}/a/{forged or '%00'}/v1{path}"
    elif kind == "ended":
        headers, url = {"authorization": f"Bearer {ended}"}, f"{root}/a/{ended}/v1{path}"
    elif kind == "path":
        url = base_url + chance.choice(
            ["/embeddings", "/", "/../metrics", "/models/x", "/%2e%2e/tokenize", "/chat", "/agent/x" * 50]
        )
    elif kind == "huge":
        text = json.dumps(
            body | {chance.choice(["messages", "prompt", "input"]): "how " * chance.choice([5_000, 50_000, 200_000])}
        )
    elif kind == "over":
        return kind, url, headers, b" " * (MAX_BODY_BYTES + 1)
    elif kind == "reward":
        reward = {"value": 0.5, "name": "odd"} | {chance.choice(REWARD): chance.choice(VALUES) for _ in range(2)}
        return kind, base_url + "/rewards", headers, json.dumps(reward).encode("utf-8", "replace")
    elif kind == "model":
        text = json.dumps(body | {"model": chance.choice(["gpt-9", "", "a/b", "🙂", "x" * 10_000])})
    return kind, url, headers, text.encode("utf-8", "replace")


def fault(url: str, answer: httpx.Response) -> str:
    """What is wrong with an answer; "" where nothing is."""
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:200]}"
    if answer.status_code < 400:
        return ""
    try:
        whole = answer.json()
    except ValueError:
        return f"{answer.status_code}, not JSON: {answer.text[:200]}"
    error = whole.get("error") if isinstance(whole, dict) else None
    shaped = isinstance(error, dict) and isinstance(error.get("message"), str) and isinstance(error.get("type"), str)
    if not shaped or ("/v1/messages" in url and whole.get("type") != "error"):
        return f"{answer.status_code}, not in the vendor's shape: {answer.text[:200]}"
    return ""


async def fuzz(
    endpoints: list[tuple[str, str]], ended: str, requests: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """Send them, PARALLEL at a time, to the `endpoints` (base_url and key) in turn: the answers by "kind status", and the
    faults."""
    chance, answers, faults = random.Random(seed), Counter[str](), list[str]()
    todo = iter([request(chance, *endpoints[number % len(endpoints)], ended) for number in range(requests)])
    base_url, key = endpoints[-1]

    async def send(client: httpx.AsyncClient) -> None:
        for kind, url, headers, body in todo:
            answer = await client.post(url, headers=headers | {"content-type": "application/json"}, content=body)
            answers[f"{kind} {answer.status_code}"] += 1
            if wrong := fault(url, answer):
                faults.append(f"{kind} {url.rpartition('/v1')[2]} {body[:300]!r}: {wrong}")

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=PARALLEL)) as client:
        await asyncio.gather(*(send(client) for _ in range(PARALLEL)))
        right = await client.post(
            base_url + "/chat/completions", headers={"authorization": f"Bearer {key}"}, json=APIS["/chat/completions"]
        )
        if right.status_code != 200:
            faults.append(f"a right request afterwards: {right.status_code} {right.text[:200]}")
    return answers, faults


def agent(task: dict[str, Any], model: Any) -> dict[str, float]:
    """As raygent runs it: task has "requests", "seed", and "key", the file in which the key of the attempt before stands."""
    key_file = Path(task["key"])
    ended = key_file.read_text() if key_file.exists() else "rg-none"
    answers, faults = asyncio.run(fuzz([(model.base_url, model.api_key)], ended, task["requests"], task["seed"]))
    key_file.write_text(model.api_key)
    with Path(task["out"]).open("a") as out:
        out.write(json.dumps({"answers": answers, "faults": faults}) + "\n")
    return {"reward": float(not faults)}


def main(requests: int, seed: int, save: bool) -> int:
    from raygent.cluster.start import before_ray

    before_ray()
    import psutil

    from raygent.cluster.parts import Parts
    from raygent.config import load
    from raygent.records import Rollout

    rounds, told = 5, []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        out = folder / "out.jsonl"
        (folder / "tasks.jsonl").write_text('{"id": "1", "input": 0}\n')
        sql = Path(__file__).resolve().parents[1] / "examples" / "sql" / "train.toml"
        overrides = [
            f'data.train="{folder}/tasks.jsonl"', f'data.eval="{folder}/none.jsonl"', f'run.directory="{folder}"',
            f'agent.run="{Path(__file__).resolve()}:agent"', "agent.max_calls=1000000", "agent.timeout_s=3000.0", "workers.max=1",
        ]  # fmt: skip
        (folder / "none.jsonl").write_text('{"id": "2", "input": 1}\n')
        config = load(sql, overrides)
        config.grader.run = None  # the agent returns its reward
        with Parts(config, learn=False) as parts:
            (status,) = parts.engine.status()
            replica = psutil.Process(status["pid"])
            for number in range(rounds):
                task = {
                    "requests": requests // rounds,
                    "seed": seed + number,
                    "key": str(folder / "key"),
                    "out": str(out),
                }
                parts.queue([Rollout(f"fuzz-{number}", "1", str(number), "train", number, 0, task, None, 0)])
                table = parts.collect(number, "train")["rollouts"].to_pylist()
                whole = [replica, *replica.children(recursive=True)]
                told.append(sum(process.memory_info().rss for process in whole) / 2**20)
                print(f"round {number + 1}: {table[0]['outcome']}, engine {told[-1]:.0f} MiB", flush=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    answers = sum((Counter(row["answers"]) for row in rows), Counter())
    faults = [fault for row in rows for fault in row["faults"]]
    print(json.dumps(dict(sorted(answers.items()))))
    print(
        f"{sum(answers.values())} requests, {len(faults)} faults; engine {told[0]:.0f} MiB after a fifth, {told[-1]:.0f} MiB at the end"
    )
    for wrong in faults[:40]:
        print(wrong)
    if save:
        figures = {"requests": sum(answers.values()), "faults": faults, "engine_mib": told, "answers": answers}
        RESULTS.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    return 1 if faults or len(rows) < rounds or told[-1] - told[0] > MOST_GROWTH_MIB else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word != "--save"]
    sys.exit(main(*numbers, *(40_000, 0)[len(numbers) :], save="--save" in sys.argv))
