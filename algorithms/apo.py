"""APO: textual gradients and beam search, ProTeGi of Pryzant et al. 2023, https://arxiv.org/abs/2305.03495.

A step runs each candidate of the beam on a minibatch of feedback tasks. The optimiser's model reads trials that went badly
and says why the prompt failed (the gradient), then writes the prompt anew by that (the edit). The new candidates and the beam are
ranked by their scores on the selection tasks, all of them: there is no bandit that spares some, and no paraphrasing.
"""

from __future__ import annotations

import random
from typing import Any

from raygent.algorithms.prompt_search import Candidate, Search, Trial, block_in
from raygent.records import Task

DEFAULTS = {"group_size": 1}
SHOWN = 4  # trials in a critique
CRITIQUE = """An assistant works by this prompt, named {name}:

```
{prompt}
```

These are runs of it, the ones that went worst, each with its reward:

{trials}

What about the prompt kept them from going better? Give one reason, and how the prompt should be changed, in a few sentences."""
EDIT = """An assistant works by this prompt, named {name}:

```
{prompt}
```

Somebody read runs of it that went badly, and says:

{critique}

Write the prompt anew, so that this is mended. Names in braces, as {{this}}, are filled in at each run: keep those it has.
Give the whole new prompt between two lines of ```, and nothing else there."""


def optimise(search: Search, feedback: list[Task], selection: list[Task], settings: Any, seed: int) -> Candidate:
    dice = random.Random(f"apo-{seed}")
    beam: list[tuple[float, Candidate]] = []
    known: list[Candidate] = []  # that were scored

    def take_in(candidates: list[Candidate]) -> list[tuple[float, Candidate]]:
        """The best of the beam and `candidates`; of equal ones those that were there before."""
        new = [candidate for place, candidate in enumerate(candidates) if candidate not in known + candidates[:place]]
        known.extend(new)
        scored = beam + list(zip(search.score(new, selection), new, strict=True))
        return sorted(scored, key=lambda pair: -pair[0])[: settings.beam]

    while search.go_on():
        if not beam:
            beam = take_in([search.tree.first])
        batch = dice.sample(feedback, min(settings.tasks_per_step, len(feedback)))
        jobs: list[tuple[Candidate, str, str]] = []  # candidate, name of the prompt to change, trials to read
        for (_, candidate), trials in zip(beam, search.evaluate([pair[1] for pair in beam], batch), strict=True):
            bad = failures(trials)
            for _ in range(settings.edits):
                shown = "\n\n".join(trial.transcript for trial in dice.sample(bad, min(SHOWN, len(bad))))
                jobs.append((candidate, dice.choice(sorted(candidate)), shown))
        critiques = search.ask(
            [
                CRITIQUE.format(name=name, prompt=search.tree.texts(candidate)[name], trials=shown)
                for candidate, name, shown in jobs
            ]
        )
        criticised = [(*job[:2], critique) for job, critique in zip(jobs, critiques, strict=True) if critique]
        edits = search.ask(
            [
                EDIT.format(name=name, prompt=search.tree.texts(candidate)[name], critique=critique)
                for candidate, name, critique in criticised
            ]
        )
        beam = take_in(
            [
                search.tree.grow(candidate, name, text, "apo", search.step, critique)
                for (candidate, name, critique), edit in zip(criticised, edits, strict=True)
                if (text := block_in(edit))
            ]
        )
        search.end_step()
    return search.best


def failures(trials: list[Trial]) -> list[Trial]:
    """Those that did not reach the best score among them; all where all are alike."""
    best = max(trial.score for trial in trials)
    return [trial for trial in trials if trial.score < best] or trials
