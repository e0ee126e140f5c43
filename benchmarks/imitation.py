"""What do SFT and distillation make of a run that has learnt?

    uv run python benchmarks/imitation.py [sql] [known_optimum] [section.key=value ...]

Of each, of sql where none is named, three runs of `raygent train`, all from the same start, which is a model that can write some
SQL, or one of random weights: `grpo`; `sft` on the best of each task's rollouts in that run's store, those of its later policies
too; `distill`, whose teacher is that run's last checkpoint. `gain` is the mean reward on held-out tasks after minus before, with
its paired bootstrap 95 % interval.
Puts the figures into benchmarks/results/imitation/.
"""

from __future__ import annotations

import sys

import known_optimum
from whole_runs import RESULTS, ROOT, SQL, names_and_overrides, prepare, print_gains, save, train

from raygent.actors.checkpoint import latest_checkpoint

RUNS = ROOT / "runs" / "imitation"
TOMLS = {"sql": SQL / "train.toml", "known_optimum": known_optimum.HERE / "train.toml"}


def run(tasks: str, name: str, overrides: list[str]) -> dict:
    summary = train(TOMLS[tasks], RUNS / tasks / name, [f"algorithm.name={name}", "evaluate.every=0", *overrides])
    return {key: summary[key] for key in ("steps", "held_out", "seconds", "rollouts")}


def main() -> None:
    asked, overrides = names_and_overrides(sys.argv[1:], TOMLS, ["sql"])
    for tasks in asked:
        prepare() if tasks == "sql" else known_optimum.prepare(known_optimum.HERE)
        found = {"grpo": run(tasks, "grpo", overrides)}
        checkpoint = latest_checkpoint(RUNS / tasks / "grpo")
        assert checkpoint
        found["sft"] = run(tasks, "sft", [f"data.rollouts={RUNS / tasks / 'grpo'}", *overrides])
        found["distill"] = run(tasks, "distill", [f"algorithm.teacher={checkpoint.path}", *overrides])
        save(RESULTS / "imitation" / f"{tasks}.json", found)
        print_gains({name: told["held_out"] for name, told in found.items()})


if __name__ == "__main__":
    main()
