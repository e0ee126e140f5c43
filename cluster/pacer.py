"""Which rollouts a step has, how far ahead they may be sampled, which versions a batch may hold, which version comes next."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygent.algorithms.curriculum import Groups
from raygent.cluster.digests import digest
from raygent.cluster.task_choice import refill_tasks, step_tasks
from raygent.config import Config
from raygent.records import PromptVersion, Rollout, Task, only


class Versions:
    """The policy versions ever given out, one JSON line each, append-only: a number never names two sets of weights.

    A run that goes back to a checkpoint re-uses the checkpoint's own version (its weights are equal to the bit) and
    gives the updates after it new numbers.
    """

    def __init__(self, run_directory: Path) -> None:
        self.file = run_directory / "versions.jsonl"
        text = self.file.read_text() if self.file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a torn line was never synced; the next one would be glued to it
            os.truncate(self.file, len(whole))
        self.given = [{"version": 0, "step": 0}, *map(json.loads, whole.splitlines())]

    def issue(self, step: int) -> int:
        """The version of the weights after `step` optimiser steps of the driver's loop."""
        version = max(entry["version"] for entry in self.given) + 1
        self.given.append({"version": version, "step": step})
        with self.file.open("a") as file:
            file.write(json.dumps(self.given[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the store syncs what is sampled under it
        return version

    def at(self, step: int) -> int:
        """The newest version given to the weights after `step` steps (0 before the first)."""
        return next((entry["version"] for entry in reversed(self.given) if entry["step"] <= step), 0)

    def steps_of(self, versions: np.ndarray) -> np.ndarray:
        """After how many steps the weights of each of `versions` stood."""
        step = {entry["version"]: entry["step"] for entry in self.given}
        return np.array([step[version] for version in versions.tolist()])


def train_rollouts(config: Config, tasks: list[Task], step: int, version: int, measured: Groups) -> list[Rollout]:
    """The groups of driver step `step`: the data order depends on run.seed, the step and what was `measured` for it alone, so a
    resumed run keeps it."""
    chosen = step_tasks(config, tasks, step, measured)
    return _groups(config, f"train-{step:06d}", chosen, step, version)


def refill_rollouts(
    config: Config, tasks: list[Task], step: int, version: int, refill: int, number: int, measured: Groups
) -> list[Rollout]:
    """`number` more groups of step `step`, its `refill`-th from 1, of tasks drawn by the same and refill alone."""
    chosen = refill_tasks(config, tasks, step, refill, number, measured)
    return _groups(config, f"train-{step:06d}-refill-{refill}", chosen, step, version)


def _groups(config: Config, name: str, tasks: list[Task], step: int, version: int) -> list[Rollout]:
    """A group a task, with its greedy rollout where the algorithm needs one."""
    greedy = config.named_algorithm.needs_greedy
    return [
        Rollout(
            f"{name}-{place:04d}-{index}",
            task.id,
            f"{name}-{place:04d}",
            mode,
            step,
            index,
            task.input,
            task.private,
            version,
        )
        for place, task in enumerate(tasks)
        for index in range(config.algorithm.group_size + greedy)
        for mode in (("greedy" if index == config.algorithm.group_size else "train"),)
    ]


def eval_rollouts(
    config: Config,
    tasks: list[Task],
    step: int,
    version: int,
    prompts: dict[str, PromptVersion] | None = None,
    depends_on: str = "",
) -> list[Rollout]:
    """`evaluate.samples` runs of each held-out task, all at one pinned version and with these prompts.

    The ids tell what the task and the prompts are and what the outcome depends on besides (digests.evaluation_digest()), so that
    one of others is no rollout that the store has already.
    """
    told, prompts = [depends_on, *([prompts] if prompts else [])], prompts or {}
    groups = [
        f"eval-{step:06d}-{number:05d}-{digest(task.id, task.input, task.private, *told)}"
        for number, task in enumerate(tasks)
    ]
    return [
        Rollout(f"{group}-{index}", task.id, group, "eval", step, index, task.input, task.private, version, prompts)
        for group, task in zip(groups, tasks, strict=True)
        for index in range(config.evaluate.samples)
    ]


def steps_to_admit(config: Config, step: int) -> range:
    """The steps whose rollouts may be sampled while the learner stands before `step`: S steps ahead at most."""
    return range(step, min(step + config.algorithm.staleness, config.run.steps - 1) + 1)


def measured_before(config: Config, step: int) -> int:
    """The step before which all rollouts have ended, whenever the tasks of `step` are chosen: the first time is S steps ahead.
    What was sampled since may not tell in the choice, or a resumed run would make another."""
    return step - config.algorithm.staleness


def drop_stale(tables: dict[str, pa.Table], oldest: int) -> tuple[dict[str, pa.Table], list[str]]:
    """Leave out the rollouts that hold a token sampled before version `oldest`.

    Returns the tables without them, and their rollout ids.
    """
    calls = tables["calls"]
    versions = calls["policy_versions"].combine_chunks()
    lengths = pc.list_value_length(versions).to_numpy(zero_copy_only=False)
    tokens = versions.flatten().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(calls)), lengths)
    stale_calls = np.unique(owner[tokens < oldest])
    stale = set(calls["rollout_id"].take(pa.array(stale_calls)).to_pylist())
    if not stale:
        return tables, []
    return only(tables, set(tables["rollouts"]["rollout_id"].to_pylist()) - stale), sorted(stale)
