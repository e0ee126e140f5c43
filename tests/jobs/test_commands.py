"""The commands as a user gives them, each a process of its own, in one folder: try, train, evaluate, store."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from running import make_run

from raygent.cluster.metrics import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    make_run(folder, 2)
    return folder


def raygent(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "raygent.cli", *arguments], cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_try_tells_the_conversation_the_reward_and_what_was_recorded(folder):
    said = raygent(folder, "try", "run.toml", "--task", "7")
    store = folder / "runs" / "chaos-try" / "store"
    (rollout,) = pq.read_table(store / "rollouts").to_pylist()
    calls = pq.read_table(store / "calls").sort_by("sequence").to_pylist()
    assert (rollout["task_id"], rollout["status"], len(calls)) == ("7", "succeeded", 2)
    assert "Say a word of 7 letters." in said and "user: more" in said
    assert f"outcome: succeeded, reward {rollout['reward']}" in said
    waited = sum(call["finished"] - call["started"] for call in calls)
    assert f" s, {waited:.1f} s of it in model calls" in said
    prompt = sum(len(call["prompt_token_ids"]) for call in calls)
    sampled = sum(len(call["response_token_ids"]) for call in calls)
    assert f"recorded: 2 calls, {prompt} prompt and {sampled} sampled tokens of policy version 0, 1 rewards" in said
    assert not (folder / "runs" / "chaos-try" / "checkpoints").exists()


def test_train_then_evaluate_its_checkpoint(folder):
    said = raygent(folder, "train", "run.toml")
    run = folder / "runs" / "chaos"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["rollouts"]["trained"] == 32
    assert f"held-out reward on 8 tasks: {summary['held_out']['before']:.3f} before" in said
    assert (run / "curve.png").stat().st_size > 1000
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1]

    # The same tasks at the same version are there already; others are asked anew, of the checkpoint's weights.
    (folder / "other.jsonl").write_text('{"id": "other", "input": "Say a long word."}\n')
    assert f"evaluation at step 2: reward {summary['held_out']['after']:.3f} [" in raygent(
        folder, "evaluate", "run.toml"
    )
    assert "evaluation at step 2: reward" in (other := raygent(folder, "evaluate", "run.toml", "data.eval=other.jsonl"))
    assert "] on 1 tasks; 100% of the rollouts made more than one call" in other
    calls = pq.read_table(run / "store" / "calls").to_pylist()
    versions = {v for call in calls if call["rollout_id"].startswith("eval-000002") for v in call["policy_versions"]}
    assert versions == {summary["policy_version"]}

    assert "succeeded" in raygent(folder, "store", "inspect", str(run))
    assert raygent(folder, "store", "verify", str(run))
