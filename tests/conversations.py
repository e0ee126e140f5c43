"""Conversations of agents with a model, written down as the store's tables hold them: for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from raygent.config import Config
from raygent.records import SCHEMAS, Call, Reward, to_batch


def config(**sections: dict[str, Any]) -> Config:
    """A valid configuration that names no file; `algorithm={"kl": 0.1}` and the like change it."""
    needed: dict[str, Any] = {"model": {"path": "none"}, "agent": {"run": "agent:run"}, "data": {"train": "none"}}
    return Config.model_validate(needed | sections)


def rollout(rollout_id: str, group_id: str, reward: float, status: str = "succeeded") -> dict[str, Any]:
    """A row of `rollouts`, with what matters to a batch."""
    return {
        "rollout_id": rollout_id,
        "task_id": group_id,
        "group_id": group_id,
        "mode": "train",
        "step": 0,
        "index": 0,
        "input": "null",
        "private": "null",
        "resource_version": 0,
        "prompts": "{}",
        "status": status,
        "outcome": {"succeeded": "succeeded", "failed": "agent_error"}.get(status, "engine_lost"),
        "winning_attempt": 1,
        "attempts": 1,
        "reward": reward,
        "trained_step": -1,
        "queued": 0.0,
        "ended": 1.0,
    }


def call(rollout_id: str, sequence: int, prompt: Iterable[int], response: Iterable[int], **fields: Any) -> Call:
    """One call. The number of its first sampled token within the rollout, `first`, gives each its own logprob and version."""
    prompt, response = [int(token) for token in prompt], [int(token) for token in response]
    numbers = range(fields.pop("first", 0), 10**6)[: len(response)]
    plain: dict[str, Any] = {
        "attempt": 1,
        "source": "engine",
        "source_sequence": sequence,
        "request_id": f"{rollout_id}-{sequence}",
        "choice": 0,
        "agent": "main",
        "policy": "policy",
        "api": "chat",
        "request": "{}",
        "logprobs": [logprob_of(number) for number in numbers],
        "policy_versions": list(numbers),
        "sampling": "{}",
        "temperature": 1.0,
        "finish_reason": "stop",
        "trainable": True,
        "untrainable_why": "",
        "own_tokens": 0,
        "started": float(sequence),
        "finished": float(sequence) + 0.5,
    }
    return Call(rollout_id, prompt_token_ids=prompt, response_token_ids=response, sequence=sequence, **(plain | fields))


def rows(calls: list[Call]) -> list[dict[str, Any]]:
    """As the store hands them over."""
    return [asdict(one) for one in calls]


def logprob_of(number: int) -> float:
    """A logprob that names the `number`-th sampled token of a rollout, exact in float32."""
    return -(number + 1) / 1024


def reward(
    rollout_id: str, value: float, agent: str, sequence: int = 0, call_sequence: int = -1, name: str = "reward"
) -> Reward:
    return Reward(
        rollout_id, 1, "worker", sequence, value, name, agent=agent, call_sequence=call_sequence, sequence=sequence
    )


def tables(rollouts: list[Any], calls: list[Call], rewards: list[Reward] | None = None) -> dict[str, pa.Table]:
    rows = {"rollouts": rollouts, "attempts": [], "calls": calls, "rewards": rewards or []}
    found = {name: pa.Table.from_batches([to_batch(SCHEMAS[name], records)]) for name, records in rows.items()}
    return found | {"lost": found["attempts"]}


TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=3)  # so few that conversations meet by chance


@st.composite
def conversations(draw: st.DrawFn, rollout_id: str = "r") -> list[Call]:
    """One rollout's calls: several agents, n > 1, turns that extend, edit or cut off what was said, untrainable calls."""
    calls: list[Call] = []
    sampled = 0
    for _ in range(draw(st.integers(0, 6))):
        agent = draw(st.sampled_from(["main", "main", "helper"]))
        said = [earlier.prompt_token_ids + earlier.response_token_ids for earlier in calls]
        prompt = list(draw(st.sampled_from(said))) if said and draw(st.integers(0, 4)) else [draw(st.integers(0, 2))]
        change = draw(st.sampled_from(["none", "none", "none", "edit", "cut"]))
        if change == "edit":
            prompt[draw(st.integers(0, len(prompt) - 1))] = draw(st.integers(0, 2))
        elif change == "cut":
            prompt = prompt[: draw(st.integers(1, len(prompt)))]
        prompt += draw(TOKENS)
        trainable, temperature = draw(st.integers(0, 3)) > 0, draw(st.sampled_from([0.5, 1.0]))
        for choice in range(draw(st.sampled_from([1, 1, 2]))):
            response = draw(TOKENS)
            fields = {"agent": agent, "trainable": trainable, "temperature": temperature, "choice": choice}
            calls.append(call(rollout_id, len(calls), prompt, response, first=sampled, **fields))
            sampled += len(response)
    return calls


def branching(rng: np.random.Generator, rollout_id: str, vocabulary: int, turns: int, longest: int) -> list[Call]:
    """A conversation of `turns` calls that now goes on, now begins anew or goes back to an earlier turn."""
    calls: list[Call] = []
    for turn in range(turns):
        prompt = rng.integers(3, vocabulary, rng.integers(2, longest)).tolist()
        if calls and rng.random() < 0.8:
            parent = calls[rng.integers(len(calls))] if rng.random() < 0.4 else calls[-1]
            prompt = parent.prompt_token_ids + parent.response_token_ids + prompt
        response = rng.integers(3, vocabulary, rng.integers(1, longest)).tolist()
        fields = {"temperature": float(rng.choice([1.0, 0.7])), "trainable": bool(rng.random() < 0.9)}
        calls.append(call(rollout_id, turn, prompt, response, **fields))
    return calls
