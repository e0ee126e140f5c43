"""The driver of a training run: it moves tasks, samples and weights, step by step.

    ray job submit -- python -m raygent.jobs.train CONFIG [section.key=value ...]

Given again, the same command resumes: last checkpoint, sealed rollouts kept, same data order, same W&B run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from raygent.algorithms.batch import lacking_groups, make_samples
from raygent.cluster.metrics import RunLog, choice_metrics
from raygent.cluster.pacer import drop_stale, refill_rollouts, train_rollouts
from raygent.config import Config
from raygent.data_files import load_tasks
from raygent.jobs.evaluate import evaluate, tasks_due
from raygent.jobs.job import run_job
from raygent.jobs.optimise_prompts import optimise_prompts, take_turn
from raygent.jobs.recorded import batch_of
from raygent.records import Sample, Task

if TYPE_CHECKING:
    from raygent.cluster.parts import Parts


def train(config: Config) -> None:
    from raygent.actors.learner import LearnerLost
    from raygent.cluster.parts import Parts

    if config.changes_prompts:
        return optimise_prompts(config)
    tasks = load_tasks(config.data.train, "data.train")
    held_out = load_tasks(config.data.eval, "data.eval")
    log = RunLog(config)
    with Parts(config) as parts:
        log.resume(parts.step)
        while True:
            try:
                if due := tasks_due(config, held_out, parts.step):
                    log.evaluation(parts.step, *evaluate(parts, due))
                    parts.keep_best(log.best_step())
                if parts.step >= config.run.steps:
                    parts.checkpoint()
                    break
                log.step(parts.step, take_turn(parts, tasks, log) | one_step(parts, tasks))
                parts.checkpoint_if_due()  # behind the line: a step that a checkpoint has done has one
            except LearnerLost as lost:
                log.note(f"{lost}; going on from the last checkpoint")
                parts.restart_learners()
                log.resume(parts.step)
        counts = parts.counts()
    log.finish(counts)


def one_step(parts: Parts, tasks: list[Task]) -> dict[str, float]:
    """Rollouts of this step -> samples -> learners -> weights to the engines under a new version."""
    samples, metrics = recorded(parts) if parts.config.recorded else sampled(parts, tasks)
    with parts.clock("learn"):
        metrics |= parts.learn(samples)
    with parts.clock("weights"):
        metrics |= parts.push()
    return metrics | parts.taken_seconds()


def sampled(parts: Parts, tasks: list[Task]) -> tuple[list[Sample], dict[str, float]]:
    """The samples of what the policy does now."""
    config, step, measured = parts.config, parts.step, parts.rewards_before(parts.step)
    for ahead in parts.admissible_steps():
        parts.queue(train_rollouts(config, tasks, ahead, parts.version, parts.rewards_before(ahead)))
    with parts.clock("rollouts"):
        tables = parts.collect(step, "train")
        for refill in range(1, config.algorithm.refills + 1):
            if lacking := lacking_groups(tables, config):
                parts.queue(refill_rollouts(config, tasks, step, parts.version, refill, lacking, measured))
                tables = parts.collect(step, "train")
        greedy = parts.collect(step, "greedy") if config.named_algorithm.needs_greedy else None
    with parts.clock("samples"):
        tables, stale = drop_stale(tables, parts.oldest_version())
        samples, metrics = make_samples(tables, config, greedy, parts.measure)
        metrics |= choice_metrics(config, tasks, tables["rollouts"], measured)
    parts.drop(stale)
    if samples:
        metrics["version_age"] = parts.age(samples)
    with parts.clock("gate"):
        parts.gate(samples)
    return samples, metrics | {"stale_rollouts": float(len(stale))}


def recorded(parts: Parts) -> tuple[list[Sample], dict[str, float]]:
    """The samples of what was recorded before."""
    with parts.clock("samples"):
        samples, metrics = make_samples(batch_of(parts.config, parts.step), parts.config, None, parts.measure)
    return samples, metrics | {"tokens_sampled": 0.0}


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], train))
