"""Which tasks a driver step has: each file of data.train has its share, and gives it epoch after epoch, or by the curriculum."""

from __future__ import annotations

import random
from functools import cache, lru_cache

import numpy as np

from raygent.algorithms.curriculum import Groups, draw, expected_variances, probabilities
from raygent.config import Config
from raygent.records import Task


def step_tasks(config: Config, tasks: list[Task], step: int, measured: Groups) -> list[Task]:
    """The `algorithm.tasks_per_step` tasks of driver step `step`, by run.seed and step alone, and with data.curriculum by the
    rewards `measured`."""
    size, seed, chosen = config.algorithm.tasks_per_step, config.run.seed, []
    begins, ends = (_places_before(seed, size, _weights(config, tasks), at) for at in (step, step + 1))
    for place, own in enumerate(_by_file(tasks)):
        number = ends[place] - begins[place]
        if config.data.curriculum:
            chosen += _drawn(f"{seed}-{step}-0-{place}", own, number, measured)
        else:
            chosen += [own[at] for at in _in_epochs(seed, place, len(own), begins[place], number)]
    return chosen


def refill_tasks(
    config: Config, tasks: list[Task], step: int, refill: int, number: int, measured: Groups
) -> list[Task]:
    """`number` more tasks for step `step`, its `refill`-th from 1 (fewer where a file has not enough): by the same as above and
    refill alone. None of those that the step had at first, where there are others."""
    key, chosen = f"{config.run.seed}-{step}-{refill}", []
    had = {task.id for task in step_tasks(config, tasks, step, measured)}
    counts = _shares(key, number, _weights(config, tasks))
    for place, (own, wanted) in enumerate(zip(_by_file(tasks), counts, strict=True)):
        own = [task for task in own if task.id not in had] or own
        if config.data.curriculum:
            chosen += _drawn(f"{key}-{place}", own, min(wanted, len(own)), measured)
        else:
            chosen += random.Random(_of_file(key, place)).sample(own, min(wanted, len(own)))
    return chosen


def due(config: Config, items: int, step: int) -> list[int]:
    """Which of so many items are due at driver step `step`: `algorithm.tasks_per_step` of them, epoch after epoch, each in an
    order of its own."""
    size = config.algorithm.tasks_per_step
    return _in_epochs(config.run.seed, 0, items, step * size, size)


def shares(config: Config, tasks: list[Task]) -> dict[str, float]:
    """The part of all places that each file's tasks have in the mean, by its name ("" where there is but one file)."""
    weights = _weights(config, tasks)
    names = [own[0].source for own in _by_file(tasks)]
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def expected_by_task(tasks: list[Task], measured: Groups) -> dict[str, float]:
    """By task id the variance that the curriculum expects, for which it knows each file's mean."""
    ids = [[task.id for task in own] for own in _by_file(tasks)]
    return {task: float(one) for own in ids for task, one in zip(own, expected_variances(own, measured), strict=True)}


def _by_file(tasks: list[Task]) -> list[list[Task]]:
    files: dict[str, list[Task]] = {}
    for task in tasks:
        files.setdefault(task.source, []).append(task)
    return list(files.values())


def _weights(config: Config, tasks: list[Task]) -> tuple[float, ...]:
    return tuple(config.data.weights or [float(len(own)) for own in _by_file(tasks)])


def _places_before(seed: int, size: int, weights: tuple[float, ...], step: int) -> list[int]:
    """How many places each file had in the steps before `step`."""
    sums = _sums(seed, size, weights)
    while len(sums) <= step:
        counts = _shares(f"{seed}-{len(sums) - 1}", size, weights)
        sums.append([sum(pair) for pair in zip(sums[-1], counts, strict=True)])
    return sums[step]


@cache
def _sums(seed: int, size: int, weights: tuple[float, ...]) -> list[list[int]]:
    """What _places_before() has reckoned of a run, by the step."""
    return [[0] * len(weights)]


def _shares(key: str, places: int, weights: tuple[float, ...]) -> list[int]:
    """How many of `places` each weight has: the whole parts of its share, and what is left over by chance, so that the mean is
    the share. Systematic sampling: points at distance 1, the first by chance, fall into intervals as long as the shares."""
    bounds = np.cumsum(weights) * (places / sum(weights))
    points = np.arange(places) + random.Random(f"shares-{key}").random()
    return np.bincount(np.searchsorted(bounds[:-1], points, side="right"), minlength=len(weights)).tolist()


def _in_epochs(seed: int, file: int, items: int, first: int, number: int) -> list[int]:
    """Of the orders of all epochs, one behind the other, the `number` items from `first` on."""
    places = [divmod(place, items) for place in range(first, first + number)]
    return [_order(seed, file, epoch, items)[offset] for epoch, offset in places]


@lru_cache(16)
def _order(seed: int, file: int, epoch: int, items: int) -> list[int]:
    order = list(range(items))
    random.Random(_of_file(f"{seed}-{epoch}", file)).shuffle(order)
    return order


def _of_file(key: str, place: int) -> str:
    """The first file has the order that it would have alone."""
    return f"{key}-{place}" if place else key


def _drawn(key: str, tasks: list[Task], number: int, measured: Groups) -> list[Task]:
    weights = probabilities(expected_variances([task.id for task in tasks], measured))
    return [tasks[place] for place in draw(random.Random(f"curriculum-{key}"), weights, number)]
