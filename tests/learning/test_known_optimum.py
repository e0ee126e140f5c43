"""It learns, from the first call of the agent to the last weight: a short form of benchmarks/known_optimum.py."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import known_optimum

from raygent.cluster.metrics import read_lines

STEPS = 18


@pytest.mark.timeout(1200)
def test_grpo_finds_the_string_that_is_best(tmp_path: Path) -> None:
    for name in ("agent.py", "train.toml"):
        shutil.copy(known_optimum.HERE / name, tmp_path / name)
    known_optimum.prepare(tmp_path, ("string",))
    found = known_optimum.run(
        "grpo",
        0,
        [f"run.steps={STEPS}", "algorithm.entropy=0.0"],
        tmp_path / "train.toml",
        tmp_path / "runs",
    )
    assert found["before"] < 0.2 and found["after"] >= 0.9
    (run,) = (tmp_path / "runs").iterdir()
    rows = read_lines(run / "metrics.jsonl")
    assert len(rows) == STEPS
    assert undocumented({name for row in (*rows, *read_lines(run / "evaluations.jsonl")) for name in row}) == set()


def undocumented(names: set[str]) -> set[str]:
    """Those that docs/metrics.md does not tell of."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    told = "|".join(
        re.escape(name).replace("NAME", "[^/]+").replace("@K", r"@\d+") for name in re.findall(r"`([\w/@]+)`", text)
    )
    return {name for name in names if not re.fullmatch(told, name)}
