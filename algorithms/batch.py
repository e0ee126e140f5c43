"""A step's rollouts, as the store hands them over -> the samples the learners take, and what there is to tell of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygent.algorithms import grpo
from raygent.algorithms.trajectory import Trajectory, build, paths
from raygent.config import Config
from raygent.records import Sample

LISTS = ["prompt_token_ids", "response_token_ids", "logprobs", "policy_versions"]
PLAIN = ["rollout_id", "sequence", "agent", "temperature", "trainable", "own_tokens"]
MOST_AGENTS = 50  # that the metrics tell of one by one
Row = dict[str, Any]


@dataclass
class Entry:
    """What one agent did in one rollout, and what it got for it; no trajectory: no trained agent acted."""

    rollout: Row
    trajectory: Trajectory | None
    reward: float
    advantage: float = 0.0
    flat: bool = True  # its group has no signal: all rewards alike, or nobody to compare with


def make_samples(tables: dict[str, pa.Table], config: Config) -> tuple[list[Sample], dict[str, float]]:
    """Trajectories, advantages once over the whole batch per (rollout, agent), then samples; with the batch's metrics.

    tables: `rollouts`, `calls` and `rewards` of ended rollouts and their winning attempts. Every rollout with an outcome
    takes part in its group's mean, also one whose agent failed; those lost to infrastructure do not. A group with fewer
    than `algorithm.min_group` of them is dropped and counted. With `algorithm.drop_flat_groups` those without signal
    are left out of the loss, and counted.

    Weights: with R rollouts that are trained, each has the total weight 1/R, spread evenly over its trained tokens
    (GRPO's own mean over sequences of the mean over tokens, with a rollout for a sequence), however many samples, turns
    or agents it split into. So the sum over the batch of weight x masked tokens is 1.
    """
    rollouts = [row for row in tables["rollouts"].to_pylist() if row["status"] in ("succeeded", "failed")]
    sizes = Counter(row["group_id"] for row in rollouts)
    small = {group for group, size in sizes.items() if size < config.algorithm.min_group}
    valid = [row for row in rollouts if row["group_id"] not in small]

    calls = _calls(tables["calls"])
    own_rewards = _agent_rewards(tables["rewards"])
    entries: list[Entry] = []
    for row in valid:
        acted = [item for item in build(calls[row["rollout_id"]]) if config.agent.trains(item.agent)]
        own = own_rewards if row["status"] == "succeeded" else {}  # a failed one has grader.failed_reward, all of it
        for item in acted:
            entries.append(Entry(row, item, own.get((row["rollout_id"], item.agent), row["reward"])))
        if not acted:
            entries.append(Entry(row, None, row["reward"]))
    _compare(entries, config)

    samples = [
        sample
        for entry in entries
        if entry.trajectory and not (entry.flat and config.algorithm.drop_flat_groups)
        for sample in to_samples(entry.trajectory, entry.rollout["group_id"], entry.advantage)
    ]
    weigh(samples)
    with_signal = {entry.rollout["group_id"] for entry in entries if not entry.flat}
    return samples, _metrics(tables, valid, entries, samples) | {
        "groups": float(len(sizes)),
        "groups_dropped": float(len(small)),
        "groups_flat": float(len(set(sizes) - small - with_signal)),
    }


def _compare(entries: list[Entry], config: Config) -> None:
    """Set advantages: the rollouts of a group are compared agent by agent.

    A rollout in which no trained agent acted got its reward all the same: it counts in the comparison of every agent.
    """
    acting: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.trajectory:
            acting[entry.rollout["group_id"]].add(entry.trajectory.agent)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        group = entry.rollout["group_id"]
        for agent in [entry.trajectory.agent] if entry.trajectory else acting[group]:
            groups[group, agent].append(entry)

    telling = [members for members in groups.values() if len({entry.reward for entry in members}) > 1]
    if not telling:
        return
    compared = [entry for members in telling for entry in members]
    names = [str(number) for number, members in enumerate(telling) for _ in members]
    found = grpo.advantages(np.array([entry.reward for entry in compared]), names, config.algorithm.normalise_std)
    for entry, advantage in zip(compared, found.tolist(), strict=True):
        entry.advantage, entry.flat = advantage, False


def to_samples(trajectory: Trajectory, group_id: str, advantage: float) -> list[Sample]:
    """One sample a path, its mask on the sampled tokens that this path trains and that may be trained.

    A path that trains nothing gives no sample. The weights are not set yet: see weigh().
    """
    samples = []
    for path in paths(trajectory):
        tokens = path[-1][0].tokens
        mask = np.zeros(len(tokens), bool)
        logprobs = np.zeros(len(tokens), np.float32)
        versions = np.zeros(len(tokens), np.int32)
        temperature = np.ones(len(tokens), np.float32)
        for node, trains in path:
            if trains and node.call["trainable"]:
                sampled = slice(node.prompt_length, len(node.tokens))
                mask[sampled] = True
                logprobs[sampled] = node.call["logprobs"]
                versions[sampled] = node.call["policy_versions"]
                temperature[sampled] = node.call["temperature"]
        if mask.any():
            advantages = mask * np.float32(advantage)
            rollout, agent = trajectory.rollout_id, trajectory.agent
            samples.append(Sample(rollout, group_id, agent, tokens, mask, logprobs, advantages, versions, temperature))
    return samples


def weigh(samples: list[Sample]) -> None:
    """Set each sample's weight so that every rollout has the same total, and the batch the total 1."""
    tokens: Counter[str] = Counter()
    for sample in samples:
        tokens[sample.rollout_id] += int(sample.loss_mask.sum())
    for sample in samples:
        sample.weight = 1.0 / (len(tokens) * tokens[sample.rollout_id])


def _calls(table: pa.Table) -> dict[str, list[Row]]:
    """The rows of each rollout; lists are views into the table's memory, not Python lists."""
    columns = {name: table[name].to_pylist() for name in PLAIN}
    columns |= {name: _views(table[name]) for name in LISTS}
    found: dict[str, list[Row]] = defaultdict(list)
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        found[row["rollout_id"]].append(row)
    return found


def _views(column: pa.ChunkedArray) -> list[np.ndarray]:
    whole = column.combine_chunks()
    values = whole.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(whole.offsets.to_pylist())]


def _agent_rewards(rewards: pa.Table) -> dict[tuple[str, str], float]:
    """Rewards given to one agent rather than to the rollout: the last of each. Those of other names are told, not trained."""
    rows = rewards.select(["rollout_id", "name", "agent", "value", "call_sequence", "sequence"]).to_pylist()
    own = [row for row in rows if row["agent"] and row["name"] == "reward" and row["call_sequence"] < 0]
    return {(row["rollout_id"], row["agent"]): row["value"] for row in sorted(own, key=lambda row: row["sequence"])}


def _metrics(
    tables: dict[str, pa.Table], valid: list[Row], entries: list[Entry], samples: list[Sample]
) -> dict[str, float]:
    """`reward`, `turns` (calls a rollout) and `attempts_not_won` are of the rollouts in kept groups, all of the calls and
    `tokens_sampled` of every winning attempt, whichever agent acted. An attempt that did not win failed for
    infrastructure's sake, was given up when the run was stopped, or was undone by a rewind: the tables do not tell which.
    """
    rewards = [row["reward"] for row in valid]
    calls = tables["calls"]
    turns = Counter(calls["rollout_id"].to_pylist())
    trajectories = [entry.trajectory for entry in entries if entry.trajectory]
    versions = [sample.policy_versions[sample.loss_mask] for sample in samples]
    outcomes = Counter(row["outcome"] for row in tables["rollouts"].select(["outcome"]).to_pylist())
    metrics = {
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else 0.0,
        "rollouts": float(len(tables["rollouts"])),
        "rollouts_valid": float(len(valid)),
        "rollouts_trained": float(len({sample.rollout_id for sample in samples})),
        "samples": float(len(samples)),
        "turns": _mean([turns[row["rollout_id"]] for row in valid]),
        "prompt_length": _mean(pc.list_value_length(calls["prompt_token_ids"])),
        "response_length": _mean(pc.list_value_length(calls["response_token_ids"])),
        "tokens_sampled": float(len(calls["response_token_ids"].combine_chunks().flatten())),
        "tokens_trained": float(sum(map(len, versions))),
        "branches": float(sum(trajectory.branches for trajectory in trajectories)),
        "continued": float(sum(node.call["own_tokens"] > 0 for item in trajectories for node in item.nodes)),
        "attempts_not_won": float(sum(row["attempts"] - 1 for row in valid)),
    }
    if versions:
        every = np.concatenate(versions)
        metrics |= {"version_oldest": float(every.min()), "version_mean": float(every.mean())}
    failures = {
        f"failed/{outcome}": float(count)
        for outcome, count in outcomes.items()
        if outcome not in (None, "", "succeeded")
    }
    by_agent: Counter[str] = Counter()
    names = set(sorted({item.agent for item in trajectories})[:MOST_AGENTS])  # a client may name as many as it likes
    for item in (item for item in trajectories if item.agent in names):
        by_agent[f"agents/{item.agent}/calls"] += len(item.nodes)
        by_agent[f"agents/{item.agent}/branches"] += item.branches
        by_agent[f"agents/{item.agent}/continued"] += sum(node.call["own_tokens"] > 0 for node in item.nodes)
    return metrics | failures | {name: float(count) for name, count in by_agent.items()}


def _mean(values: list[float] | pa.ChunkedArray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
