"""One engine for all tests of the engine: the app as a run starts it, on a tiny model that was taught a few replies."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import REPLIES, SECRET, TOOLS, Attempt, engine_config, start_store
from ray import serve
from tiny_model import make_tiny_model, teach
from vendor import Vendor, serving

from raygent.actors.engine_handle import EngineHandle
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app
from raygent.config import Upstream
from raygent.records import Mode


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the engine's model, policy version 0."""
    return teach(make_tiny_model(tmp_path_factory.mktemp("model")), REPLIES, TOOLS)


@pytest.fixture(scope="session")
def store(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_store("engine-tests-store", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def upstream() -> Iterator[Vendor]:
    """The endpoint that the agent "judge" has for a model."""
    with serving() as vendor:
        yield vendor


@pytest.fixture(scope="session")
def engine(
    store: Any, model: Path, upstream: Vendor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineHandle]:
    config = engine_config("engine-tests", tmp_path_factory.mktemp("run"), model)
    os.environ["JUDGE_KEY"] = "sk-of-the-vendor"
    settings = {"agents": ["judge"], "base_url": upstream.base_url, "model": "big", "api_key_env": "JUDGE_KEY"}
    limits = {"timeout_s": 3.0, "price_input": 2.0, "price_output": 100.0}
    config.upstream["vendor"] = Upstream.model_validate(settings | limits)
    yield start_app(config, SECRET, "engine-tests-store", NAMESPACE, 0, str(model))
    delete_app(config)
    if not serve.status().applications:
        serve.shutdown()


@pytest.fixture
def attempt(engine: EngineHandle, store: Any) -> Callable[..., Attempt]:
    """A new attempt, which calls as agents do: attempt(mode="train", expires_s=600.0)."""

    def make(mode: Mode = "train", expires_s: float = 600.0) -> Attempt:
        return Attempt(engine, store, mode, expires_s, engine.status()[0]["url"])

    return make
