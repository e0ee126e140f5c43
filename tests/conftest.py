"""What the whole test session shares: one Ray, whose driver is pytest."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from raygent.cluster.start import quiet_environment

quiet_environment()  # before Ray is imported: under `uv run` it would make its workers environments of their own, without vLLM

import ray  # noqa: E402

from raygent.cluster.parts import NAMESPACE  # noqa: E402

settings.register_profile("raygent", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("raygent")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray on this machine, told of more CPUs than there are: the actors of tests share them."""
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=16,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


ended = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[ended] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End here: the native threads of Ray, torch and vLLM have crashed the interpreter's own end, after the closing line."""
    if ended in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[ended])
