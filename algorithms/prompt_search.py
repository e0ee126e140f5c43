"""What the algorithms that change prompts share: the tree of versions, and what they may ask of a run.

A candidate is one version of each prompt, by name. An algorithm's file has

    optimise(search: Search, feedback: list[Task], selection: list[Task], settings: Algorithm, seed: int) -> Candidate

and DEFAULTS, as those in named.py have. It learns from trials on `feedback`, and chooses by scores on `selection`, which nothing
that it shows to the optimiser's model comes from. Asked again with the same seed and the same answers, it does the same again: so
a run is resumed by doing it again with the rollouts that the store has.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from raygent.records import PromptVersion, Task

Candidate = dict[str, int]  # name -> version
Prompts = dict[str, PromptVersion]


@dataclass(frozen=True)
class Trial:
    """The rollouts of one task under one candidate: their mean `score`, of the worst of them what to read, of the best what it
    gave."""

    task: Task
    score: float
    transcript: str = ""  # as the optimiser's model is to read it
    output: str = ""  # what the agent returned, as text


@dataclass
class Version:
    """A row of the table `prompts` (records.PROMPTS)."""

    name: str
    version: int
    parents: list[int]
    text: str
    origin: str
    step: int
    critique: str = ""
    score: float | None = None
    tasks: int = 0


class Tree:
    """All versions of all prompts; none is ever taken out.

    first: the texts that a search begins with, by name. rows: of the table `prompts`, what searches before it left there.
    """

    def __init__(self, first: dict[str, str], rows: Iterable[dict[str, Any]] = ()) -> None:
        self.of: dict[str, list[Version]] = {name: [] for name in first}
        for row in rows:
            self.of[row["name"]].append(Version(**{key: value for key, value in row.items() if key != "best"}))
        self.first: Candidate = {}
        for name, text in first.items():
            number = self.find(name, text)
            if number is None:
                number = len(self.of[name])
                self.of[name].append(Version(name, number, [], text, "first", 0))
            self.first[name] = number
        self.scored: set[tuple[str, int]] = set()  # in this search: a score from before it was of other weights

    def __len__(self) -> int:
        return sum(map(len, self.of.values()))

    def find(self, name: str, text: str) -> int | None:
        """The version of prompt `name` with that text."""
        return next((version.version for version in self.of[name] if version.text == text), None)

    def grow(self, parent: Candidate, name: str, text: str, origin: str, step: int, critique: str = "") -> Candidate:
        """`parent` with another text for prompt `name`, which is a new version where it is a new text."""
        number = self.find(name, text)
        if number is None:
            number = len(self.of[name])
            self.of[name].append(Version(name, number, [parent[name]], text, origin, step, critique))
        return parent | {name: number}

    def texts(self, candidate: Candidate) -> dict[str, str]:
        return {name: self.of[name][number].text for name, number in candidate.items()}

    def prompts(self, candidate: Candidate) -> Prompts:
        """As a rollout has them."""
        return {name: {"version": candidate[name], "text": text} for name, text in self.texts(candidate).items()}

    def note(self, candidate: Candidate, score: float, tasks: int) -> None:
        """`candidate` has that mean score on so many selection tasks."""
        for name, number in candidate.items():
            version = self.of[name][number]
            if (name, number) not in self.scored or score > (version.score or 0.0):
                version.score, version.tasks = score, tasks
            self.scored.add((name, number))

    def rows(self, best: Candidate) -> list[dict[str, Any]]:
        """Of the table `prompts`."""
        return [
            vars(version) | {"best": version.version == best[version.name]}
            for versions in self.of.values()
            for version in versions
        ]


@dataclass
class Search:
    """The tree, and what an algorithm may ask of the run.

    run: (step, [(prompts, task), ...]) -> their trials. reply: (step, texts) -> what the optimiser's model says to each, "" where
    it failed. told: called with this at the end of each step. `samples`: rollouts of a task in a trial. No step begins after
    `steps`, or once there were `max_rollouts` (0: no limit).
    """

    tree: Tree
    run: Callable[[int, list[tuple[Prompts, Task]]], list[Trial]]
    reply: Callable[[int, list[str]], list[str]]
    told: Callable[[Search], object]
    steps: int
    max_rollouts: int = 0
    samples: int = 1
    step: int = 0
    rollouts: int = 0  # of tasks, until now
    asked: int = 0  # of the optimiser's model
    unanswered: int = 0
    best: Candidate = field(init=False)
    best_score: float = float("-inf")

    def __post_init__(self) -> None:
        self.best = self.tree.first

    def evaluate(self, candidates: list[Candidate], tasks: list[Task]) -> list[list[Trial]]:
        """The trials of each candidate on each of `tasks`, in their order; all at once."""
        pairs = [(self.tree.prompts(candidate), task) for candidate in candidates for task in tasks]
        trials = self.run(self.step, pairs) if pairs else []
        self.rollouts += len(pairs) * self.samples
        return [trials[place : place + len(tasks)] for place in range(0, len(trials), len(tasks))]

    def score(self, candidates: list[Candidate], selection: list[Task]) -> list[float]:
        """The mean score of each on the selection tasks, noted in the tree; a better one than all before is the best."""
        scores = []
        for candidate, trials in zip(candidates, self.evaluate(candidates, selection), strict=True):
            scores.append(sum(trial.score for trial in trials) / len(trials))
            self.note(candidate, scores[-1], len(trials))
        return scores

    def note(self, candidate: Candidate, score: float, tasks: int) -> None:
        self.tree.note(candidate, score, tasks)
        if score > self.best_score:
            self.best, self.best_score = candidate, score

    def ask(self, texts: list[str]) -> list[str]:
        replies = self.reply(self.step, texts) if texts else []
        self.asked += len(texts)
        self.unanswered += sum(not reply for reply in replies)
        return replies

    def go_on(self) -> bool:
        """Whether there is budget for another step."""
        return self.step < self.steps and not 0 < self.max_rollouts <= self.rollouts

    def end_step(self) -> None:
        self.told(self)
        self.step += 1


def split(tasks: list[Task], selection: int, seed: int) -> tuple[list[Task], list[Task]]:
    """Tasks to learn from, and `selection` others to choose by, drawn by `seed` alone."""
    order = random.Random(f"prompts-{seed}").sample(tasks, len(tasks))
    return order[selection:], order[:selection]


def block_in(reply: str) -> str:
    """What stands between the first and the last fence of a reply, "" where there are no two: a prompt may hold fences itself."""
    found = re.search(r"```[^\n`]*\n(.*)```", reply, re.DOTALL)
    return found.group(1).strip() if found else ""
