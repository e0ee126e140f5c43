"""Does the SQL example learn, and do its controls not? Three seeds, learning rate 0, and shuffled rewards.

    uv run python benchmarks/sql_seeds.py [section.key=value ...]

Each line is a whole `raygent train examples/sql/train.toml` on the same held-out questions; `gain` is the mean reward after
minus before, with its paired bootstrap 95 % interval. Writes benchmarks/results/sql_seeds.json. 35 to 65 minutes on 2 cores.
"""

from __future__ import annotations

import sys

from whole_runs import RESULTS, ROOT, SQL, prepare, print_gains, save, train

RUNS = ROOT / "runs" / "benchmark"
VARIANTS = {
    "seed 1": ["run.seed=1"],
    "seed 2": ["run.seed=2"],
    "seed 3": ["run.seed=3"],
    "learning rate 0": ["run.seed=1", "learner.learning_rate=0.0"],
    "shuffled rewards": ["run.seed=1", "grader.run=../../benchmarks/shuffled.py:rows_equal"],
}


def run(name: str, overrides: list[str]) -> dict:
    summary = train(SQL / "train.toml", RUNS / name.replace(" ", "-"), overrides)
    return {"variant": name, **{key: summary[key] for key in ("held_out", "seconds", "mismatch")}}


def main() -> None:
    prepare()
    results = [run(name, overrides + sys.argv[1:]) for name, overrides in VARIANTS.items()]
    save(RESULTS / "sql_seeds.json", results)
    print_gains({result["variant"]: result["held_out"] for result in results})


if __name__ == "__main__":
    main()
