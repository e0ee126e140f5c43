"""What several unit tests look at."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture(autouse=True)
def users_modules_end_with_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The check imports the user's agent.py and puts its folder on the path: another test's agent.py is not that one."""
    folder, before = tmp_path_factory.getbasetemp(), set(sys.modules)
    yield
    sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(folder)]
    for name in sys.modules.keys() - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture
def processes_of() -> Callable[[str], list[int]]:
    """Ids of the living processes with this very command line."""

    def find(text: str) -> list[int]:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and text == " ".join(process.info["cmdline"] or ()):
                found.append(process.info["pid"])
        return found

    return find
