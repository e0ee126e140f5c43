"""What several unit tests look at."""

from collections.abc import Callable

import psutil
import pytest


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
