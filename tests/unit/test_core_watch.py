"""The watch over EngineCore, with a real process that has a child, and answers that come, fail, or never come. (With vLLM's own, see
tests/engine/test_replaced.py.)"""

import asyncio
import multiprocessing
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest

from raygent.actors import core_watch
from raygent.actors.core_watch import CoreWatch, why_it_died

SILENT_S = 0.3


def hang():
    subprocess.run(["sleep", "7451"])


@pytest.fixture
def core(processes_of):
    process = multiprocessing.get_context("spawn").Process(target=hang)
    process.start()
    while not processes_of("sleep 7451"):
        pass
    yield process
    for left in [*psutil.Process(process.pid).children(), process] if process.is_alive() else []:
        left.kill()


def watch_over(core, answer):
    """`answer`: what it does when it is asked."""
    client = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[core])))
    return CoreWatch(SimpleNamespace(engine_core=client, is_sleeping=answer), SILENT_S)


def looked_at(core, answer, seconds, busy=False):
    """Look at `core` for so long."""

    async def look():
        watch = watch_over(core, answer)
        for _ in range(round(seconds / 0.05)):
            watch.look(busy)
            await asyncio.sleep(0.05)

    asyncio.run(look())


async def never():
    await asyncio.Event().wait()


async def soon():
    await asyncio.sleep(0.1)


async def wrong():
    raise RuntimeError("dead")


def test_one_that_answers_or_is_at_an_update_is_left_alone(core, processes_of):
    looked_at(core, soon, 3 * SILENT_S)
    looked_at(core, wrong, 3 * SILENT_S)
    looked_at(core, never, 3 * SILENT_S, busy=True)
    assert core.is_alive() and processes_of("sleep 7451")


def test_a_loop_that_stood_still_is_not_the_cores_silence(core, monkeypatch):
    monkeypatch.setattr(core_watch, "MOST_GAP_S", 0.1)

    async def look():
        watch = watch_over(core, soon)
        watch.look(False)
        time.sleep(3 * SILENT_S)  # noqa: ASYNC251 - as one that blocks the loop
        watch.look(False)  # the answer has had no chance to be seen
        await asyncio.sleep(0.2)
        watch.look(False)

    asyncio.run(look())
    assert core.is_alive()


def test_one_that_is_silent_is_killed_with_its_workers(core, processes_of):
    looked_at(core, never, SILENT_S / 2)
    assert core.is_alive()
    with pytest.raises(RuntimeError, match="answered nothing"):  # what Serve's health check is told until it is gone
        looked_at(core, never, 3 * SILENT_S)
    core.join(10)
    assert not core.is_alive() and not processes_of("sleep 7451")


def test_what_it_wrote_last_tells_why_it_died(tmp_path):
    log = tmp_path / "worker.err"
    log.write_text("Error: of somebody else\n(EngineCore pid=7) Loading: 100%\n")
    assert "without a word" in why_it_died(log) and "without a word" in why_it_died(tmp_path / "none")
    log.write_text(
        "x" * 100_000 + "\n(EngineCore pid=7) Traceback\n(EngineCore pid=7) RuntimeError: no such head_dim: 16\nmore\n"
    )
    assert why_it_died(log) == "RuntimeError: no such head_dim: 16"
