"""Learners of two ranks on gloo, one group a ZeRO stage, shared by all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plain import Batch, make_batch
from ranks import Group, start_group


@pytest.fixture(scope="session", params=[0, 2, 3], ids=["zero0", "zero2", "zero3"])
def group(request: pytest.FixtureRequest, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    group = start_group(tmp_path_factory.mktemp(f"zero{request.param}"), request.param, tie=request.param != 0)
    yield group
    group.learners.stop()


@pytest.fixture(scope="session")
def batch(group: Group) -> Batch:
    return make_batch(group.model)
