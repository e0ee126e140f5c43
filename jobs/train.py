"""The driver of a training run: it moves tasks, samples and weights, step by step.

    ray job submit -- python -m raygent.jobs.train CONFIG [section.key=value ...]

Given again, the same command resumes: last checkpoint, sealed rollouts kept, same data order, same W&B run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from raygent.actors.pacer import drop_stale, train_rollouts
from raygent.algorithms.batch import make_samples
from raygent.cluster.metrics import RunLog
from raygent.config import Config
from raygent.jobs.evaluate import evaluate, tasks_due
from raygent.jobs.job import run_job
from raygent.task import load_tasks

if TYPE_CHECKING:
    from raygent.cluster.parts import Parts


def train(config: Config) -> None:
    from raygent.actors.learner import LearnerLost
    from raygent.cluster.parts import Parts

    tasks = load_tasks(config.data.train, "data.train")
    held_out = load_tasks(config.data.eval, "data.eval") if config.data.eval else []
    log = RunLog(config)
    with Parts(config) as parts:
        log.resume(parts.step)
        while True:
            try:
                if due := tasks_due(config, held_out, parts.step):
                    log.evaluation(parts.step, *evaluate(parts, due))
                if parts.step >= config.run.steps:
                    parts.checkpoint()
                    break
                log.step(parts.step, one_step(parts, tasks))
            except LearnerLost as lost:
                log.note(f"{lost}; going on from the last checkpoint")
                parts.restart_learners()
                log.resume(parts.step)
        counts = parts.counts()
    log.finish(counts)


def one_step(parts: Parts, tasks: list) -> dict[str, float]:
    """Rollouts of this step -> samples -> learners -> weights to the engines under a new version."""
    config, step = parts.config, parts.step
    for ahead in parts.admissible_steps():
        parts.ask(train_rollouts(config, tasks, ahead, parts.version))
    with parts.clock("rollouts"):
        tables = parts.collect(step, "train")
    with parts.clock("samples"):
        tables, stale = drop_stale(tables, parts.oldest_version())
        samples, metrics = make_samples(tables, config)
    parts.drop(stale)
    if samples:
        metrics["version_age"] = parts.age(samples)
    with parts.clock("gate"):
        parts.gate(samples)
    with parts.clock("learn"):
        metrics |= parts.learn(samples)
    with parts.clock("weights"):
        metrics |= parts.push()
    with parts.clock("checkpoint"):
        parts.checkpoint_if_due()
    return metrics | {"stale_rollouts": len(stale)} | parts.measures()


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], train))
