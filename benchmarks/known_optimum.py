"""Do the algorithms find what is best? Tasks with a known optimum, each through the whole of `raygent train`.

    uv run python benchmarks/known_optimum.py [ALGORITHM ...] [--seeds N] [section.key=value ...]

The tasks (known_optimum/agent.py): a string of one turn, two turns with the credit to be found out, and rollouts that split
into two conversations, in one batch, from a model of 0.1M random weights. The optimum is a mean reward of 1. Puts each
algorithm's figures into benchmarks/results/known_optimum/: the mean reward on 24 held-out tasks x 8 samples, before and after
each seed's run, and how many rollouts it took until the mean reward of SMOOTHED steps was 0.9; and all their curves into one
picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import whole_runs
from tiny_model import make_tiny_model
from whole_runs import ROOT, names_and_overrides, save, train

from raygent.cluster.metrics import reward_axes

HERE = ROOT / "benchmarks" / "known_optimum"
RUNS = ROOT / "runs" / "known_optimum"
RESULTS = whole_runs.RESULTS / "known_optimum"
Row = dict[str, Any]
OPTIMUM, REACHED = 1.0, 0.9
SMOOTHED = 3  # steps: one alone may be lucky
KINDS = ("string", "turns", "split")
KEEP_FLAT = "algorithm.drop_flat_groups=false"  # else no entropy bonus where whole groups agree on what is not the best
ALGORITHMS = {  # and what they need besides
    "grpo": [],
    "rloo": [KEEP_FLAT, "algorithm.entropy=0.006"],  # its advantages are not normalised
    "reinforce_plus_plus": [],
    "ppo": [],
    "gspo": [KEEP_FLAT],
    "cispo": [],
    "grpo_turns": ["algorithm.name=grpo", "algorithm.credit=turn"],
}


def prepare(folder: Path, kinds: tuple[str, ...] = KINDS) -> None:
    """The model and the tasks, none of the held-out ones among those trained on, beside the agent and its TOML."""
    make_tiny_model(folder / "model", context=256)
    for name, words in (("train", range(16)), ("test", range(100, 108))):
        rows = [{"id": f"{kind}-{word}", "input": {"kind": kind, "word": word}} for word in words for kind in kinds]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(algorithm: str, seed: int, overrides: list[str], toml: Path = HERE / "train.toml", runs: Path = RUNS) -> Row:
    """What came of one `raygent train`."""
    folder = runs / f"{algorithm}-{seed}"
    own = [f"run.seed={seed}", f"algorithm.name={algorithm}", *ALGORITHMS[algorithm]]
    summary = train(toml, folder, [*own, *overrides])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row.get("reward", 0.0) for row in steps]
    smooth = [statistics.fmean(rewards[end - SMOOTHED : end]) for end in range(SMOOTHED, len(steps) + 1)]
    reached = [place + SMOOTHED for place, mean in enumerate(smooth) if mean >= REACHED * OPTIMUM]
    until = int(sum(row["rollouts"] for row in steps[: reached[0]])) if reached else None
    held_out = summary["held_out"]
    return {
        "seed": seed,
        "settings": [*ALGORITHMS[algorithm], *overrides],
        "before": held_out["before"],
        "after": held_out["after"],
        "rollouts": int(sum(row["rollouts"] for row in steps)),
        "rollouts_until_reached": until,
        "seconds": sum(summary["seconds"].values()),
        "rewards": [round(reward, 3) for reward in rewards],
    }


def draw(path: Path) -> None:
    """The mean reward of training, over the seeds, of all algorithms that have figures."""
    with reward_axes(path) as axes:
        for algorithm in ALGORITHMS:
            file = RESULTS / f"{algorithm}.json"
            if file.is_file():
                seeds = json.loads(file.read_text())
                length = min(len(one["rewards"]) for one in seeds)
                mean = [statistics.fmean(one["rewards"][step] for one in seeds) for step in range(length)]
                axes.plot(range(1, length + 1), mean, label=algorithm)
        axes.axhline(REACHED * OPTIMUM, color="0.7", linestyle="--")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_intermixed_args()
    asked, overrides = names_and_overrides(given.arguments, ALGORITHMS)
    prepare(HERE)
    for algorithm in asked:
        found = [run(algorithm, seed, overrides) for seed in range(given.seeds)]
        save(RESULTS / f"{algorithm}.json", found)
        told = ", ".join(
            f"{one['before']:.3f} -> {one['after']:.3f} ({one['rollouts_until_reached'] or 'not in ' + str(one['rollouts'])} rollouts)"
            for one in found
        )
        print(f"{algorithm:20} {told}", flush=True)
        draw(RESULTS / "curves.png")


if __name__ == "__main__":
    main()
