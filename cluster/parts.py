"""The parts of one run, started together and ended together; what the driver asks of them is a verb each.

The driver owns the store, the workers and the learners: Ray ends them with it, however it dies. Serve's app is detached by
nature, so a keeper deletes it when the driver is gone and not back within `run.grace_s`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raygent.actors.checkpoint import Checkpoint, checkpoint_to_evaluate, latest_checkpoint
from raygent.actors.critic import Critic
from raygent.actors.engine_handle import EngineFailed, EngineUnavailable
from raygent.actors.learner import LearnerGroup, LearnerLost
from raygent.actors.reference import Reference
from raygent.actors.replay_store import ReplayStore
from raygent.actors.segments import write_atomically
from raygent.algorithms.curriculum import Groups
from raygent.cluster.digests import evaluation_digest
from raygent.cluster.failures import failures_to_tell, why_lost
from raygent.cluster.keeper import beside_the_driver, end_app, start_keeper, stop_keeper
from raygent.cluster.pacer import Versions, measured_before, steps_to_admit
from raygent.cluster.prompt_table import prompts_in_force, steps_done
from raygent.cluster.serve_app import START_DEADLINE_S, app_name, start_app
from raygent.cluster.spending import Spending
from raygent.cluster.start import cpus_needed
from raygent.cluster.teacher import Teacher
from raygent.cluster.worker_pool import WorkerPool
from raygent.config import Config, ConfigError
from raygent.records import Rollout, Sample, last_line

logger = logging.getLogger("raygent")
NAMESPACE = "raygent"
HEAL_EVERY_S = 5.0
TELL_EVERY_S = 60.0  # how many rollouts are open
MOST_RESTARTS = 5  # of the learners from one checkpoint
TRAINED = ("train", "greedy")  # modes of rollouts
MOST_LOST = 0.5  # of a step's rollouts


class GateError(RuntimeError):
    """Engine and learner disagree on the log-probabilities of the same tokens: training on them would be wrong."""


class Parts:
    """Store, engine, workers and learners of the run `config` names, as a context manager.

    `step` is the number of steps done, `version` the policy version the engines serve, `prompts` those that rollouts get which
    bring none of their own. `learn=False` starts no learners (evaluation, and runs that change prompts alone);
    `evaluates`: the run is looked at, and neither begins nor goes on.
    """

    def __init__(self, config: Config, learn: bool = True, evaluates: bool = False) -> None:
        self.config = config
        self.learn_too = learn
        self.directory = config.run_directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.evaluates = evaluates
        if not (evaluates and (self.directory / "config.toml").is_file()):
            write_atomically(self.directory / "config.toml", [config.to_toml().encode()])
        self.failures_told: set[str] = set()
        self.versions, self.depends_on = Versions(self.directory), evaluation_digest(config)
        self.spending = Spending(config)
        self.teacher = Teacher(config) if learn and config.algorithm.teacher_url else None
        self.seconds: dict[str, float] = defaultdict(float)
        self.gated = not learn
        self.restarts: Counter[int] = Counter()  # of the learners, by the step they went on from

    def __enter__(self) -> Parts:
        self.spending.check()
        if self.teacher:
            self.teacher.check()
        self.own_ray = not ray.is_initialized()
        if self.own_ray:
            # A job has RAY_ADDRESS; without it the driver gets a Ray of its own, not whichever was last started here
            here: dict[str, Any] = (
                {} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": cpus_needed(self.config)}
            )
            ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING, **here)
        config, secret = self.config, secrets.token_hex(32)
        if self.evaluates and not config.changes_prompts:
            checkpoint = checkpoint_to_evaluate(config)
        else:
            checkpoint = latest_checkpoint(self.directory) if config.run.resume else None
        self._stand_at(checkpoint)
        if config.changes_prompts:
            self.step = steps_done(self.directory)
        store_name = f"raygent-{config.run.name}-store"
        actor: Any = ray.remote(ReplayStore)
        self.store: Any = actor.options(
            name=store_name,
            namespace=NAMESPACE,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
            num_cpus=0,
            scheduling_strategy=beside_the_driver(),
        ).remote(str(self.directory / "store"), config.workers.lease_s, config.workers.max_attempts)
        # A run that changes prompts has no checkpoints: it does all its steps again, with the rollouts of before.
        ray.get(self.store.rewind.remote(None if config.changes_prompts else self.step, self.evaluates))
        if config.upstream:
            self.spending.begin(ray.get(self.store.costs.remote()))
            self.spending.check()
        start_keeper(config, app_name(config), store_name, NAMESPACE)
        self.learners = LearnerGroup(config) if self.learn_too else None
        of_critic, of_reference = (config.of_critic, config.of_reference) if self.learn_too else (None, None)
        self.critic = LearnerGroup(of_critic, Critic) if of_critic else None
        self.reference = LearnerGroup(of_reference, Reference) if of_reference else None
        # A replica replaced later would miss a deleted checkpoint; adapters are nowhere but in the learners.
        pushed = self.learn_too and (checkpoint is not None or bool(config.adapters))
        model = str(checkpoint.path) if checkpoint and not pushed else config.model.path
        version = None if pushed else self.version
        with self.clock("start"), ThreadPoolExecutor(1) as pool:
            engine = pool.submit(start_app, config, secret, store_name, NAMESPACE, version, model)
            if self.learners:
                self._start_learners(checkpoint)
            self.engine = engine.result()
            if pushed:
                self.push()
            self.check_upstreams()
        self.pool = WorkerPool(config, self.store, self.engine, secret)
        self.pool.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.stop()
        for group in (self.learners, self.critic, self.reference):
            if group:
                group.stop()
        end_app(app_name(self.config))
        stop_keeper(app_name(self.config), NAMESPACE)
        ray.get(self.store.close.remote())
        ray.kill(self.store)
        if self.own_ray:
            ray.shutdown()  # what Ray still has to tell comes before the run's result

    def keep_best(self, step: int | None) -> None:
        """Of the evaluations so far that of `step` was the best: `checkpoints/best` is to be that checkpoint."""
        assert self.learners
        if step == self.step and step:
            self.checkpoint()
        self.learners.mark_best(step)

    def _stand_at(self, checkpoint: Checkpoint | None) -> None:
        self.step, self.version = (checkpoint.step, checkpoint.version) if checkpoint else (0, 0)
        self.prompts = prompts_in_force(self.config, checkpoint)

    def _start_learners(self, checkpoint: Checkpoint | None) -> None:
        assert self.learners
        self.learners.restart(checkpoint)
        if self.critic:
            self.critic.restart(checkpoint and checkpoint.of_critic())
        if self.reference:
            self.reference.restart(None)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Adds the wall time of the block to `seconds[part]`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - started

    def taken_seconds(self) -> dict[str, float]:
        """The seconds of each part since the last call, as `seconds/PART`."""
        taken = {f"seconds/{part}": value for part, value in self.seconds.items()}
        self.seconds.clear()
        return taken

    # what the driver asks

    def admissible_steps(self) -> range:
        return steps_to_admit(self.config, self.step)

    def rewards_before(self, step: int) -> Groups:
        """The rewards by which data.curriculum chooses the tasks of `step`; none without it."""
        if not self.config.data.curriculum:
            return {}
        return ray.get(self.store.rewards_before.remote(measured_before(self.config, step)))

    def oldest_version(self) -> int:
        """The oldest policy version a token of this step's batch may have."""
        return self.versions.at(max(0, self.step - self.config.algorithm.staleness))

    def age(self, samples: list[Sample]) -> float:
        """How many steps ago the batch's tokens were sampled, in the mean. Versions do not tell: a rewind skips some."""
        sampled = np.concatenate([sample.policy_versions[sample.loss_mask] for sample in samples])
        return self.step - float(np.mean(self.versions.steps_of(sampled)))

    def queue(self, rollouts: list[Rollout]) -> int:
        """Queue `rollouts`; those that the store knows already stay as they are. Returns how many it did not know."""
        for rollout in rollouts:
            rollout.prompts = rollout.prompts or self.prompts
        return ray.get(self.store.add_rollouts.remote(rollouts))

    def collect(self, step: int, mode: str, spans: bool = False) -> dict[str, pa.Table]:
        """Wait for the rollouts of `step` to end, keeping replicas and workers whole meanwhile; the store's tables of them, those of
        rollouts to train on without what was said.

        Raises ConfigError, with all steps done safe in a checkpoint, where infrastructure lost most of what was to be trained on:
        an outage would use up one step after the other.
        """
        told = time.monotonic()
        while still_open := ray.get(self.store.wait.remote(step, mode, HEAL_EVERY_S)):
            if time.monotonic() - told > TELL_EVERY_S:
                print(f"step {step}: {still_open} {mode} rollouts still run or wait", flush=True)
                told = time.monotonic()
            if self.pool.broken:
                raise RuntimeError(self.pool.broken)
            self.heal()
            self.check_upstreams()
        self.check_upstreams()
        tables = ray.get(self.store.take.remote(step, mode, spans, mode not in TRAINED))
        for line in failures_to_tell(tables, self.failures_told):
            print(line, flush=True)
        lost = sum(status == "lost" for status in tables["rollouts"]["status"].to_pylist())
        if self.learners and mode in TRAINED and lost > len(tables["rollouts"]) * MOST_LOST:
            with self.steps_kept():
                raise ConfigError(
                    f"workers.max_attempts: infrastructure lost {lost} of the {len(tables['rollouts'])} rollouts of step {step + 1}, each "
                    f"{self.config.workers.max_attempts} times, the last by "
                    f"{why_lost(tables) or 'what its workers or engines died of'} (all: the store's table attempts); mend it, and "
                    "the same command goes on there"
                )
        return tables

    def heal(self) -> None:
        """A replica that was replaced reports an old version and takes no traffic: it gets the weights in force."""
        try:
            if any(replica["version"] != self.version for replica in self.engine.status()):
                if self.learners:
                    self._push(self.learners)
                else:
                    self.engine.adopt(self.version)
        except EngineUnavailable as error:  # it is being replaced: seen to next time
            logger.warning("%s", last_line(error))

    def check_upstreams(self) -> None:
        """Raises ConfigError, with all steps done safe in a checkpoint, where the run's upstreams do not let it go on."""
        if not self.config.upstream:
            return
        try:
            with self.steps_kept():
                self._deal_out()
        except EngineUnavailable as error:
            logger.warning("%s", last_line(error))

    @contextmanager
    def steps_kept(self) -> Iterator[None]:
        """Where the block ends the run with a ConfigError, all steps done are safe in a checkpoint first."""
        try:
            yield
        except ConfigError:
            if self.learners and self.step:
                self.checkpoint()
            raise

    def _deal_out(self) -> None:
        """See what the upstreams have cost, and where a replica has no budget give all of them what is left: one that cannot
        be asked may still spend what it had, so then there is none. Raises ConfigError."""
        replicas, recorded = self.engine.status(), None
        if short := self.spending.short(replicas):
            replicas, recorded = self.engine.recall_budgets(), ray.get(self.store.costs.remote())
        self.spending.note(replicas, recorded)
        self.spending.check()
        if short and len(replicas) == self.config.engine.replicas:
            self.engine.grant_budgets(self.spending.budgets())

    def gate(self, samples: list[Sample]) -> None:
        """Once after every start of the learners: they and the engine must agree on what the batch's tokens cost. Else it
        raises GateError.

        Tokens sampled from older weights tell nothing: without others the next batch is the first.
        """
        current = [sample.loss_mask & (sample.policy_versions == self.version) for sample in samples]
        tokens = sum(int(mask.sum()) for mask in current)
        if self.gated or not tokens:
            return
        assert self.learners
        learned = self.measure("current", samples)
        gaps = [abs(sample.logprobs - ours)[mask] for sample, ours, mask in zip(samples, learned, current, strict=True)]
        mean = float(sum(gap.sum() for gap in gaps)) / tokens
        worst = max((float(gap.max()) for gap in gaps if len(gap)), default=0.0)
        print(
            f"start gate: |engine - learner| logprob over {tokens} tokens: mean {mean:.2e}, max {worst:.2e}", flush=True
        )
        if mean > self.config.learner.gate:
            raise GateError(
                f"learner.gate: engine and learner differ by {mean:.3g} in mean over {tokens} tokens, more than "
                f"{self.config.learner.gate}; use the same dtype for both, or raise learner.gate if you know why"
            )
        self.gated = True

    def measure(self, what: str, samples: list[Sample]) -> list[np.ndarray]:
        """See LearnerGroup.measure; a teacher that is an endpoint tells of the "reference" in the learners' place. Raises
        ConfigError, with all steps done safe in a checkpoint, where it does not."""
        if what == "reference" and self.teacher:
            with self.steps_kept():
                return self.teacher.logprobs(samples)
        group = self.learners
        if what == "values":
            group = self.critic
        elif what == "reference" and self.reference:
            group = self.reference
        assert group
        return group.measure(what, samples)

    def learn(self, samples: list[Sample]) -> dict[str, float]:
        """One step of the learners on `samples`; the store marks their rollouts as trained."""
        assert self.learners
        alone = self.critic is not None and self.step < self.config.critic.warmup_steps
        metrics = self.learners.step([] if alone else samples, self.step)
        if alone:
            metrics["tokens_trained"] = metrics["rollouts_trained"] = 0.0
        if self.critic:
            metrics |= {f"critic/{name}": value for name, value in self.critic.step(samples, self.step).items()}
        self.step += 1
        self.version = self.versions.issue(self.step)
        trained = [] if alone or self.config.recorded else sorted({sample.rollout_id for sample in samples})
        ray.get(self.store.mark_trained.remote(self.step - 1, trained))
        return metrics

    def push(self) -> dict[str, float]:
        """The learners' weights to every engine replica, as `version`; where one is being replaced, once it is there.

        Raises EngineUnavailable where none comes back, EngineFailed at once where one refuses them.
        """
        assert self.learners
        deadline, told = time.monotonic() + START_DEADLINE_S, False
        while True:
            try:
                return self._push(self.learners)
            except EngineUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    logger.warning("waiting for the engine: %s", last_line(error))
                told = True
                time.sleep(1)

    def _push(self, learners: LearnerGroup) -> dict[str, float]:
        """Raises EngineFailed where a replica refused the weights, and EngineUnavailable where another went away meanwhile:
        then it may have failed by that."""
        before = self._replicas()
        try:
            return learners.push(self.engine, self.version)
        except EngineFailed as error:
            kind = EngineFailed if self._replicas() == before else EngineUnavailable
            raise kind(last_line(error)) from error

    def _replicas(self) -> set[str]:
        return {replica["source"] for replica in self.engine.status()}

    def drop(self, rollout_ids: list[str]) -> None:
        """Count `rollout_ids` as dropped: over the staleness bound."""
        if rollout_ids:
            ray.get(self.store.cancel.remote(rollout_ids))

    def checkpoint_if_due(self) -> None:
        if self.step % self.config.run.checkpoint_every == 0:
            with self.clock("checkpoint"):
                self.checkpoint()

    def checkpoint(self) -> None:
        """Weights and optimiser of `step`, and the store's sealed logs rolled into Parquet."""
        assert self.learners
        prompts = self.prompts if self.config.algorithm.prompts else None
        self.learners.save(self.step, self.version, self.critic, prompts)
        ray.get(self.store.roll.remote())

    def restart_learners(self) -> None:
        """Fresh learners from the last checkpoint (or the first weights); the steps after it are done again.

        Raises RuntimeError where they died MOST_RESTARTS times since that checkpoint.
        """
        checkpoint = latest_checkpoint(self.directory)
        self._stand_at(checkpoint)
        self.gated = False
        ray.get(self.store.rewind.remote(self.step))
        while True:
            self.restarts[self.step] += 1
            if self.restarts[self.step] > MOST_RESTARTS:
                raise RuntimeError(
                    f"the learners died {MOST_RESTARTS} times between step {self.step} and the next checkpoint"
                )
            try:
                self._start_learners(checkpoint)
                self.push()
                return
            except LearnerLost as lost:
                logger.warning("%s; starting them once more", lost)

    def counts(self) -> dict[str, Any]:
        """What the summary tells besides the rows of metrics.jsonl: policy version, rollouts by fate, and the seconds by part
        that are in no row, as those of the last evaluation and, where a finished run was started again, of this start."""
        return {
            "policy_version": self.version,
            "rollouts": ray.get(self.store.status.remote()),
            "seconds": dict(self.seconds),
        }
