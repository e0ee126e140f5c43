"""The store after kills, power cuts and damage: what was acknowledged is there once, and what is damaged is named.

"Recovery of the store from a log cut at every byte after the last seal: each sealed attempt there; any byte flipped before
it: detected, named."
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import stores
from stores import call, calls, crash, open_store, rollout, rows_on_disk, run_attempt, taken

from raygent.actors.replay_store import ReplayStore
from raygent.actors.segments import StoreDamaged, read_log, read_rolled, read_segment
from raygent.actors.store_tables import read_parquet
from raygent.records import CALLS, SCHEMAS, Seal, to_batch

Tables = list[dict[str, list[dict[str, Any]]]]


@dataclass
class Whole:
    """A store as a kill left it, with every kind of file: tables, a closed segment that waits for the next roll, and an
    open one that ends in appends after the last seal."""

    folder: Path
    open_log: Path
    closed_log: Path
    safe: int  # bytes of `open_log` at the last seal
    held: Tables  # what take() says of both steps


async def all_taken(folder: Path) -> Tables:
    store = open_store(folder)
    try:
        return [await taken(store, step) for step in (0, 1)]
    finally:
        crash(store)


@pytest.fixture(scope="module")
async def whole(tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    store = open_store(folder)
    await store.add_rollouts([rollout(n, n // 3) for n in range(6)])
    leases = await store.lease("w", 5)
    await run_attempt(store, leases[0])
    await store.roll()
    await run_attempt(store, leases[4])
    await store.mark_trained(0, [leases[0].rollout.rollout_id])
    in_the_way = folder / "calls" / "train-000001-0-000002.parquet.tmp"
    in_the_way.mkdir()
    with pytest.raises(IsADirectoryError):
        await store.roll()
    in_the_way.rmdir()
    await run_attempt(store, leases[2])
    safe = store.log.written
    held = [await taken(store, step) for step in (0, 1)]
    await store.append("calls", calls(leases[1].rollout.rollout_id, 1, 0))
    crash(store)
    closed_log, open_log = sorted((folder / "log").glob("*.log"))
    return Whole(folder, open_log, closed_log, safe, held)


def copied(whole: Whole, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(whole.folder, to)


def turn(path: Path, place: int) -> None:
    """Turn over one bit of the byte at `place`."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << place % 8)]))


@contextmanager
def flipped(path: Path, place: int) -> Iterator[None]:
    turn(path, place)
    yield
    turn(path, place)


async def test_cut_at_every_byte_after_the_last_seal_each_sealed_attempt_is_there(whole, tmp_path):
    size = whole.open_log.stat().st_size
    assert size > whole.safe + 800
    folder = copied(whole, tmp_path / "every")
    cut = folder / "log" / whole.open_log.name
    sealed = [frame for frame in read_segment(cut).frames if frame.end <= whole.safe]
    for length in range(size, whole.safe - 1, -1):
        os.truncate(cut, length)
        found = read_log(folder / "log")[-1]
        assert found.frames[: len(sealed)] == sealed and found.end + found.torn == length
        if length % 50 == 0:
            shutil.copytree(folder, tmp_path / "opened")
            assert await all_taken(tmp_path / "opened") == whole.held
            shutil.rmtree(tmp_path / "opened")


async def test_any_byte_flipped_in_the_log_before_the_last_seal_is_named_and_nothing_is_touched(whole, tmp_path):
    folder = copied(whole, tmp_path / "bad")
    for log, safe in ((whole.open_log, whole.safe), (whole.closed_log, whole.closed_log.stat().st_size)):
        bad = folder / "log" / log.name
        for place in range(safe):
            with flipped(bad, place):
                damage = named(read_log, folder / "log")
                assert damage.file == str(bad) and damage.offset <= place
                if place % 500 == 0:
                    assert named(open_store, folder).file == str(bad)
        assert bad.read_bytes() == log.read_bytes()
    for place in range(whole.safe, whole.open_log.stat().st_size, 50):  # what was never vouched for is cut off
        folder = copied(whole, tmp_path / "tail")
        turn(folder / "log" / whole.open_log.name, place)
        assert await all_taken(folder) == whole.held


async def test_any_byte_flipped_or_cut_in_a_table_or_in_the_commit_is_named(whole, tmp_path):
    folder = copied(whole, tmp_path / "bad")
    commit = folder / "log" / "0.rolled"
    for place in range(commit.stat().st_size):
        with flipped(commit, place):
            assert named(open_store, folder).file == str(commit)
    files = sorted(read_rolled(folder / "log").files)
    assert {name.partition("/")[0] for name in files} == {"rollouts", "attempts", "calls", "rewards"}
    for name in files:
        path = folder / name
        size = path.stat().st_size
        for place in range(size):
            with flipped(path, place):
                assert named(read_parquet, path).file == str(path)
        with flipped(path, size // 2), pytest.raises(StoreDamaged, match=path.name):
            await all_taken(folder)
    assert await all_taken(folder) == whole.held
    folder = copied(whole, tmp_path / "cut")
    for path, read in (
        (folder / files[0], read_parquet),
        (folder / "log" / "0.rolled", lambda of: read_rolled(of.parent)),
    ):
        for length in range(path.stat().st_size - 1, -1, -1):
            os.truncate(path, length)
            assert named(read, path).file == str(path)


def named(read: Callable, *args: Any) -> StoreDamaged:
    try:
        read(*args)
    except StoreDamaged as damage:
        return damage
    raise AssertionError(f"{args}: no damage found")


async def test_a_missing_file_is_named(whole, tmp_path):
    needed = [*read_rolled(whole.folder / "log").files, "log/0.rolled", f"log/{whole.closed_log.name}"]
    for name in needed:
        folder = copied(whole, tmp_path / "bad")
        (folder / name).unlink()
        before = sorted(path for path in folder.rglob("*") if path.is_file())
        with pytest.raises(StoreDamaged, match="missing") as damage:
            open_store(folder)
        assert damage.value.file == str(folder / name).replace("0.rolled", "0-000001.log")
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    folder = copied(whole, tmp_path / "bad")
    shutil.rmtree(folder / "log")
    with pytest.raises(StoreDamaged, match="missing"):
        open_store(folder)
    assert rows_on_disk(folder, "calls") == rows_on_disk(whole.folder, "calls")


async def test_the_segment_after_a_finished_roll_is_missed(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0)])
    await store.roll()
    await store.close()
    (tmp_path / "log" / "0-000002.log").rename(tmp_path / "log" / "0-000003.log")
    with pytest.raises(StoreDamaged, match=r"0-000002\.log"):
        open_store(tmp_path)


class Disk:
    """What a kill and what a power cut would leave of a folder, before each call that changes files there.

    A power cut leaves a name that its folder's fsync made safe, and of a file at least what the file's fsync made safe; of
    the bytes written since, any block may be there or not.
    """

    STEPS = ("fsync", "fdatasync", "rename", "unlink", "write", "writev", "mkdir")

    def __init__(self, folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.images = folder, images
        self.contents: dict[int, bytes] = {}  # inode -> what is safe of it
        self.names: dict[Path, dict[str, int]] = {}  # folder -> the names in it that are safe -> inode
        self.chance = random.Random(0)
        self.lock, self.looking = threading.Lock(), threading.local()
        self.told: Any = None  # what has been acknowledged
        self.taken: list[tuple[Path, Any]] = []  # image, what had been acknowledged
        self.last: dict[str, Any] = {}  # what the last image of each kind held
        for name in self.STEPS:
            monkeypatch.setattr(os, name, self.step(name, getattr(os, name)))

    def step(self, name: str, real: Callable) -> Callable:
        def taken(*args: Any, **rest: Any) -> Any:
            if getattr(self.looking, "now", False):
                return real(*args, **rest)
            self.looking.now = True
            try:
                with self.lock:
                    self.image(f"{len(self.taken):04d}-{name}-kill", self.as_it_is)
                    self.image(f"{len(self.taken):04d}-{name}-cut", self.after_a_power_cut)
                    result = real(*args, **rest)
                    if name in ("fsync", "fdatasync"):
                        self.synced(Path(os.readlink(f"/proc/self/fd/{args[0]}")), os.fstat(args[0]).st_ino)
            finally:
                self.looking.now = False
            return result

        return taken

    def synced(self, path: Path, inode: int) -> None:
        if path.is_dir():
            self.names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.contents[inode] = path.read_bytes()

    def image(self, name: str, leave: Callable[[Path], object]) -> None:
        if self.folder.exists():
            image = self.images / name
            leave(image)
            left = {path.relative_to(image): path.is_file() and path.read_bytes() for path in image.rglob("*")}
            if (left, self.told) == self.last.get(leave.__name__):
                shutil.rmtree(image)
            else:
                self.taken.append((image, self.told))
                self.last[leave.__name__] = (left, self.told)

    def as_it_is(self, image: Path) -> None:
        shutil.copytree(self.folder, image)

    def after_a_power_cut(self, image: Path) -> None:
        there = {path.stat().st_ino: path for path in self.folder.rglob("*")}
        image.mkdir()
        if self.folder.name in self.names.get(self.folder.parent, {}):
            self.fill(image, self.folder, there)

    def fill(self, image: Path, folder: Path, there: dict[int, Path]) -> None:
        for name, inode in self.names.get(folder, {}).items():
            if (folder / name).is_dir():
                (image / name).mkdir()
                self.fill(image / name, folder / name, there)
            else:
                safe = self.contents.get(inode, b"")
                written = there[inode].read_bytes() if inode in there else safe
                (image / name).write_bytes(safe + self.garbled(written[len(safe) :]))

    def garbled(self, tail: bytes) -> bytes:
        """Blocks of it as they were written, as zeros or as whatever lay there, up to some length."""
        blocks = [tail[place : place + 64] for place in range(0, len(tail), 64)]
        mixed = [self.chance.choice([block, block, bytes(len(block)), self.chance.randbytes(64)]) for block in blocks]
        return b"".join(mixed)[: self.chance.randint(0, len(tail))]


def test_a_kill_or_a_power_cut_at_any_step_loses_and_doubles_nothing(tmp_path):
    """Before each file operation of a run with two rolls: what each leaves is opened again, checked, and brought to its end."""
    (tmp_path / "images").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(tmp_path / "run" / "store", tmp_path / "images", monkeypatch)
        in_own_loop(whole_run(disk))
    assert len(disk.taken) > 100
    in_own_loop(all_brought_to_their_end(disk.taken))


ALL = [rollout(n, n // 3) for n in range(6)]
RESTLESS = "r5"  # appends and is never sealed


async def whole_run(disk: Disk) -> None:
    store = open_store(disk.folder)
    added = appended = 0
    sealed: list[str] = []

    def told() -> None:
        disk.told = (added, tuple(sealed), appended)

    for count in (4, 6):
        added = await store.add_rollouts(ALL[:count]) + added
        told()
        leases = await store.lease("w", 8)
        for lease in leases:
            if lease.rollout.rollout_id != RESTLESS:
                assert await run_attempt(store, lease) == "won"
                sealed.append(lease.rollout.rollout_id)
            else:
                for number in range(3):
                    await store.append("calls", calls(RESTLESS, 1, number))
                    appended += 1
                    told()
            told()
        await store.roll()
        await store.mark_trained(0, ["r0", "r1"])
    await store.close()


async def all_brought_to_their_end(images: list[tuple[Path, Any]]) -> None:
    for image, told in images:
        added, sealed, appended = told or (0, (), 0)
        store = open_store(image)
        assert (await store.status())["asked"] >= added, image
        before = {step: await taken(store, step) for step in (0, 1)}
        counted = Counter(row["rollout_id"] for tables in before.values() for row in tables["calls"])
        assert set(counted.values()) <= {2} and set(counted) >= set(sealed), image
        await store.rewind(1)
        await store.add_rollouts(ALL)
        leases = await store.lease("w", 8)
        assert not {lease.rollout.rollout_id for lease in leases} & set(sealed), image
        assert set(await asyncio.gather(*(run_attempt(store, lease) for lease in leases))) <= {"won"}, image
        await store.close()
        rows = {table: rows_on_disk(image, table) for table in SCHEMAS}
        assert [(row["rollout_id"], row["status"]) for row in rows["rollouts"]] == [
            (r.rollout_id, "succeeded") for r in ALL
        ]
        won = {(row["rollout_id"], row["winning_attempt"]) for row in rows["rollouts"]}
        assert won == {(row["rollout_id"], row["attempt"]) for row in rows["attempts"] if row["won"]}, image
        made = Counter((row["rollout_id"], row["attempt"]) for row in rows["calls"])
        assert made == Counter({(r["rollout_id"], r["attempt"]): r["calls"] for r in rows["attempts"]}), image
        assert {made[key] for key in won} == {2}, image
        for table in ("calls", "rewards", "attempts"):
            keys = [(row["rollout_id"], row["attempt"], row.get("sequence")) for row in rows[table]]
            assert len(set(keys)) == len(keys), image
        if image.name.endswith("kill") and (RESTLESS, 1) not in won:
            assert made[RESTLESS, 1] >= appended, image
        shutil.rmtree(image)


def in_own_loop(coroutine: Coroutine) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(coroutine)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def kill_under_load(folder: Path, rounds: int, seed: int) -> None:
    """The ledger's acknowledgements and the tables must be the same set."""
    ledger = folder / "ledger"
    script = Path(stores.__file__).with_name("store_load.py")
    subprocess.run([sys.executable, script, folder / "store", ledger, str(rounds), str(seed)], check=True)
    notes: dict[str, list[tuple]] = {"added": [], "appending": [], "appended": [], "sealed": []}
    for line in ledger.read_text().splitlines():
        what, *of = json.loads(line)
        notes[what].append(tuple(of))
    in_own_loop(end(folder / "store"))
    rows = {table: rows_on_disk(folder / "store", table) for table in SCHEMAS}
    found = [(row["rollout_id"], row["attempt"], row["source_sequence"]) for row in rows["calls"]]
    assert len(set(found)) == len(found)
    assert set(notes["appended"]) <= set(found) <= set(notes["appending"])
    attempts = {(row["rollout_id"], row["attempt"]): row for row in rows["attempts"]}
    assert len(attempts) == len(rows["attempts"])
    assert Counter(found_key[:2] for found_key in found) == Counter({k: row["calls"] for k, row in attempts.items()})
    answers = {"won": 0, "late": 0, "failed": 0}
    for name, number, answer, made in notes["sealed"]:
        row = attempts[name, number]
        assert (row["won"], row["late"], row["calls"]) == (answer == "won", answer == "late", made)
        answers[answer] += 1
    won = Counter(name for name, _, answer, _ in notes["sealed"] if answer == "won")
    assert set(won.values()) == {1}
    winners = {row["rollout_id"]: row["winning_attempt"] for row in rows["rollouts"]}
    assert len(winners) == len(rows["rollouts"]) >= max(asked for (asked,) in notes["added"])
    assert all(winners[name] == number for name, number, answer, _ in notes["sealed"] if answer == "won")
    rolls = read_rolled(folder / "store" / "log").segment
    print(f"{rounds} kills, {len(found)} calls in {rolls} rolls, seals acknowledged: {answers}")
    assert rolls > rounds / 4 and answers["won"] > rounds


async def end(folder: Path) -> None:
    store = open_store(folder)
    running = [name for name, _ in store.state.running]
    await store.cancel(running)
    await store.close()


def test_kills_under_load_lose_and_double_no_acknowledgement(tmp_path):
    kill_under_load(tmp_path, rounds=20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_kills_under_load_lose_and_double_no_acknowledgement(tmp_path):
    kill_under_load(tmp_path, rounds=300, seed=2)


def test_a_store_whose_fsync_failed_is_started_anew_and_nobody_notices(cluster, tmp_path):
    def fail_next_sync(store: ReplayStore) -> int:
        real = os.fdatasync

        def fail(descriptor: int) -> None:
            os.fdatasync = real
            raise OSError("no")

        os.fdatasync = fail
        return os.getpid()

    actor: Any = ray.remote(ReplayStore)
    store = actor.options(max_restarts=-1, max_task_retries=-1, num_cpus=0).remote(str(tmp_path), 60, 3)
    failing = ray.get(store.__ray_call__.remote(fail_next_sync))
    ray.get(store.add_rollouts.remote([rollout(0)]))
    assert ray.get(store.__ray_call__.remote(fail_next_sync)) != failing
    ray.get(store.mark_trained.remote(0, ["r0"]))
    assert ray.get(store.status.remote())["trained"] == 1
    ray.kill(store)


@pytest.mark.slow
async def test_five_thousand_rollouts(tmp_path):
    """Prints what the store costs at scale; asserts that all is there."""
    rollouts, made, text, times = 5000, 3, "x" * 8000, {}
    store = open_store(tmp_path)

    async def timed(what: str, asked: Coroutine) -> Any:
        started = time.perf_counter()
        answer = await asked
        times[what] = time.perf_counter() - started
        return answer

    async def run(lease: Any) -> None:
        key = (lease.rollout.rollout_id, lease.attempt)
        for number in range(made):
            await store.append("calls", to_batch(CALLS, [call(*key, number, text=text)]))
        await store.seal(Seal(*key, "w", "succeeded", 1.0, {"engine": made}))

    async def run_all(leases: list) -> None:
        for first in range(0, len(leases), 100):
            await asyncio.gather(*map(run, leases[first : first + 100]))

    await timed("add", store.add_rollouts([rollout(n) for n in range(rollouts)]))
    leases = await timed("lease", store.lease("w", rollouts))
    await timed("append and seal", run_all(leases))
    await timed("take", store.take(0, "train"))
    await timed("roll", store.roll())
    tables = await timed("take from Parquet", store.take(0, "train"))
    assert len(tables["calls"]) == rollouts * made
    crash(store)
    started = time.perf_counter()
    store = open_store(tmp_path)
    times["open"] = time.perf_counter() - started
    await timed("close", store.close())
    print(", ".join(f"{what} {seconds:.2f} s" for what, seconds in times.items()))
    assert len(rows_on_disk(tmp_path, "calls")) == rollouts * made
