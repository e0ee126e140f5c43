"""An attempt as an agent has it, and the engine and store it is made against."""

import itertools
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import anthropic
import openai
import ray

from raygent.actors.engine_handle import EngineHandle
from raygent.actors.gateway import mint_key
from raygent.actors.replay_store import ReplayStore
from raygent.cluster.parts import NAMESPACE
from raygent.config import Config
from raygent.records import Mode, Rollout, Seal

SECRET = "secret"
MAX_CALLS = 12
TEMPERATURE = 0.3  # of train mode: low, so that the model says what it was taught
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": %d}}\n</tool_call>'
REPLIES = {
    "say": "Grüße, 你好 🙂 all well.",
    "call": CALL % (1, 2),
    "both": "First.\n" + CALL % (3, 4) + "\n" + CALL % (5, 6),
}
numbers = itertools.count()


class Attempt:
    """A leased attempt with its key: stock clients as an agent has them, and what the store has of it at the end."""

    def __init__(self, engine: EngineHandle, store: Any, mode: Mode, expires_s: float, url: str = "") -> None:
        """`url`: a replica's front door; else the calls go by Serve's proxy."""
        self.engine, self.store, self.mode, self.step = engine, store, mode, next(numbers)
        self.id = f"rollout-{self.step}"
        ray.get(store.add_rollouts.remote([Rollout(self.id, "task", self.id, mode, self.step, 0, "input")]))
        (lease,) = ray.get(store.lease.remote("worker", 1))
        assert lease.rollout.rollout_id == self.id
        self.key = mint_key(SECRET, self.id, 1, mode, time.time() + expires_s)
        self.base_url = f"{url or engine.base_url}/a/{self.key}"

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=self.key, max_retries=0)

    @cached_property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.base_url, api_key=self.key, max_retries=0)

    def close(self) -> dict[str, dict[str, Any]]:
        """End it at the engine: what each replica knows of it."""
        return self.engine.close_attempts([(self.id, 1)])[self.id, 1]

    def calls(self) -> list[dict[str, Any]]:
        """End it: the calls the store has, after it has checked that none is lacking."""
        made = {source: closed["calls"] for source, closed in self.close().items() if closed["calls"]}
        assert ray.get(self.store.seal.remote(Seal(self.id, 1, "worker", "succeeded", 0.0, made))) == "won"
        calls = ray.get(self.store.take.remote(self.step, self.mode))["calls"].to_pylist()
        assert len(calls) == sum(made.values())
        return calls


def engine_config(name: str, directory: Path, model: Path, **engine: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "directory": str(directory)},
            "model": {"path": str(model), "tool_parser": "hermes", "max_tokens": 1000},
            "agent": {"run": "agent.py:answer", "max_calls": MAX_CALLS},
            "data": {"train": "train.jsonl"},
            "engine": {"threads": 1, "temperature": TEMPERATURE} | engine,
        }
    )


def start_store(name: str, directory: Path) -> Any:
    actor: Any = ray.remote(ReplayStore)
    options = {"name": name, "namespace": NAMESPACE, "max_concurrency": 1000, "num_cpus": 0}
    return actor.options(**options).remote(str(directory / "store"), 3600.0, 3)
