"""Do APO and GEPA find a better prompt for the SQL example? The served model plays the agent, prompt_stub.py the optimiser's model.

    uv run python benchmarks/prompts.py [apo] [gepa] [section.key=value ...]

Each is a whole `raygent train examples/sql/prompts.toml`, whose first prompt the small model is not used to. `gain` is the mean
reward on held-out questions with the best prompt minus with the first, with its paired bootstrap 95 % interval. The tree of
prompts is read from the store. Writes benchmarks/results/prompts/NAME.json.
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq
from prompt_stub import serving
from whole_runs import RESULTS, ROOT, SQL, names_and_overrides, prepare, print_gains, save, train

RUNS = ROOT / "runs" / "prompts"
OVERRIDES = {"apo": [], "gepa": ["run.steps=40"]}


def run(name: str, base_url: str, overrides: list[str]) -> dict:
    folder = RUNS / name
    own = [f"algorithm.name={name}", f"upstream.reviser.base_url={base_url}", *OVERRIDES[name]]
    summary = train(SQL / "prompts.toml", folder, [*own, *overrides])
    tree = pq.read_table(folder / "store" / "prompts").to_pylist()
    calls = pq.read_table(folder / "store" / "calls", columns=["policy"])["policy"].to_pylist()
    told = {key: summary[key] for key in ("steps", "held_out", "seconds", "rollouts")}
    return told | {"calls": {policy: calls.count(policy) for policy in sorted(set(calls))}, "prompts": tree}


def main() -> None:
    asked, overrides = names_and_overrides(sys.argv[1:], OVERRIDES)
    prepare()
    held_out = {}
    with serving() as base_url:
        for name in asked:
            found = run(name, base_url, overrides)
            save(RESULTS / "prompts" / f"{name}.json", found)
            held_out[name] = found["held_out"]
            print(f"{name}: {len(found['prompts'])} prompts in the store")
    print_gains(held_out)


if __name__ == "__main__":
    main()
