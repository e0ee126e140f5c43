"""A real training run in a folder of its own, as a user starts it, and what a test may do to it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from tiny_model import make_tiny_model

from raygent.cluster.metrics import read_lines

HERE = Path(__file__).parent
TOML = """
[run]
name = "chaos"
steps = {steps}
checkpoint_every = 3
grace_s = 5.0
[model]
path = "model"
context = 512
[agent]
run = "agent.py:answer"
timeout_s = 120.0
[grader]
run = "agent.py:grade"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[algorithm]
tasks_per_step = 4
group_size = 4
[learner]
ranks = 2
zero_stage = 2
learning_rate = 1e-3
[workers]
min = 2
max = 2
rollouts_each = 8
cpus = 0.1
lease_s = 5.0
[evaluate]
every = 0
[wandb]
mode = "offline"
"""


def make_run(folder: Path, steps: int) -> Path:
    """A folder with all a run needs; its TOML."""
    make_tiny_model(folder / "model")
    (folder / "agent.py").write_text((HERE / "ledger_agent.py").read_text())
    tasks = [json.dumps({"id": str(number), "input": f"Say a word of {number} letters."}) for number in range(40)]
    (folder / "train.jsonl").write_text("\n".join(tasks[:32]))
    (folder / "eval.jsonl").write_text("\n".join(tasks[32:]))
    (folder / "run.toml").write_text(TOML.format(steps=steps))
    return folder / "run.toml"


class Training:
    """`command`, running, with its log in `folder`."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.log = folder / f"log-{time.time():.0f}.txt"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean | (environment or {}),
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()[-6000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s} s:\n{self.said()[-6000:]}"
            time.sleep(0.2)

    def end(self, timeout_s: float = 600) -> str:
        """Wait for its end, which must be a good one; what it said."""
        code = self.process.wait(timeout_s)
        assert code == 0, self.said()[-6000:]
        return self.said()


def processes(*words: str) -> list[psutil.Process]:
    """The living processes whose command line holds one of `words`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(word in line for word in words):
            found.append(process)
    return found


def of_run(folder: Path, *words: str) -> list[psutil.Process]:
    """Those of processes(words) that belong to the run in `folder`: they, or what started them, work there."""
    return [process for process in processes(*words) if _works_in(process, folder)]


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in value for value in process.environ().values())
    except psutil.Error:
        return False


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def gone(find, timeout_s: float) -> list[str]:
    """Wait until `find()` gives no process; the command lines of those still there at the end."""
    deadline = time.monotonic() + timeout_s
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [" ".join(process.cmdline())[:120] for process in left if process.is_running()]


def check_run(run: Path, ledger: Path, steps: int) -> dict:
    """The ledgers against the store's tables, as sets, and the order of the learner's steps. Returns summary.json."""
    rollouts = pq.read_table(run / "store" / "rollouts").to_pylist()
    calls = pq.read_table(run / "store" / "calls").to_pylist()
    attempts = pq.read_table(run / "store" / "attempts").to_pylist()

    # What agents saw, the store has, to the token; what the store has of attempts that won, an agent saw.
    seen = {(line["call"], tuple(line["tokens"])) for line in read_lines(ledger)}
    recorded = {(row["request_id"], tuple(row["response_token_ids"])) for row in calls}
    assert seen <= recorded, f"{len(seen - recorded)} replies that agents got are not in the store"
    won = {(row["rollout_id"], row["attempt"]) for row in attempts if row["won"]}
    of_winners = {
        (row["request_id"], tuple(row["response_token_ids"]))
        for row in calls
        if (row["rollout_id"], row["attempt"]) in won
    }
    assert of_winners <= seen, "the store holds calls that no agent made"
    assert len(recorded) == len(calls), "a call stands twice in the store"
    counted = {key: 0 for key in won}
    for row in calls:
        if (row["rollout_id"], row["attempt"]) in won:
            counted[row["rollout_id"], row["attempt"]] += 1
    assert set(counted.values()) == {2}

    # One winner a rollout; all that was asked ended.
    winners = [row["rollout_id"] for row in attempts if row["won"]]
    assert len(winners) == len(set(winners))
    assert {row["status"] for row in rollouts} <= {"succeeded", "dropped"}

    # The learner's own ledger: from each start its steps follow one another, and the last of each is what the store says.
    applied: dict[int, set[str]] = {}
    next_step = 0
    for line in read_lines(run / "learner.jsonl"):
        if "start" in line:
            next_step = line["start"]
        else:
            assert line["step"] == next_step, f"step {line['step']} was applied where {next_step} was next"
            next_step += 1
            applied[line["step"]] = set(line["rollouts"])
    assert sorted(applied) == list(range(steps))
    trained: dict[int, set[str]] = {step: set() for step in range(steps)}
    for row in rollouts:
        if row["trained_step"] >= 0:
            trained[row["trained_step"]].add(row["rollout_id"])
            assert row["step"] == row["trained_step"]
    assert trained == applied
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == steps
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == list(range(steps))
    return summary
