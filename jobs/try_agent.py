"""`raygent try CONFIG [section.key=value ...] [--task ID]`: one task through all the parts of a run, without training.

It has a run directory of its own, NAME-try, made anew each time; the store of the run NAME is not touched.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raygent.cluster.start import quiet_environment
from raygent.cluster.transcripts import messages_of, reply_of, tokenizer_of
from raygent.config import Config, ConfigError, load
from raygent.data_files import load_tasks
from raygent.jobs.check import check, is_locked
from raygent.jobs.dry_run import tell_parsers
from raygent.records import SCHEMAS, UPSTREAM, Rollout, Task, to_json

Row = dict[str, Any]
SHOWN = 2000  # characters of one message, and of an error, from its end


def config_to_try(config: Config) -> Config:
    """`config` for one rollout, in a run directory of its own, which try_agent() empties. Raises ConfigError where
    a real run is there, or one that goes on."""
    config.run.name = f"{config.run.name[:60]}-try"
    if (config.run_directory / "checkpoints").exists():
        raise ConfigError(f"run.name: {config.run_directory} holds a run that was trained; choose another run.name")
    if is_locked(config.run_directory / "store" / "lock"):
        raise ConfigError(f"run.name: {config.run_directory} goes on; wait for its end, or choose another run.name")
    config.engine.replicas = config.workers.min = config.workers.max = 1
    config.evaluate.checkpoint = None
    return config


def choose_task(config: Config, task_id: str | None) -> Task:
    """The task `task_id` of data.train, or the first. Raises ConfigError where there is none of that id."""
    if config.data.train is None:
        raise ConfigError('data.train: missing; a rollout is of a task, write train = "train.jsonl"')
    tasks = load_tasks(config.data.train, "data.train")
    for task in tasks:
        if task_id in (None, task.id):
            return task
    raise ConfigError(
        f"--task: no task {task_id!r} in {', '.join(config.data.train_files)}; the first are {', '.join(t.id for t in tasks[:5])}"
    )


def try_agent(config: Config, task: Task) -> int:
    """Run `task` once and print what happened; 0 where the rollout succeeded, else 1."""
    from raygent.cluster.parts import Parts

    shutil.rmtree(config.run_directory, ignore_errors=True)
    with Parts(config, learn=False) as parts:
        parts.queue([Rollout("try", task.id, "try", "train", 0, 0, task.input, task.private, parts.version)])
        parts.collect(0, "train")
    # The store is closed: all it holds, lost attempts too, is in Parquet.
    tables = {name: _rows(config.run_directory / "store" / name) for name in SCHEMAS}
    print()
    tell_parsers(config)
    print(f"\ntask {task.id}: {_cut(to_json(task.input))}")
    for attempt in tables["attempts"]:
        records = {name: _of(attempt, tables[name]) for name in ("calls", "spans", "rewards")}
        _tell_attempt(config, attempt, records)
    (rollout,) = tables["rollouts"]
    if rollout["status"] == "lost":
        print(f"\nlost: infrastructure failed in all of workers.max_attempts = {config.workers.max_attempts} attempts")
    print(f"\nrecorded in {config.run_directory / 'store'}")
    return 0 if rollout["status"] == "succeeded" else 1


def _rows(folder: Path) -> list[Row]:
    return pq.read_table(folder).to_pylist() if any(folder.glob("*.parquet")) else []


def _of(attempt: Row, rows: list[Row]) -> list[Row]:
    return sorted((row for row in rows if row["attempt"] == attempt["attempt"]), key=lambda row: row["sequence"])


def _tell_attempt(config: Config, attempt: Row, records: dict[str, list[Row]]) -> None:
    calls = records["calls"]
    seconds = (attempt["finished"] or attempt["started"]) - attempt["started"]
    of_the_model = f", {_waited(calls):.1f} s of it in model calls" if calls else ""
    print(f"\nattempt {attempt['attempt']}: {attempt['outcome']}, {seconds:.1f} s{of_the_model}")
    _tell_conversation(config, calls)
    for span in records["spans"]:
        print(f"\n[{span['kind']} {span['name']}] {_cut(span['attributes'])}")
    print()
    for reward in records["rewards"]:
        whose = f" of agent {reward['agent']}" if reward["agent"] else ""
        parts = "".join(f", {name} {value:g}" for name, value in json.loads(reward["components"]).items())
        print(f"{reward['name']}{whose}: {reward['value']:g}{parts}")
    print(f"outcome: {attempt['outcome']}, reward {attempt['reward']}")
    if attempt["error"]:
        print(f"error: {_cut(attempt['error'])}")
    _tell_recorded(config, calls, records)


def _waited(calls: list[Row]) -> float:
    """Seconds in which at least one of `calls` ran."""
    waited, until = 0.0, 0.0
    for call in sorted(calls, key=lambda call: call["started"]):
        waited += max(0.0, call["finished"] - max(call["started"], until))
        until = max(until, call["finished"])
    return waited


def _tell_conversation(config: Config, calls: list[Row]) -> None:
    """Each call: the messages that the agent's call before did not have, and what was sampled."""
    if not calls:
        return
    tokenizer = tokenizer_of(config)
    before: dict[str, list[str]] = {}
    for call in calls:
        messages = messages_of(json.loads(call["request"]))
        known = before.get(call["agent"], [])
        same = len(known) if messages[: len(known)] == known else 0
        before[call["agent"]] = messages
        by = f", {call['policy']}" if call["policy"] != "policy" else ""
        print(f"\ncall {call['sequence']} of agent {call['agent']} ({call['api']}, {call['finish_reason']}{by})")
        if same:
            print(f"  ({same} messages as before)")
        for message in messages[same:]:
            print(_indented(message))
        reply = reply_of(call["response"]) if call["response"] else tokenizer.decode(call["response_token_ids"])
        print(_indented(f"=> {reply}"))


def _tell_recorded(config: Config, calls: list[Row], records: dict[str, list[Row]]) -> None:
    from raygent.algorithms.trajectory import build

    prompt = sum(len(call["prompt_token_ids"]) for call in calls)
    sampled = sum(len(call["response_token_ids"]) for call in calls)
    versions = sorted({version for call in calls for version in call["policy_versions"]})
    print(
        f"recorded: {len(calls)} calls, {prompt} prompt and {sampled} sampled tokens of policy version "
        f"{', '.join(map(str, versions)) or 'none'}, {len(records['rewards'])} rewards, {len(records['spans'])} spans"
    )
    for policy in sorted({call["policy"] for call in calls if call["policy"].startswith(UPSTREAM)}):
        costs = [call["cost"] for call in calls if call["policy"] == policy]
        print(f"{policy}: {len(costs)} calls, {sum(costs):.6g} dollars; not trained")
    for trajectory in build(calls):
        meant = config.trains(trajectory.agent)
        made = [node.call for node in trajectory.nodes]
        trained = sum(len(call["response_token_ids"]) for call in made if meant and call["trainable"])
        why = Counter(
            call["untrainable_why"] if meant else "agent.train" for call in made if not meant or not call["trainable"]
        )
        print(
            f"agent {trajectory.agent}: {len(made)} calls, {trajectory.branches} branches, {trained} tokens to train on"
            + "".join(f"; {count} calls are not trained: {reason}" for reason, count in why.items())
        )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else "..." + text[-SHOWN:]


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in _cut(text).splitlines())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="raygent try")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--task")
    asked = parser.parse_args(arguments)
    quiet_environment()
    try:
        config = config_to_try(load(asked.config, asked.overrides))
        task = choose_task(config, asked.task)
        check(config, learn=False, emptied=True)
        return try_agent(config, task)
    except ConfigError as error:
        print(f"raygent: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
