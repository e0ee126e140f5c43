"""Held-out evaluation: of a run between its steps, and `raygent evaluate CONFIG`, which trains nothing."""

from __future__ import annotations

import sys
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygent.actors.checkpoint import latest_checkpoint
from raygent.algorithms.batch import failed_by_outcome
from raygent.algorithms.intervals import mean_interval
from raygent.algorithms.pass_at_k import passes
from raygent.cluster.metrics import evaluation_line
from raygent.cluster.pacer import eval_rollouts
from raygent.config import Config, ConfigError
from raygent.data_files import load_tasks
from raygent.jobs.job import run_job
from raygent.records import Task, only

if TYPE_CHECKING:
    from raygent.cluster.parts import Parts

PASSED = 1.0  # the reward of a rollout that succeeded


def tasks_due(config: Config, held_out: list[Task], step: int) -> list[Task]:
    """What is evaluated at `step`: all tasks before the first step and after the last, `evaluate.tasks` of them every
    `evaluate.every` steps between."""
    if step in (0, config.run.steps):
        return held_out
    every = config.evaluate.every
    return held_out[: config.evaluate.tasks or None] if every > 0 and step % every == 0 else []


def evaluate(parts: Parts, tasks: list[Task]) -> tuple[dict[str, pa.Table], dict[str, float]]:
    """Run the tasks at the version served now, which stays pinned until they have ended.

    Rollouts of this step that the store has already stay as they are. Returns the store's tables of all of them and a
    summary: `reward` (the mean over tasks of the mean over a task's rollouts), `low` and `high` (its 95 % bootstrap interval over
    tasks), `n` (tasks with a reward), `lost` (those that infrastructure lost), `several_calls_share` (rollouts of more than one
    call) and `several_calls_reward` (mean reward of those), `calls` (a rollout), `failed/OUTCOME` (rollouts, with their reward),
    and with several `evaluate.samples` `pass@k`, where a reward of 1 passes.
    """
    rollouts = eval_rollouts(parts.config, tasks, parts.step, parts.version, parts.prompts, parts.depends_on)
    if stored := len(rollouts) - parts.queue(rollouts):
        print(
            f"{stored} of {len(rollouts)} rollouts of step {parts.step} are in the store from before and are not run again"
            + ("" if parts.config.adapters else "; under another run.name, with the checkpoint as model.path, all are"),
            flush=True,
        )
    with parts.clock("evaluate"):
        tables = only(parts.collect(parts.step, "eval"), {rollout.rollout_id for rollout in rollouts})
    return tables, summarise(tables)


def summarise(tables: dict[str, pa.Table]) -> dict[str, float]:
    rollouts, calls = tables["rollouts"], tables["calls"]
    rewards = rollouts["reward"].to_numpy()
    known = ~np.isnan(rewards)  # not so those that infrastructure lost
    counted = calls.group_by("rollout_id").aggregate([("sequence", "count")])
    number = dict(zip(counted["rollout_id"].to_pylist(), counted["sequence_count"].to_pylist(), strict=True))
    turns = np.array([number.get(rollout, 0) for rollout in rollouts["rollout_id"].to_pylist()])
    again = turns[known] > 1
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, reward in zip(rollouts["task_id"].to_pylist(), rewards, strict=True):
        if not np.isnan(reward):
            by_task[task].append(float(reward))
    tries = {task: [reward >= PASSED for reward in got] for task, got in by_task.items()}
    means = [fmean(got) for got in by_task.values()]
    low, high = mean_interval(means) if means else (float("nan"), float("nan"))
    return (
        {
            "reward": fmean(means) if means else float("nan"),
            "low": low,
            "high": high,
            "n": len(by_task),
            "lost": pc.count_distinct(rollouts["task_id"]).as_py() - len(by_task),
            "calls": float(turns[known].mean()) if known.any() else 0.0,
            "several_calls_share": float(again.mean()) if known.any() else 0.0,
            "several_calls_reward": float(rewards[known][again].mean()) if again.any() else 0.0,
        }
        | failed_by_outcome(rollouts)
        | (passes(tries) if max(map(len, tries.values()), default=0) > 1 else {})
    )


def held_out_tasks(config: Config) -> list[Task]:
    if config.data.eval is None:
        raise ConfigError('data.eval: missing; write eval = "test.jsonl"')
    return load_tasks(config.data.eval, "data.eval")


def evaluate_checkpoint(config: Config) -> None:
    """Evaluate a checkpoint of the run (`evaluate.checkpoint`), or the model of a run that has none, on data.eval."""
    from raygent.cluster.parts import Parts

    held_out = held_out_tasks(config)
    with Parts(config, learn=False, evaluates=True) as parts:
        _, summary = evaluate(parts, held_out)
        if not summary["n"]:
            raise ConfigError(
                f"data.eval: no task has a reward, infrastructure lost all {summary['lost']}; see the last lines of the job's "
                "log, mend it, and give the same command again"
            )
        if not parts.step and not latest_checkpoint(config.run_directory):
            print(f"{config.run_directory} has no checkpoint: this is {config.model.path}, untrained")
        print(evaluation_line(parts.step, summary))


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], evaluate_checkpoint, learn=False))
