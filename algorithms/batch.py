"""A step's rollouts, as the store hands them over -> the samples the learners take, and what there is to tell of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.shaping import overlong_penalty
from raygent.algorithms.trajectory import Node, Trajectory, build, paths
from raygent.algorithms.verl_names import ADVANTAGES
from raygent.config import Config
from raygent.records import SUCCEEDED, UPSTREAM, Sample

LISTS = ["prompt_token_ids", "response_token_ids", "logprobs", "policy_versions"]
PLAIN = ["rollout_id", "sequence", "agent", "temperature", "trainable", "own_tokens"]
REPEATED = 4  # tokens of a run that counts as repeated
# Metrics that a batch without a valid rollout has not:
OF_ROLLOUTS = {"reward", "reward_std", "turns", "prompt_length", "response_length", "branch_rate", "repetition"}
MOST_AGENTS = 50  # that the metrics tell of one by one
Row = dict[str, Any]
Baselines = dict[str, dict[str | None, float]]  # see _baselines()
Pools = dict[tuple[str, str], list["Entry"]]  # see _pools()
Measure = Callable[[str, list[Sample]], list[np.ndarray]]


@dataclass
class Entry:
    """What one agent did in one rollout, and what it got for it; no trajectory: no trained agent acted."""

    rollout: Row
    trajectory: Trajectory | None
    reward: float
    turn_rewards: dict[int, float]  # by the sequence of the call, one that may be trained
    # Float32, of each of the nodes' tokens, in the order of the calls:
    measured: dict[str, np.ndarray] = field(default_factory=dict)  # "current", "reference", "values"
    advantages: np.ndarray | None = None  # None: it is left out, as where its group has no signal
    returns: np.ndarray | None = None  # what the critic has to learn

    @property
    def nodes(self) -> list[Node]:
        """The calls that may be trained."""
        return self.trajectory.trainable if self.trajectory else []

    def length(self) -> int:
        return sum(node.response_length for node in self.nodes)


@dataclass
class Draft:
    """The samples of an entry, and which of its tokens each trains, in the order of both."""

    entry: Entry
    tokens: list[np.ndarray]
    samples: list[Sample]

    def fill(self, kl_in_loss: bool) -> None:
        """Hand the entry's advantages, what its critic has to learn, and what the loss compares with, to the samples."""
        entry = self.entry
        for sample, tokens in zip(self.samples, self.tokens, strict=True):
            if entry.advantages is not None:
                sample.advantages = _on_masked(sample, entry.advantages[tokens])
            if entry.returns is not None:
                sample.values = _on_masked(sample, entry.measured["values"][tokens])
                sample.returns = _on_masked(sample, entry.returns[tokens])
            if kl_in_loss:
                sample.reference = _on_masked(sample, entry.measured["reference"][tokens])


def _on_masked(sample: Sample, values: np.ndarray) -> np.ndarray:
    """`values` of the masked tokens of `sample`, at their places: float32 [T], else 0."""
    whole = np.zeros(len(sample), np.float32)
    whole[sample.loss_mask] = values
    return whole


def make_samples(
    tables: dict[str, pa.Table],
    config: Config,
    greedy: dict[str, pa.Table] | None = None,
    measure: Measure | None = None,
) -> tuple[list[Sample], dict[str, float]]:
    """Trajectories, advantages once over the whole batch per (rollout, agent), then samples; with the batch's metrics.

    tables: `rollouts`, `calls` and `rewards` of ended rollouts and their winning attempts. `greedy`: those of the groups'
    greedy runs. `measure`: asked for each of `config.measures` what it is of samples, float32 [T] each. Every rollout with an
    outcome takes part in its group's mean, also one whose agent failed; those lost to infrastructure do not. Where the
    algorithm compares groups, one with fewer than `algorithm.min_group` of them is dropped and counted, and with
    `algorithm.drop_flat_groups` those without signal are left out of the loss, and counted.
    """
    baselines = _baselines(greedy, config) if greedy else {}
    entries, sizes, small, seen = _entries(tables, config, baselines)
    pools = _pools(entries)
    rows = _compared(pools, config)
    compared = {id(entry) for entry, _ in rows}
    drafts = [
        Draft(entry, trained_tokens(entry.trajectory), to_samples(entry.trajectory, entry.rollout["group_id"], 0.0))
        for entry in entries
        if entry.trajectory and (id(entry) in compared or not config.algorithm.drop_flat_groups)
    ]
    if whole := [sample for draft in drafts for sample in draft.samples]:
        for what in config.measures:
            assert measure
            _note_measured(what, drafts, measure(what, whole))
    _set_advantages(rows, baselines, config)

    kept = [draft for draft in drafts if draft.entry.advantages is not None or not config.algorithm.drop_flat_groups]
    for draft in kept:
        draft.fill(config.algorithm.kl_in_loss)
    samples = [sample for draft in kept for sample in draft.samples]
    weigh(samples, config)
    used = {entry.rollout["group_id"] for entry in entries if entry.advantages is not None}
    asked = set(tables["rollouts"]["group_id"].to_pylist())
    valid = list({entry.rollout["rollout_id"]: entry.rollout for entry in entries}.values())
    return samples, _metrics(tables, valid, entries, samples, seen) | {
        "groups": float(len(asked)),
        "groups_dropped": float(len(small) + len(asked - sizes.keys())),
        "groups_flat": float(len(sizes.keys() - small - (used & _groups_with_signal(pools, config)))),
    }


def _note_measured(what: str, drafts: list[Draft], measured: list[np.ndarray]) -> None:
    """Note what was measured of the samples, in the order of `drafts`, with the tokens of their entries."""
    left = iter(measured)
    for draft in drafts:
        values = draft.entry.measured[what] = np.zeros(draft.entry.length(), np.float32)
        for sample, tokens in zip(draft.samples, draft.tokens, strict=True):
            values[tokens] = next(left)[sample.loss_mask]


def lacking_groups(tables: dict[str, pa.Table], config: Config) -> int:
    """How many more groups with signal a step of `algorithm.tasks_per_step` wants."""
    entries, *_ = _entries(tables, config, None)
    return max(0, config.algorithm.tasks_per_step - len(_groups_with_signal(_pools(entries), config)))


def _entries(
    tables: dict[str, pa.Table], config: Config, baselines: Baselines | None
) -> tuple[list[Entry], Counter[str], set[str], list[Trajectory]]:
    """What trained agents did in the groups that are kept; the size of every group; those that are too small; and what all agents
    did in the others. `baselines` None: greedy rollouts are still to come, and no group is too small for want of one."""
    rollouts = _ended(tables)
    sizes = Counter(row["group_id"] for row in rollouts)
    least = config.algorithm.min_group if _compares_groups(config) else 1
    without = sizes.keys() - baselines if baselines is not None and config.named_algorithm.needs_greedy else set()
    small = {group for group, size in sizes.items() if size < least} | without
    entries, seen = _acted([row for row in rollouts if row["group_id"] not in small], tables, config)
    return entries, sizes, small, seen


def _ended(tables: dict[str, pa.Table]) -> list[Row]:
    """The rollouts that have an outcome."""
    return [row for row in tables["rollouts"].to_pylist() if row["status"] in ("succeeded", "failed")]


def _acted(rollouts: list[Row], tables: dict[str, pa.Table], config: Config) -> tuple[list[Entry], list[Trajectory]]:
    """What trained agents did in `rollouts` and got for it, and what all agents did."""
    calls = _calls(tables["calls"])
    of_agents, of_turns = agent_rewards(tables["rewards"]), _turn_rewards(tables["rewards"], calls)
    entries: list[Entry] = []
    seen: list[Trajectory] = []
    for row in rollouts:
        name, succeeded, whole = row["rollout_id"], row["status"] == "succeeded", float(row["reward"])
        everyone = build(calls[name])
        seen += everyone
        acted = [item for item in everyone if config.trains(item.agent)]
        for item in acted:  # a failed rollout has grader.failed_reward, all of it
            reward = of_agents.get((name, item.agent), whole) if succeeded else whole
            reward += overlong_penalty(sum(node.response_length for node in item.nodes), config.algorithm)
            by_turn = _on_trained(item, of_turns.get(name, {})) if succeeded else {}
            entries.append(Entry(row, item, _exact(reward), {call: _exact(value) for call, value in by_turn.items()}))
        if not acted:
            entries.append(Entry(row, None, _exact(whole), {}))
    return entries, seen


def _exact(reward: float) -> float:
    """`reward` to 12 digits: 0.1 + 0.2 is no better than 0.3, neither for who wins nor for whether a group has signal."""
    return float(f"{reward:.12g}")


def _on_trained(trajectory: Trajectory, rewards: dict[int, float]) -> dict[int, float]:
    """The rewards of an agent's calls on those that may be trained: one of another call goes to the last of them before it, and to
    none where there is none, for nothing that is trained had a part in it."""
    found: dict[int, float] = {}
    trained = [node.call["sequence"] for node in trajectory.trainable]
    for sequence in sorted(rewards.keys() & {node.call["sequence"] for node in trajectory.nodes}):
        if before := bisect_right(trained, sequence):
            found[trained[before - 1]] = found.get(trained[before - 1], 0.0) + rewards[sequence]
    return found


def _compared(pools: Pools, config: Config) -> list[tuple[Entry, str]]:
    """Those that advantages are computed of, each with the name of what it is compared within. Where groups are compared these are
    not those that nothing is to be compared with, nor, with `algorithm.drop_flat_groups`, those that tell nothing."""
    if _compares_groups(config):
        every = not config.algorithm.drop_flat_groups
        pools = {
            name: members
            for name, members in pools.items()
            if (every and len(members) > 1) or _has_signal(members, config)
        }
    return [(entry, f"{group}/{agent}") for (group, agent), members in pools.items() for entry in members]


def _set_advantages(rows: list[tuple[Entry, str]], baselines: Baselines, config: Config) -> None:
    """Set the advantages, and what the critic has to learn. Those of a row that the algorithm leaves out, all nan, stay None."""
    algorithm, settings = config.named_algorithm, config.algorithm
    if not any(entry.length() for entry, _ in rows):
        return
    episodes = to_episodes(rows, baselines, config)
    found = (
        estimate(settings.advantage, episodes, settings)
        if settings.advantage
        else algorithm.advantages(episodes, settings)
    )
    returns = algorithm.returns(episodes, settings) if algorithm.returns else np.zeros_like(found)
    left_out = np.isnan(found).all(-1)
    kept = episodes.mask & ~left_out[:, None] if found.shape == episodes.mask.shape else episodes.mask
    for what, values in (("advantages", found), ("returns", returns)):
        if values.shape != episodes.mask.shape or not np.isfinite(values[kept]).all():
            raise ValueError(
                f"algorithm.name: the {what} of {settings.name} are {values.dtype} {list(values.shape)}; they must be "
                f"{list(episodes.mask.shape)} and finite but for rows that are left out, all nan"
            )
    for row, (entry, _) in enumerate(rows):
        if not left_out[row]:
            entry.advantages = found[row, : entry.length()].astype(np.float32)
            entry.returns = returns[row, : entry.length()].astype(np.float32) if algorithm.returns else None


def _compares_groups(config: Config) -> bool:
    advantage = config.algorithm.advantage
    return ADVANTAGES[advantage] if advantage else config.named_algorithm.compares_groups


def _pools(entries: list[Entry]) -> Pools:
    """Who is compared with whom: the rollouts of a group, agent by agent.

    A rollout in which no trained agent acted got its reward all the same: it counts in the comparison of every agent.
    """
    acting: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.trajectory:
            acting[entry.rollout["group_id"]].add(entry.trajectory.agent)
    pools: Pools = defaultdict(list)
    for entry in entries:
        group = entry.rollout["group_id"]
        for agent in [entry.trajectory.agent] if entry.trajectory else sorted(acting[group]):
            pools[group, agent].append(entry)
    return pools


def _groups_with_signal(pools: Pools, config: Config) -> set[str]:
    """The groups with signal: all, where rollouts are not compared with others of their group."""
    every = not _compares_groups(config)
    return {group for (group, _), members in pools.items() if every or _has_signal(members, config)}


def _has_signal(members: list[Entry], config: Config) -> bool:
    """Whether the members of a group got different rewards, the KL in them (`algorithm.kl_in`) aside."""
    if config.algorithm.credit == "turn":
        return len({(entry.reward, *sorted(entry.turn_rewards.items())) for entry in members}) > 1
    return len({entry.reward for entry in members}) > 1


def to_episodes(rows: list[tuple[Entry, str]], baselines: Baselines, config: Config) -> Episodes:
    """The table of `rows`, each an entry and what it is compared within."""
    longest = max(1, *(entry.length() for entry, _ in rows))
    rewards, mask = np.full((len(rows), longest), np.nan), np.zeros((len(rows), longest), bool)
    turns = np.full((len(rows), longest), -1, np.int32)
    for row, (entry, _) in enumerate(rows):
        end = 0
        for turn, node in enumerate(entry.nodes):
            start, end = end, end + node.response_length
            mask[row, start:end], turns[row, start:end] = True, turn
            if config.algorithm.credit == "turn" and node.call["sequence"] in entry.turn_rewards:
                rewards[row, end - 1] = entry.turn_rewards[node.call["sequence"]]
        last = max(end - 1, 0)
        rewards[row, last] = entry.reward + np.nan_to_num(rewards[row, last])
    greedy = np.array([_baseline(entry, baselines) for entry, _ in rows])
    sampled = np.zeros(mask.shape, np.float32)
    measured = {what: np.zeros(mask.shape, np.float32) for what in config.measures}
    for row, (entry, _) in enumerate(rows):
        if entry.length():
            sampled[row, : entry.length()] = np.concatenate([node.call["logprobs"] for node in entry.nodes])
            for what, table in measured.items():
                table[row, : entry.length()] = entry.measured[what]
    groups = np.array([name for _, name in rows], object)
    return Episodes(rewards, mask, turns, groups, greedy, sampled, **measured)


def to_samples(trajectory: Trajectory, group_id: str, advantages: np.ndarray | float) -> list[Sample]:
    """One sample a path, its mask on the sampled tokens that this path trains and that may be trained.

    `advantages`: of each such token, in the order of the calls, or of all of them. A path that trains nothing gives no
    sample. The weights are not set yet: see weigh().
    """
    every = np.broadcast_to(np.float32(advantages), sum(node.response_length for node in trajectory.trainable))
    places = iter(trained_tokens(trajectory))
    samples = []
    for path in paths(trajectory):
        tokens = path[-1][0].tokens
        mask = np.zeros(len(tokens), bool)
        logprobs, gains = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
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
            gains[mask] = every[next(places)]
            rollout, agent = trajectory.rollout_id, trajectory.agent
            samples.append(Sample(rollout, group_id, agent, tokens, mask, logprobs, gains, versions, temperature))
    return samples


def trained_tokens(trajectory: Trajectory) -> list[np.ndarray]:
    """Of each sample of to_samples() its masked tokens, by their number among all that may be trained, in the order of the calls."""
    ends = np.cumsum([node.response_length for node in trajectory.trainable])
    own = {
        id(node): np.arange(end - node.response_length, end)
        for node, end in zip(trajectory.trainable, ends, strict=True)
    }
    mine = [[own[id(node)] for node, trains in path if trains and id(node) in own] for path in paths(trajectory)]
    return [np.concatenate(numbers) for numbers in mine if numbers]


def weigh(samples: list[Sample], config: Config) -> None:
    """Set each sample's weight a token, by `algorithm.aggregation`, and its share of the batch. With R rollouts:

    - "rollout": each rollout counts the same, spread evenly over its tokens, however many samples, turns or agents it split
      into (GRPO's own mean over sequences of the mean over tokens, with a rollout for a sequence);
    - "token": each token counts the same;
    - "constant": each token counts 1 / (R x `algorithm.horizon`), whatever the lengths.

    The shares of a policy sum to the part of the rollouts that it acted in (with "token" to its part of the tokens), by which the
    learner divides: so a policy is weighed as though it were trained alone (and a critic, one for all policies, counts a rollout once
    for each that acted in it). But for "constant", so do weight x masked tokens.
    """
    aggregation, tokens = config.algorithm.aggregation, Counter[tuple[str, str]]()

    def whole_of(sample: Sample) -> tuple[str, str]:
        """What a policy did in a rollout."""
        return sample.rollout_id, config.policy_of(sample.agent)

    for sample in samples:
        tokens[whole_of(sample)] += int(sample.loss_mask.sum())
    every, rollouts = tokens.total(), len({sample.rollout_id for sample in samples})
    for sample in samples:
        mine, own = int(sample.loss_mask.sum()), tokens[whole_of(sample)]
        if aggregation == "token":
            sample.weight, sample.share = 1 / every, mine / every
        else:
            sample.weight, sample.share = 1 / rollouts / own, mine / rollouts / own
        if aggregation == "constant":
            horizon = config.algorithm.horizon or config.model.max_tokens
            assert horizon  # Config sees to it
            sample.weight = 1 / rollouts / horizon


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


def agent_rewards(rewards: pa.Table) -> dict[tuple[str, str], float]:
    """Rewards given to one agent rather than to the rollout: the last of each. Those of other names are told, not trained."""
    rows = rewards.select(["rollout_id", "name", "agent", "value", "call_sequence", "sequence"]).to_pylist()
    own = [row for row in rows if row["agent"] and row["name"] == "reward" and row["call_sequence"] < 0]
    return {(row["rollout_id"], row["agent"]): row["value"] for row in sorted(own, key=lambda row: row["sequence"])}


def _turn_rewards(rewards: pa.Table, calls: dict[str, list[Row]]) -> dict[str, dict[int, float]]:
    """Rewards given to one call, by rollout and the call's sequence: the last of each. One of a call that was never made counts
    for nothing."""
    rows = rewards.select(["rollout_id", "name", "agent", "value", "call_sequence", "sequence"]).to_pylist()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["sequence"]):
        if row["name"] != "reward" or row["call_sequence"] < 0:
            continue
        made = sorted(call["sequence"] for call in calls[row["rollout_id"]] if row["agent"] in ("", call["agent"]))
        if row["call_sequence"] < len(made):
            found[row["rollout_id"]][made[row["call_sequence"]]] = row["value"]
    return found


def _baselines(greedy: dict[str, pa.Table], config: Config) -> Baselines:
    """By group what each trained agent got in its greedy rollout, and, under None, the rollout's reward."""
    rollouts = _ended(greedy)
    found: Baselines = {row["group_id"]: {None: row["reward"]} for row in rollouts}
    for entry in _acted(rollouts, greedy, config)[0]:
        if entry.trajectory:
            found[entry.rollout["group_id"]][entry.trajectory.agent] = entry.reward
    return found


def _baseline(entry: Entry, baselines: Baselines) -> float:
    """What its agent got in the greedy rollout, else the rollout's reward there; nan where there is none."""
    found = baselines.get(entry.rollout["group_id"], {})
    agent = entry.trajectory.agent if entry.trajectory else None
    return found.get(agent, found.get(None, np.nan))


def _metrics(
    tables: dict[str, pa.Table],
    valid: list[Row],
    entries: list[Entry],
    samples: list[Sample],
    seen: list[Trajectory],
) -> dict[str, float]:
    """`reward` and `turns` (calls a rollout) are of the rollouts in kept groups, `attempts_not_won` of all, all of the calls and
    `tokens_sampled` of every winning attempt, whichever agent acted. An attempt that did not win failed for
    infrastructure's sake, was given up when the run was stopped, or was undone by a rewind: the tables do not tell which.
    """
    rewards, calls = [row["reward"] for row in valid], tables["calls"]
    tried = [row for row in tables["rollouts"].select(["status", "attempts"]).to_pylist() if row["status"] != "dropped"]
    sampled = calls.filter(pc.invert(pc.starts_with(calls["policy"], UPSTREAM)))
    turns = Counter(calls["rollout_id"].to_pylist())
    trajectories = [entry.trajectory for entry in entries if entry.trajectory]
    versions = [sample.policy_versions[sample.loss_mask] for sample in samples]
    metrics = {
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else 0.0,
        "rollouts": float(len(tables["rollouts"])),
        "rollouts_valid": float(len(valid)),
        "rollouts_trained": float(len({sample.rollout_id for sample in samples})),
        "samples": float(len(samples)),
        "turns": _mean([turns[row["rollout_id"]] for row in valid]),
        "prompt_length": _mean(pc.list_value_length(sampled["prompt_token_ids"])),
        "response_length": _mean(pc.list_value_length(sampled["response_token_ids"])),
        "tokens_sampled": float(len(sampled["response_token_ids"].combine_chunks().flatten())),
        "tokens_trained": float(sum(map(len, versions))),
        "branches": float(sum(trajectory.branches for trajectory in trajectories)),
        "continued": float(sum(node.call["own_tokens"] > 0 for item in trajectories for node in item.nodes)),
        "branch_rate": _mean([float(node.parent is None) for item in trajectories for node in item.nodes[1:]]),
        "repetition": _mean(
            [repetition(node.tokens[node.prompt_length :]) for item in trajectories for node in item.nodes]
        ),
        "attempts_not_won": float(sum(row["attempts"] - (row["status"] != "lost") for row in tried)),
    }
    if versions:
        every = np.concatenate(versions)
        metrics |= {"version_oldest": float(every.min()), "version_mean": float(every.mean())}
    by_agent: Counter[str] = Counter()
    seen = [item for item in seen if any(len(node.tokens) for node in item.nodes)]  # an upstream's calls have none
    names = set(sorted({item.agent for item in seen})[:MOST_AGENTS])  # a client may name as many as it likes
    for item in (item for item in seen if item.agent in names):
        by_agent[f"agents/{item.agent}/calls"] += len(item.nodes)
        by_agent[f"agents/{item.agent}/branches"] += item.branches
        by_agent[f"agents/{item.agent}/continued"] += sum(node.call["own_tokens"] > 0 for node in item.nodes)
    metrics = {name: value for name, value in metrics.items() if valid or name not in OF_ROLLOUTS}
    return (
        metrics
        | failed_by_outcome(tables["rollouts"])
        | {name: float(count) for name, count in by_agent.items()}
        | _upstreams(calls)
    )


def failed_by_outcome(rollouts: pa.Table) -> dict[str, float]:
    """`failed/OUTCOME`: how many rollouts ended with each outcome but success; `failed/lost`: those infrastructure lost."""
    rows = rollouts.select(["status", "outcome"]).to_pylist()
    outcomes = Counter("lost" if row["status"] == "lost" else row["outcome"] for row in rows)
    return {
        f"failed/{outcome}": float(count) for outcome, count in outcomes.items() if outcome not in (None, "", SUCCEEDED)
    }


def repetition(tokens: np.ndarray) -> float:
    """How many of the runs of REPEATED tokens have been there before, 0 to 1; 0 where there are too few tokens."""
    if len(tokens) <= REPEATED:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(tokens, REPEATED)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def _upstreams(calls: pa.Table) -> dict[str, float]:
    """The calls that upstreams answered, and their cost in dollars."""
    by_policy = calls.group_by("policy").aggregate([("cost", "count"), ("cost", "sum")]).to_pylist()
    asked = [(row["policy"].partition(":")[2], row) for row in by_policy if row["policy"].startswith(UPSTREAM)]
    counts = {f"upstream/{name}/calls": float(row["cost_count"]) for name, row in asked}
    return counts | {f"upstream/{name}/cost": row["cost_sum"] for name, row in asked}


def _mean(values: list[float] | pa.ChunkedArray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
