"""Few-shot bootstrapping with random search, Khattab et al. 2023, https://arxiv.org/abs/2310.03714, there
BootstrapFewShotWithRandomSearch: what the model itself did well becomes demonstrations.

A step runs the first prompts on a minibatch of feedback tasks and puts what went well into a pool; then it draws `edits` sets of
demonstrations from the pool, puts each behind a prompt, and scores these candidates on the selection tasks. No model is asked.
"""

from __future__ import annotations

import random
from typing import Any

from raygent.algorithms.prompt_search import Candidate, Search, Trial
from raygent.records import Task, to_json

DEFAULTS = {"group_size": 1}


def optimise(search: Search, feedback: list[Task], selection: list[Task], settings: Any, seed: int) -> Candidate:
    dice = random.Random(f"bootstrap-{seed}")
    pool: list[str] = []  # demonstrations
    known: list[Candidate] = [search.tree.first]  # that were scored
    first = search.tree.first
    while search.go_on():
        if search.step == 0:
            search.score([first], selection)
        batch = dice.sample(feedback, min(settings.tasks_per_step, len(feedback)))
        (trials,) = search.evaluate([first], batch)
        shown = [demonstration(trial) for trial in successes(trials) if trial.output]
        pool += [one for one in dict.fromkeys(shown) if one not in pool]
        candidates: list[Candidate] = []
        for _ in range(settings.edits if pool else 0):
            number = dice.randint(1, min(settings.demonstrations, len(pool)))
            name, chosen = dice.choice(sorted(first)), dice.sample(pool, number)
            text = "\n\n".join([search.tree.texts(first)[name], "Examples:", *chosen])
            candidate = search.tree.grow(first, name, text, "bootstrap", search.step)
            if candidate not in known + candidates:
                candidates.append(candidate)
        known += candidates
        search.score(candidates, selection)
        search.end_step()
    return search.best


def successes(trials: list[Trial]) -> list[Trial]:
    """Those above the mean; all where all are alike and above 0."""
    mean = sum(trial.score for trial in trials) / len(trials)
    if all(trial.score == trials[0].score for trial in trials):
        return trials if mean > 0 else []
    return [trial for trial in trials if trial.score > mean]


def demonstration(trial: Trial) -> str:
    """A task's input and what the agent made of it."""
    asked = trial.task.input if isinstance(trial.task.input, str) else to_json(trial.task.input)
    return f"Input: {asked}\nOutput: {trial.output}"
