"""Which tasks a step has, by files with weights and by the curriculum."""

import random
from collections import Counter

import numpy as np
import pytest
from conversations import config
from stores import open_store, run_attempt

from raygent.cluster.pacer import measured_before, refill_rollouts, steps_to_admit, train_rollouts
from raygent.cluster.task_choice import due, refill_tasks, shares, step_tasks
from raygent.records import Task


def settings(size: int = 10, group: int = 2, data: dict | None = None, staleness: int = 0, seed: int = 5):
    return config(
        algorithm={"tasks_per_step": size, "group_size": group, "staleness": staleness},
        run={"seed": seed},
        learner={"ranks": 1},
        data={"train": ["a.jsonl", "b.jsonl", "c.jsonl"]} | (data or {}),
    )


def of_files(**sizes: int) -> list[Task]:
    return [Task(f"{name}{number}", number, None, name) for name, size in sizes.items() for number in range(size)]


def ids(tasks: list[Task]) -> list[str]:
    return [task.id for task in tasks]


# mixtures


def test_one_file_is_drawn_as_it_always_was():
    """What raygent drew before there were several files."""
    before = [[3, 6, 1], [0, 4, 2], [5, 5, 4], [2, 3, 6]]
    one = settings(3, data={"train": "a.jsonl"})
    tasks = [Task(str(number), number) for number in range(7)]
    for step, places in enumerate(before):
        assert due(one, 7, step) == places
        assert ids(step_tasks(one, tasks, step, {})) == [str(place) for place in places]
        assert ids(step_tasks(settings(3), of_files(a=7), step, {})) == [f"a{place}" for place in places]
    assert ids(refill_tasks(one, tasks, 2, 1, 3, {})) == ["2", "6", "1"]  # none of those that the step had


@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25], [1, 7, 3.3], [2, 2, 1], [1, 1, 30]])
def test_each_file_has_its_share(weights):
    """Within each step to the whole number below or above it, in the mean to the share itself."""
    tasks, mixed = of_files(a=60, b=30, c=15), settings(data={"weights": weights})
    steps = 1000
    counts = [Counter(task.source for task in step_tasks(mixed, tasks, step, {})) for step in range(steps)]
    wanted = shares(mixed, tasks)
    assert list(wanted) == ["a", "b", "c"] and sum(wanted.values()) == pytest.approx(1)
    if weights is None:
        assert wanted["a"] == 60 / 105
    for name, share in wanted.items():
        of_step = np.array([count[name] for count in counts])
        assert np.all(np.abs(of_step - 10 * share) < 1), name
        error = np.sqrt(max(1e-9, 10 * share % 1 * (1 - 10 * share % 1)) / steps)
        assert abs(of_step.mean() - 10 * share) < 4.5 * error + 1e-9, name
    assert {count.total() for count in counts} == {10}


def test_within_a_file_epochs_are_whole_and_each_in_an_order_of_its_own():
    tasks, mixed = of_files(a=8, b=8, c=8), settings(7, data={"weights": [3, 2, 1]})
    drawn = [task for step in range(60) for task in step_tasks(mixed, tasks, step, {})]
    orders = {}
    for name in "abc":
        own = [task.id for task in drawn if task.source == name]
        epochs = [own[first : first + 8] for first in range(0, len(own) - 7, 8)]
        assert len(epochs) > 5
        for epoch in epochs:
            assert sorted(epoch) == [f"{name}{number}" for number in range(8)]
        orders[name] = [tuple(int(task[1:]) for task in epoch) for epoch in epochs]
        assert len(set(orders[name])) > 3
    assert orders["a"][0] != orders["b"][0] != orders["c"][0]


def test_the_step_alone_tells_the_tasks():
    tasks, mixed = of_files(a=9, b=5, c=4), settings()
    late = ids(step_tasks(mixed, tasks, 17, {}))
    assert [ids(step_tasks(mixed, tasks, step, {})) for step in range(18)][17] == late
    assert ids(step_tasks(settings(seed=6), tasks, 17, {})) != late


def test_refills_have_the_weights_too():
    tasks, mixed = of_files(a=50, b=50, c=50), settings(data={"weights": [6, 3, 1]})
    counts = Counter(task.source for step in range(500) for task in refill_tasks(mixed, tasks, step, 1, 10, {}))
    assert counts == {"a": 3000, "b": 1500, "c": 500}
    few = refill_tasks(mixed, of_files(a=2, b=50, c=50), 0, 1, 10, {})
    assert Counter(task.source for task in few) == {"a": 2, "b": 3, "c": 1} and len(set(ids(few))) == 6


# the curriculum

ON = {"curriculum": True, "weights": [1, 1, 2]}


def known(rates: dict[str, float], groups: int, chance: random.Random) -> dict[str, list[list[float]]]:
    return {
        task: [[float(chance.random() < rate) for _ in range(8)] for _ in range(groups)] for task, rate in rates.items()
    }


def test_the_curriculum_keeps_each_files_share_and_draws_no_task_twice():
    tasks = of_files(a=40, b=40, c=40)
    measured = known({task.id: task.input / 40 for task in tasks}, 2, random.Random(0))
    for step in range(50):
        chosen = step_tasks(settings(12, data=ON), tasks, step, measured)
        assert Counter(task.source for task in chosen) == {"a": 3, "b": 3, "c": 6}
        assert len({task.id for task in chosen}) == 12
        more = refill_tasks(settings(12, data=ON), tasks, step, 1, 8, measured)
        assert Counter(task.source for task in more) == {"a": 2, "b": 2, "c": 4}
        assert not {task.id for task in more} & {task.id for task in chosen}


def test_a_file_of_fewer_tasks_than_places_gives_all_of_them():
    chosen = step_tasks(settings(12, data=ON), of_files(a=2, b=40, c=40), 0, {})
    assert sorted(Counter(task.id for task in chosen if task.source == "a").values()) == [1, 2]


class Run:
    """A driver, its workers and learners as far as the choice of tasks goes, over a real store. `chance` makes the rewards."""

    def __init__(self, store, settings, tasks, rates, chance):
        self.store, self.settings, self.tasks, self.rates, self.chance = store, settings, tasks, rates, chance
        self.chosen: dict[int, list[str]] = {}

    async def step(self, step: int, early: int) -> None:
        """Ask for all admissible steps, then end the rollouts of `step` and so many of later ones."""
        for ahead in steps_to_admit(self.settings, step):
            measured = await self.store.rewards_before(measured_before(self.settings, ahead))
            rollouts = train_rollouts(self.settings, self.tasks, ahead, 0, measured)
            chosen = [one.task_id for one in rollouts if one.index == 0]
            assert self.chosen.setdefault(ahead, chosen) == chosen, f"step {ahead}, seen from {step}"
            await self.store.add_rollouts(rollouts)
        if step == 3:
            measured = await self.store.rewards_before(measured_before(self.settings, step))
            await self.store.add_rollouts(refill_rollouts(self.settings, self.tasks, step, 0, 1, 2, measured))
        await self.end(await self.store.wait(step, "train", 0) + early)

    async def end(self, number: int) -> None:
        for lease in await self.store.lease("w", number):
            reward = float(self.chance.random() < self.rates[lease.rollout.task_id])
            await run_attempt(self.store, lease, made=1, reward=reward)


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_resumed_run_chooses_the_same_tasks(tmp_path, staleness):
    """Rewards that came in early, a restart of the store and a rewind change nothing of what is asked again; undone steps may."""
    tasks = of_files(a=15, b=15, c=15)
    rates = {task.id: task.input / 14 for task in tasks}
    short = settings(6, 3, ON, staleness)
    store = open_store(tmp_path)
    run = Run(store, short, tasks, rates, random.Random(1))
    for step in range(7):
        await run.step(step, early=5 if staleness else 0)
    await store.close()
    for again in range(2):
        store = open_store(tmp_path)
        await store.rewind(5)
        resumed = Run(store, short, tasks, rates, random.Random(again + 2))
        resumed.chosen = {step: run.chosen[step] for step in range(5, 6 + staleness)}
        for step in range(5, 10):
            await resumed.step(step, early=3 if staleness else 0)
        await store.close()
    blind = [ids(step_tasks(short, tasks, step, {})) for step in range(10)]
    differ = [step for step in range(10) if resumed.chosen.get(step, run.chosen.get(step)) != blind[step]]
    assert differ[0] >= 1 + staleness and differ[-4:] == [6, 7, 8, 9]  # what was measured counts
