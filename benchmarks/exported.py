"""Does an exported checkpoint say under plain `vllm serve` what the run's own engine said?

    uv run python benchmarks/exported.py CONFIG [section.key=value ...] [--calls N]

Of the finished `raygent train` with these arguments (full weights) it takes calls that the engine answered greedily with the
weights of the newest checkpoint, those of the last evaluation, asks `vllm serve` on that checkpoint for as many tokens behind the
same prompts' tokens, and compares them; benchmarks/results/exported.json has the count. A reply's end is one of its tokens.
Calls with tools are left out: vLLM samples those with a strict schema under a grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import httpx
import pyarrow.compute as pc
import pyarrow.dataset as ds
from gateway_cost import vllm_serve
from whole_runs import RESULTS, save

from raygent.actors.checkpoint import latest_checkpoint
from raygent.config import POLICY, load

COLUMNS = ["request", "prompt_token_ids", "response_token_ids", "policy_versions", "temperature"]
PARALLEL = 16


async def replies(url: str, calls: list[dict[str, Any]]) -> list[list[int]]:
    """Tokens of what the server says after each call's prompt."""
    turns = asyncio.Semaphore(PARALLEL)

    async def reply(call: dict[str, Any]) -> list[int]:
        body = {
            "model": POLICY,
            "prompt": call["prompt_token_ids"],
            "temperature": 0,
            "max_tokens": len(call["response_token_ids"]),
            "return_token_ids": True,
        }
        async with turns:
            answer = await client.post("/v1/completions", json=body)
        return answer.raise_for_status().json()["choices"][0]["token_ids"]

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return list(await asyncio.gather(*map(reply, calls)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--calls", type=int, default=500)
    given = parser.parse_intermixed_args()
    config = load(given.config, given.overrides)
    run = config.run_directory
    checkpoint = latest_checkpoint(run)
    if checkpoint is None or config.adapters:
        raise SystemExit(f"{run}: no checkpoint with whole weights")
    table = ds.dataset(run / "store" / "calls").to_table(COLUMNS, filter=pc.field("temperature") == 0)
    calls = [call for call in table.to_pylist() if set(call["policy_versions"]) == {checkpoint.version}]
    calls = [call for call in calls if "tools" not in json.loads(call["request"])][: given.calls]
    if not calls:
        raise SystemExit(f"{run}: no greedy call was answered with the weights of {checkpoint.path.name}")
    config.model.path = str(checkpoint.path)
    with vllm_serve(config) as (url, _, wait):
        wait()
        found = asyncio.run(replies(url, calls))
    same = sum(reply == call["response_token_ids"] for reply, call in zip(found, calls, strict=True))
    tokens = sum(len(call["response_token_ids"]) for call in calls)
    print(
        f"{checkpoint.path.name}: {same} of {len(calls)} greedy replies ({tokens} tokens) are the same under vllm serve"
    )
    told = {"run": config.run.name, "step": checkpoint.step, "replies": len(calls), "tokens": tokens, "same": same}
    save(RESULTS / "exported.json", told)


if __name__ == "__main__":
    main()
