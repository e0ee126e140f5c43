"""The keeper outlives the driver by the grace time, and is started again where it dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from conversations import config
from ray.exceptions import RayError

from raygent.cluster.keeper import keeper_name, start_keeper, stop_keeper
from raygent.cluster.parts import NAMESPACE

PATIENCE_S = 120.0


class Store:
    """Its name is the driver's sign of life."""


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.2)
    raise AssertionError("it never came to be")


def is_there(name: str) -> bool:
    try:
        ray.get_actor(name, NAMESPACE)
    except ValueError:
        return False
    return True


def process_of(keeper: Any) -> int | None:
    try:
        return ray.get(keeper.__ray_call__.remote(lambda _: os.getpid()), timeout=10)
    except RayError:  # it is being started again
        return None


@pytest.fixture
def app(cluster: None) -> Iterator[str]:
    yield "keeper-of-test"
    stop_keeper("keeper-of-test", NAMESPACE)


def test_a_keeper_that_dies_comes_back_and_ends_once_the_driver_is_gone(app: str) -> None:
    store = ray.remote(Store).options(name="store-of-test", namespace=NAMESPACE, num_cpus=0).remote()
    start_keeper(config(run={"grace_s": 2.0}), app, "store-of-test", NAMESPACE)
    keeper = ray.get_actor(keeper_name(app), NAMESPACE)
    first = until(lambda: process_of(keeper))
    os.kill(first, signal.SIGKILL)
    until(lambda: process_of(keeper) not in (None, first))
    time.sleep(4.0)
    assert is_there(keeper_name(app))  # longer than the grace time, and the driver is there
    ray.kill(store)
    until(lambda: not is_there(keeper_name(app)))
