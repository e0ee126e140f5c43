"""What a run's upstreams have cost, kept over its restarts in upstreams.json, what they may still spend, and when that ends
the run.

What is left of `max_cost` is dealt out to the engine's replicas in equal budgets, and anew when one has none left. So the run
cannot spend more than `max_cost` and what the calls cost that are on their way then, `max_parallel` at most.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from typing import Any

from raygent.actors.segments import write_atomically
from raygent.config import Config, ConfigError

logger = logging.getLogger("raygent")
FILE = "upstreams.json"
Costs = dict[str, dict[str, float]]  # dollars: by upstream, by the replica whose calls have cost them


class Spending:
    """`before`: dollars by upstream when this process began."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.file = config.run_directory / FILE
        self.before: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.earlier: set[str] = set()  # replicas whose cost is in `before`
        self.seen: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # upstream -> replica -> UpstreamProxy.status
        self.recorded: Costs = {}
        self.warned: set[str] = set()

    def begin(self, recorded: Costs) -> None:
        """Take what the store has of this run, before any replica of this process's: of what was spent in the last seconds
        before a kill, the file tells nothing."""
        for name, costs in recorded.items():
            self.before[name] = max(self.before.get(name, 0.0), sum(costs.values()))
            self.earlier |= costs.keys()

    def note(self, replicas: list[dict[str, Any]], recorded: Costs | None = None) -> None:
        """Take what the engine's replicas tell of themselves (Engine.status), and what the store has. A replica that is gone
        keeps its last word, or what was recorded of it where that is more."""
        for replica in replicas:
            for name, told in replica["upstreams"].items():
                self.seen[name][replica["source"]] = told
        self.recorded = recorded or self.recorded
        spent = self.before | {name: self.spent(name) for name in self.config.upstream}
        write_atomically(self.file, [json.dumps(spent).encode()])

    def spent(self, name: str) -> float:
        told = {source: status["cost"] for source, status in self.seen[name].items()}
        recorded = self.recorded.get(name, {})
        ours = (told.keys() | recorded.keys()) - self.earlier
        return self.before.get(name, 0.0) + sum(max(told.get(one, 0.0), recorded.get(one, 0.0)) for one in ours)

    @property
    def limited(self) -> list[str]:
        return [name for name, upstream in self.config.upstream.items() if upstream.max_cost]

    def short(self, replicas: list[dict[str, Any]]) -> bool:
        """Whether one of `replicas` may spend nothing more as it is, or does not know yet what it may."""
        return any(replica["upstreams"][name]["budget"] <= 0 for replica in replicas for name in self.limited)

    def budgets(self) -> dict[str, float]:
        """By upstream, the dollars of each replica, where none has any left of those it had."""
        replicas = self.config.engine.replicas
        return {name: (self.config.upstream[name].max_cost - self.spent(name)) / replicas for name in self.limited}

    def check(self) -> None:
        """Raises ConfigError for a limit that is reached, and for an upstream that takes no call as it is configured."""
        for name, upstream in self.config.upstream.items():
            if upstream.max_cost and self.spent(name) >= upstream.max_cost:
                raise ConfigError(
                    f"upstream.{name}.max_cost: the run has spent {self.spent(name):.6g} of {upstream.max_cost:g} dollars; "
                    "raise it, and the same command goes on"
                )
            mistakes = [told["mistake"] for told in self.seen[name].values() if told["mistake"]]
            if not mistakes:
                continue
            told = f"upstream.{name}: {mistakes[-1]}; see to its base_url, model and api_key_env"
            if not any(told["served"] for told in self.seen[name].values()):
                raise ConfigError(told)
            if name not in self.warned:
                self.warned.add(name)
                logger.warning("%s", told)
