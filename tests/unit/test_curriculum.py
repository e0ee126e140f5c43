"""The curriculum's maths, and what it does to a simulated population of tasks."""

import random
from collections import Counter

import numpy as np
import pytest

from raygent.algorithms.curriculum import DECAY, PRIOR, UNIFORM, draw, expected_variances, probabilities


def test_the_variance_is_unbiased_recent_and_shrunk_to_the_mean_of_what_was_measured():
    half, flat = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    measured = {"half": [half], "flat": [flat], "improved": [half, flat], "worsened": [flat, half], "one": [[1.0]]}
    tasks = ["half", "flat", "improved", "worsened", "one", "never"]
    found = dict(zip(tasks, expected_variances(tasks, measured), strict=True))
    third = 1 / 3  # the unbiased variance of `half`, of 3 degrees of freedom
    improved, worsened = DECAY * third / (1 + DECAY), third / (1 + DECAY)
    mean = (third + 0 + improved + worsened) / 4
    assert found["never"] == found["one"] == pytest.approx(mean)
    assert found["half"] == pytest.approx((1 + PRIOR * mean) / (3 + PRIOR))
    assert found["flat"] == pytest.approx(PRIOR * mean / (3 + PRIOR))
    freedom = 3 * (1 + DECAY)
    assert found["improved"] == pytest.approx((improved * freedom + PRIOR * mean) / (freedom + PRIOR))
    assert found["flat"] < found["improved"] < found["worsened"] < found["half"]


def test_rewards_of_any_scale_give_the_same_probabilities():
    measured = {"a": [[0.0, 1.0, 1.0]], "b": [[0.0, 0.5, 1.0]], "c": [[-1.0, -1.0, -1.0]]}
    scaled = {task: [[100 * reward - 7 for reward in group] for group in groups] for task, groups in measured.items()}
    one, other = (probabilities(expected_variances(["a", "b", "c", "d"], of)) for of in (measured, scaled))
    assert one == pytest.approx(other) and one.sum() == pytest.approx(1)
    assert one[0] > one[3] > one[2] >= UNIFORM / 4


@pytest.mark.parametrize("measured", [{}, {"a": [[1.0, 1.0]], "b": [[0.0, 0.0]]}])
def test_where_nothing_varies_all_are_alike(measured):
    assert probabilities(expected_variances(["a", "b", "c"], measured)).tolist() == [1 / 3] * 3


def test_draws_are_in_proportion_and_without_replacement():
    weights, chance = np.array([0.5, 0.3, 0.15, 0.05]), random.Random(0)
    pairs = Counter(tuple(draw(chance, weights, 2)) for _ in range(5_000))
    for one in range(4):
        for two in range(4):
            expected = 0 if one == two else weights[one] * weights[two] / (1 - weights[one])
            assert pairs[one, two] / 5_000 == pytest.approx(expected, abs=0.025)
    assert sorted(draw(chance, weights, 10)) in [sorted([0, 1, 2, 3] * 2 + list(rest)) for rest in
        [(a, b) for a in range(4) for b in range(a)]]  # fmt: skip


def simulate(steps: int, learns: float = 0.0) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """60 % of 100 tasks are hopeless, 20 % solved, 20 % between; 5 a step, 8 rollouts each; a task's rate rises by `learns` a visit.
    The last rates, each step's true variance of what it chose and of all tasks, and what was chosen."""
    chance = random.Random(3)
    rates = np.array([0.0] * 60 + [1.0] * 20 + [chance.uniform(0.1, 0.9) for _ in range(20)])
    tasks = [str(number) for number in range(len(rates))]
    measured: dict[str, list[list[float]]] = {}
    varied, chosen = [], []
    for _ in range(steps):
        variances = rates * (1 - rates)
        chosen.append(draw(chance, probabilities(expected_variances(tasks, measured)), 5))
        varied.append((variances[chosen[-1]].mean(), variances.mean()))
        for place in chosen[-1]:
            rewards = [float(chance.random() < rates[place]) for _ in range(8)]
            measured.setdefault(tasks[place], []).append(rewards)
            if 0 < rates[place] < 1:
                rates[place] = min(1.0, rates[place] + learns)
    return rates, np.array(varied), chosen


def test_what_is_chosen_varies_more_than_all_tasks_do_and_no_task_is_lost():
    _, varied, chosen = simulate(600)
    first, late = varied[:5].mean(axis=0), varied[100:].mean(axis=0)
    assert first[0] < 1.8 * first[1]  # little is known yet
    assert late[0] > 3 * late[1]
    times = Counter(place for step in chosen[100:] for place in step)
    assert len(times) == 100
    assert np.mean([times[place] for place in range(80)]) >= UNIFORM * 5 / 100 * 500


def test_tasks_that_become_solved_make_room():
    """What was learnt long ago is not taken for what still teaches."""
    rates, _, chosen = simulate(300, learns=0.05)
    assert rates[80:].mean() > 0.98
    last = Counter(place for step in chosen[-100:] for place in step)
    between, others = np.mean([last[place] for place in range(80, 100)]), np.mean([last[p] for p in range(80)])
    assert between < 2 * others
