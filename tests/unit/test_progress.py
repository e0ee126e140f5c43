"""What tells whether a run learns honestly: alarms, pass@k, the best checkpoint."""

from __future__ import annotations

from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
from conversations import config
from hypothesis import given
from hypothesis import strategies as st

from raygent.actors.learner import LearnerGroup
from raygent.algorithms.batch import repetition
from raygent.algorithms.pass_at_k import pass_at_k, passes
from raygent.cluster.alarms import SIGNS, SKIPPED, signs
from raygent.cluster.metrics import best_step

STEADY = {"entropy": 1.0, "response_length": 30.0, "repetition": 0.02, "branch_rate": 0.0}
COLLAPSED = {"entropy": 0.05, "response_length": 120.0, "repetition": 0.6, "branch_rate": 0.5}


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_raises_its_alarm_alone(name: str) -> None:
    worse = STEADY | {name: COLLAPSED[name]}
    assert signs([STEADY] * 10) == {} and signs([STEADY] * 4 + [worse] * 5) == {}
    assert list(signs([STEADY] * 5 + [worse] * 5)) == [name]
    assert signs([{"entropy": 1.0}] * 20) == {}


def test_shorter_replies_are_a_sign_too() -> None:
    assert list(signs([STEADY] * 5 + [STEADY | {"response_length": 3.0}] * 5)) == ["response_length"]


def test_repetition_of_runs_of_four() -> None:
    assert repetition(np.array([1, 2, 3, 4])) == 0.0 and repetition(np.arange(20)) == 0.0
    assert repetition(np.array([7] * 13)) == pytest.approx(0.9)  # 10 runs, one of its kind


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_success(tries: list[bool], k: int) -> None:
    if k <= len(tries):
        draws = [any(draw) for draw in combinations(tries, k)]
        assert len(draws) == comb(len(tries), k)
        assert pass_at_k(len(tries), sum(tries), k) == pytest.approx(np.mean(draws))


def test_passes_over_tasks() -> None:
    found = passes({"a": [True, False, False, False], "b": [False] * 4, "c": [True] * 5})
    assert {name for name in found if "/" not in name} == {"pass@1", "pass@2", "pass@4"}
    assert found["pass@4"] == pytest.approx(2 / 3) and found["pass@1"] == pytest.approx((0.25 + 1) / 3)
    assert found["pass@1/low"] <= found["pass@1"] <= found["pass@1/high"]


def test_the_best_step_is_told_by_the_tasks_that_all_evaluations_have() -> None:
    first = {"step": 0, "by_task": {"a": 0.5, "b": 1.0}}
    middle = {"step": 10, "by_task": {"a": 0.75}}
    last = {"step": 20, "by_task": {"a": 0.75, "b": 1.0}}
    assert best_step([first, middle, last]) == 10
    assert best_step([first, last]) == 20 and best_step([first]) == 0 and best_step([]) is None


def test_an_evaluation_that_lost_much_or_was_of_other_tasks_is_not_the_best() -> None:
    tasks = [f"t{number}" for number in range(50)]
    half = {"step": 20, "lost": 0, "by_task": dict.fromkeys(tasks, 0.5)}
    lost = {"step": 40, "lost": 48, "by_task": dict.fromkeys(tasks[:2], 1.0)}
    best = {"step": 60, "lost": 1, "by_task": dict.fromkeys(tasks[1:], 0.8)}
    assert best_step([half, lost, best]) == 60 and best_step([half, lost]) == 20 and best_step([lost]) is None
    first, second = half | {"step": 0, "digests": {"t1": "old"}}, best | {"digests": {"t1": "new"}}
    assert best_step([first | {"by_task": {"t1": 1.0}}, second]) == 60 and best_step([first, half, second]) == 60


def test_the_best_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = LearnerGroup(config(run={"directory": str(tmp_path), "name": "run", "keep_checkpoints": 2}))
    monkeypatch.setattr(group, "_all", lambda *_: [])
    root = tmp_path / "run" / "checkpoints"
    for step in range(1, 7):
        group.save(step, step)
        if step in (2, 4):
            group.mark_best(2)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-000002", "step-000005", "step-000006"]
    assert (root / "best" / "raygent.json").is_file()
    group.mark_best(6)
    group.save(7, 7)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-000006", "step-000007"]
    group.mark_best(0)  # the first weights are in no checkpoint
    group.mark_best(None)
    assert (root / "best").readlink() == Path("step-000006")


def test_updates_left_out_are_told_at_once():
    assert signs([{SKIPPED: 0.0}]) == {} == signs([{SKIPPED: 1.0}, {SKIPPED: 0.0}])
    assert list(signs([{SKIPPED: 1.0}])) == [SKIPPED] == list(signs([{f"critic/{SKIPPED}": 2.0}]))
