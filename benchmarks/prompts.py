"""Do APO and GEPA find a better prompt for the SQL example? The served model plays the agent, prompt_stub.py the optimiser's model.

    uv run python benchmarks/prompts.py [apo] [gepa] [section.key=value ...]

Each is a whole `raygent train examples/sql/prompts.toml`, whose first prompt the small model is not used to. `gain` is the mean
reward on held-out questions with the best prompt minus with the first, with its paired bootstrap 95 % interval. The tree of
prompts is read from the store. Writes benchmarks/results/prompts/NAME.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from prompt_stub import serving

ROOT = Path(__file__).resolve().parent.parent
TOML = ROOT / "examples" / "sql" / "prompts.toml"
RUNS = ROOT / "runs" / "prompts"
RESULTS = ROOT / "benchmarks" / "results" / "prompts"
OVERRIDES = {"apo": [], "gepa": ["run.steps=40"]}


def run(name: str, base_url: str, overrides: list[str]) -> dict:
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"run.directory={RUNS}", f"run.name={name}", f"algorithm.name={name}"]
    where.append(f"upstream.reviser.base_url={base_url}")
    command = [sys.executable, "-m", "raygent.cli", "train", str(TOML), *where, *OVERRIDES[name], *overrides]
    subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    tree = pq.read_table(folder / "store" / "prompts").to_pylist()
    calls = pq.read_table(folder / "store" / "calls", columns=["policy"])["policy"].to_pylist()
    told = {key: summary[key] for key in ("steps", "held_out", "seconds", "rollouts")}
    return told | {"calls": {policy: calls.count(policy) for policy in sorted(set(calls))}, "prompts": tree}


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    asked = [argument for argument in sys.argv[1:] if "=" not in argument] or list(OVERRIDES)
    if unknown := set(asked) - set(OVERRIDES):
        sys.exit(f"no algorithm {', '.join(sorted(unknown))} here; there are {', '.join(OVERRIDES)}")
    if not (TOML.parent / "model").is_dir():
        subprocess.run([sys.executable, str(TOML.parent / "prepare.py")], check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with serving() as base_url:
        for name in asked:
            found = run(name, base_url, overrides)
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'algorithm':10} {'n':>4} {'first':>7} {'best':>7} {'gain':>7}  95 % interval      prompts")
    for name in asked:
        found = json.loads((RESULTS / f"{name}.json").read_text())
        held_out = found["held_out"]
        low, high = held_out["gain_ci95"]
        print(
            f"{name:10} {held_out['n']:4} {held_out['before']:7.3f} {held_out['after']:7.3f} {held_out['gain']:+7.3f}  [{low:+.3f}, {high:+.3f}]  {len(found['prompts'])}"
        )


if __name__ == "__main__":
    main()
