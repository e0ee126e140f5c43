"""`python store_load.py FOLDER LEDGER ROUNDS SEED`: a store under load, killed ROUNDS times with SIGKILL and opened again.

Each round is a process of its own with writers that lease, append and seal. A writer notes in LEDGER what it is about to
ask and what was acknowledged, each by one write() at the file's end, which outlives the process as the kill finds it.
When a round is killed is told by what it has done, so that a slow machine's rounds do as much as a fast one's: every third
has rolled its log, the others have made some requests, or have only begun.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores import calls, open_store, rollout

from raygent.actors import replay_store
from raygent.actors.replay_store import AttemptSealed, ReplayStore
from raygent.actors.segments import read_rolled
from raygent.records import Lease, Seal

WRITERS = 6
LEASE_S = 0.3
DEADLINE_S = 120  # of a round; it takes milliseconds
replay_store.SEGMENT_BYTES = 8_000  # so that rolls are killed, too
replay_store.LATE_HEARTBEATS_S = 0.01


class Ledger:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, *what: Any) -> None:
        os.write(self.fd, json.dumps(what).encode() + b"\n")


async def work(store: ReplayStore, ledger: Ledger, name: str, chance: random.Random) -> None:
    while True:
        leases = await store.lease(name, 2)
        if not leases:
            asked = (await store.status())["asked"]
            await store.add_rollouts([rollout(n, n // 20) for n in range(asked, asked + 10)])
            ledger.note("added", asked + 10)
        await asyncio.gather(*(attempt(store, ledger, lease, chance) for lease in leases))


async def attempt(store: ReplayStore, ledger: Ledger, lease: Lease, chance: random.Random) -> None:
    key = (lease.rollout.rollout_id, lease.attempt)
    made = chance.randint(1, 4)
    for number in range(made):
        ledger.note("appending", *key, number)
        try:
            await store.append("calls", calls(*key, *range(max(0, number - 1), number + 1)))  # the one before again
        except AttemptSealed:
            return
        ledger.note("appended", *key, number)
        await asyncio.sleep(0)
    outcome = chance.choice(["succeeded", "succeeded", "succeeded", "timeout", "engine_lost"])
    answer = await store.seal(Seal(*key, "w", outcome, 1.0, {"engine": made}))
    ledger.note("sealed", *key, answer, made)


async def load(folder: Path, ledger: Ledger, seed: int) -> None:
    store = open_store(folder, LEASE_S, max_attempts=1000)
    chance = random.Random(seed)
    await asyncio.gather(*(work(store, ledger, f"w{n}", chance) for n in range(WRITERS)))


def progress(number: int, folder: Path, ledger: Path, chance: random.Random) -> Callable[[], bool]:
    """Whether round `number`, which is about to start, has done what it is to do before its kill."""
    if number % 3 == 0:
        rolled = read_rolled(folder / "log").segment
        return lambda: read_rolled(folder / "log").segment > rolled
    noted = size_of(ledger) + chance.choice([0, chance.randint(0, 12_000)])
    return lambda: size_of(ledger) >= noted


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(folder: Path, ledger: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    calls("r", 1, 0)  # imports what pyarrow imports late, once for all rounds
    for number in range(rounds):
        done = progress(number, folder, ledger, chance)
        child = os.fork()
        if child == 0:
            asyncio.run(load(folder, Ledger(ledger), seed + number))
            os._exit(1)
        deadline = time.monotonic() + DEADLINE_S
        while not done() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or not done():
            sys.exit(f"round {number} {'hung' if os.WIFSIGNALED(status) else 'ended by itself'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
