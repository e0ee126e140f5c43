"""It learns, from the first call of the agent to the last weight: a short form of benchmarks/known_optimum.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import known_optimum


@pytest.mark.timeout(1200)
def test_grpo_finds_the_string_that_is_best(tmp_path: Path) -> None:
    for name in ("agent.py", "train.toml"):
        shutil.copy(known_optimum.HERE / name, tmp_path / name)
    known_optimum.prepare(tmp_path, ("string",))
    found = known_optimum.run(
        "grpo",
        0,
        [
            "run.steps=14",
            "algorithm.tasks_per_step=12",
            "learner.learning_rate=3e-3",
            "algorithm.entropy=0.0",
        ],
        tmp_path / "train.toml",
        tmp_path / "runs",
    )
    assert found["before"] < 0.2 and found["after"] > 0.8
