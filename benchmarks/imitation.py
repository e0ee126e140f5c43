"""What do SFT and distillation make of a run that has learnt? On the SQL example's held-out questions.

    uv run python benchmarks/imitation.py [section.key=value ...]

Three runs of `raygent train examples/sql/train.toml`, all from the same warm start: `grpo`; `sft` on the best of each task's
rollouts in that run's store, those of its later policies too; `distill`, whose teacher is that run's last checkpoint. `gain` is
the mean reward after minus before, with its paired bootstrap 95 % interval. Puts the figures into benchmarks/results/imitation.json.
"""

from __future__ import annotations

import sys

from whole_runs import RESULTS, ROOT, SQL, prepare, print_gains, save, train

from raygent.actors.checkpoint import latest_checkpoint

RUNS = ROOT / "runs" / "imitation"


def run(name: str, overrides: list[str]) -> dict:
    summary = train(SQL / "train.toml", RUNS / name, [f"algorithm.name={name}", "evaluate.every=0", *overrides])
    return {key: summary[key] for key in ("steps", "held_out", "seconds", "rollouts")}


def main() -> None:
    overrides = sys.argv[1:]
    prepare()
    found = {"grpo": run("grpo", overrides)}
    checkpoint = latest_checkpoint(RUNS / "grpo")
    assert checkpoint
    found["sft"] = run("sft", [f"data.rollouts={RUNS / 'grpo'}", *overrides])
    found["distill"] = run("distill", [f"algorithm.teacher={checkpoint.path}", *overrides])
    save(RESULTS / "imitation.json", found)
    print_gains({name: told["held_out"] for name, told in found.items()})


if __name__ == "__main__":
    main()
