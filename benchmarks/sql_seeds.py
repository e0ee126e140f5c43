"""Does the SQL example learn, and do its controls not? Three seeds, learning rate 0, and shuffled rewards.

    uv run python benchmarks/sql_seeds.py [section.key=value ...]

Each line is a whole `raygent train examples/sql/train.toml` on the same held-out questions; `gain` is the mean reward after
minus before, with its paired bootstrap 95 % interval. Writes benchmarks/results/sql_seeds.json. 35 to 65 minutes on 2 cores.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOML = ROOT / "examples" / "sql" / "train.toml"
RUNS = ROOT / "runs" / "benchmark"
VARIANTS = {
    "seed 1": ["run.seed=1"],
    "seed 2": ["run.seed=2"],
    "seed 3": ["run.seed=3"],
    "learning rate 0": ["run.seed=1", "learner.learning_rate=0.0"],
    "shuffled rewards": ["run.seed=1", "grader.run=../../benchmarks/shuffled.py:rows_equal"],
}


def run(name: str, overrides: list[str]) -> dict:
    folder = RUNS / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"run.directory={RUNS}", f"run.name={folder.name}"]
    subprocess.run([sys.executable, "-m", "raygent.cli", "train", str(TOML), *where, *overrides], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "variant": name,
        "held_out": summary["held_out"],
        "seconds": summary["seconds"],
        "mismatch": summary["mismatch"],
    }


def main() -> None:
    if not (TOML.parent / "model").is_dir():
        subprocess.run([sys.executable, str(TOML.parent / "prepare.py")], check=True)
    results = [run(name, overrides + sys.argv[1:]) for name, overrides in VARIANTS.items()]
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "sql_seeds.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'variant':18} {'n':>4} {'before':>7} {'after':>7} {'gain':>7}  95 % interval")
    for result in results:
        held_out = result["held_out"]
        low, high = held_out["gain_ci95"]
        print(
            f"{result['variant']:18} {held_out['n']:4} {held_out['before']:7.3f} {held_out['after']:7.3f} {held_out['gain']:+7.3f}  [{low:+.3f}, {high:+.3f}]"
        )


if __name__ == "__main__":
    main()
