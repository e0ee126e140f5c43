"""kill -9 of each part of a running training, then of the driver: it goes on, and the ledgers equal the tables."""

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import Training, check_run, gone, kill, make_run, of_run

from raygent.cluster.metrics import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 30


def command(toml: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "raygent.cli", "train", str(toml), *overrides]


def one(folder: Path, word: str):
    """The run's process of that name, once it is there: it may just be replaced."""
    deadline = time.monotonic() + 200
    while not (found := of_run(folder, word)):
        assert time.monotonic() < deadline, f"no process {word} there"
        time.sleep(0.5)
    return found[0]


def test_every_part_killed_in_one_run(tmp_path):
    toml = make_run(tmp_path, STEPS)
    run = tmp_path / "runs" / "chaos"
    training = Training(command(toml), tmp_path)
    training.wait_for("step 1/")
    kill(one(tmp_path, "ray::RolloutWorker"))
    training.wait_for("step 3/")
    kill(one(tmp_path, "ray::ReplayStore"))
    training.wait_for("step 4/")
    kill(one(tmp_path, "ray::ServeReplica"))
    training.wait_for("step 6/")
    kill(one(tmp_path, "VLLM::EngineCore"))
    training.wait_for("step 8/")
    kill(one(tmp_path, "ray::Learner"))
    # In the run's own files, for the job's log comes late: the learners' second start, then ten steps that count.
    deadline = time.monotonic() + 400
    while (
        sum("start" in line for line in read_lines(run / "learner.jsonl")) < 2
        or len(read_lines(run / "metrics.jsonl")) < 10
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(of_run(tmp_path, "-m raygent.jobs.train")[-1])  # the first is the job's shell
    training.process.wait(120)
    assert training.process.returncode != 0
    left = gone(lambda: of_run(tmp_path, "ray::", "VLLM", "raylet", "gcs_server", "raygent.jobs"), 60)
    assert not left

    before = {row["step"]: row for row in read_lines(run / "metrics.jsonl")}
    wandb_id = (run / "wandb-id").read_text()
    again = Training(command(toml), tmp_path)
    said = again.end()
    resumed = int(re.search(r"going on at step (\d+)", said).group(1))  # the last checkpoint
    assert 9 <= resumed < STEPS and resumed % 3 == 0
    assert (run / "wandb-id").read_text() == wandb_id
    assert len(list((run / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 2
    summary = check_run(run, tmp_path / "ledger.jsonl", STEPS)
    assert summary["rollouts"]["retried"] > 0
    after = {row["step"]: row for row in read_lines(run / "metrics.jsonl")}
    assert {step: after[step] for step in range(resumed)} == {step: before[step] for step in range(resumed)}
    attempts = pq.read_table(run / "store" / "attempts", columns=["rollout_id", "outcome"]).to_pylist()
    spoiled = Counter(row["rollout_id"] for row in attempts if row["outcome"] == "engine_lost")
    assert max(spoiled.values()) < 3, "an engine on its way out was given all attempts of a rollout"

    # The data order is that of a run nobody disturbed.
    from raygent.cluster.pacer import train_rollouts
    from raygent.config import load
    from raygent.data_files import load_tasks

    config = load(toml)
    tasks = load_tasks(config.data.train)
    asked = {r.rollout_id: r.task_id for step in range(STEPS) for r in train_rollouts(config, tasks, step, 0, {})}
    rows = pq.read_table(run / "store" / "rollouts", columns=["rollout_id", "task_id", "mode"]).to_pylist()
    assert {row["rollout_id"]: row["task_id"] for row in rows if row["mode"] == "train"} == asked
    versions = [json.loads(line)["version"] for line in (run / "versions.jsonl").read_text().splitlines()]
    assert versions == sorted(set(versions))
