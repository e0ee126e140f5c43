"""What do SFT and distillation make of a run that has learnt? On the SQL example's held-out questions.

    uv run python benchmarks/imitation.py [section.key=value ...]

Three runs of `raygent train examples/sql/train.toml`, all from the same warm start: `grpo`; `sft` on the best of each task's
rollouts in that run's store; `distill`, whose teacher is that run's last checkpoint. `gain` is the mean reward after minus before,
with its paired bootstrap 95 % interval. Puts the figures into benchmarks/results/imitation.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from raygent.actors.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "sql"
RUNS = ROOT / "runs" / "imitation"
RESULTS = ROOT / "benchmarks" / "results" / "imitation.json"


def run(name: str, overrides: list[str]) -> dict:
    shutil.rmtree(RUNS / name, ignore_errors=True)
    where = [f"run.directory={RUNS}", f"run.name={name}", f"algorithm.name={name}", "evaluate.every=0"]
    command = [sys.executable, "-m", "raygent.cli", "train", str(EXAMPLE / "train.toml"), *where, *overrides]
    subprocess.run(command, check=True)
    summary = json.loads((RUNS / name / "summary.json").read_text())
    return {key: summary[key] for key in ("steps", "held_out", "seconds", "rollouts")}


def main() -> None:
    overrides = sys.argv[1:]
    subprocess.run([sys.executable, str(EXAMPLE / "prepare.py")], check=True)
    found = {"grpo": run("grpo", overrides)}
    checkpoint = latest_checkpoint(RUNS / "grpo")
    assert checkpoint
    found["sft"] = run("sft", [f"data.rollouts={RUNS / 'grpo'}", *overrides])
    found["distill"] = run("distill", [f"algorithm.teacher={checkpoint.path}", *overrides])
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, told in found.items():
        held_out = told["held_out"]
        low, high = held_out["gain_ci95"]
        print(
            f"{name:8} {held_out['n']:4} {held_out['before']:.3f} -> {held_out['after']:.3f}  {held_out['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )


if __name__ == "__main__":
    main()
