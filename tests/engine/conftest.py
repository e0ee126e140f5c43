"""One engine for all tests of the engine: the app as a run starts it, on a tiny model that was taught a few replies."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import REPLIES, SECRET, TOOLS, Attempt, engine_config, start_store
from ray import serve
from tiny_model import make_tiny_model, teach

from raygent.actors.engine_handle import EngineHandle
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app
from raygent.records import Mode


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the engine's model, policy version 0."""
    return teach(make_tiny_model(tmp_path_factory.mktemp("model")), REPLIES, TOOLS)


@pytest.fixture(scope="session")
def store(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_store("engine-tests-store", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def engine(store: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHandle]:
    config = engine_config("engine-tests", tmp_path_factory.mktemp("run"), model)
    yield start_app(config, SECRET, "engine-tests-store", NAMESPACE, 0, str(model))
    delete_app(config)
    if not serve.status().applications:
        serve.shutdown()


@pytest.fixture
def attempt(engine: EngineHandle, store: Any) -> Callable[..., Attempt]:
    """A new attempt: attempt(mode="train", expires_s=600.0)."""

    def make(mode: Mode = "train", expires_s: float = 600.0) -> Attempt:
        return Attempt(engine, store, mode, expires_s)

    return make
