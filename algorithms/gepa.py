"""GEPA: reflective evolution over a Pareto front, Agrawal et al. 2025, https://arxiv.org/abs/2507.19457, by the library `gepa`.

A step is one iteration of the library's: it picks a candidate from those that are the best on some selection task, runs it on a
minibatch of feedback tasks, has the optimiser's model read the trials and write one prompt anew, and where that does better on
the minibatch scores it on all selection tasks. With several prompts it also merges candidates.
"""

from __future__ import annotations

import logging
from typing import Any

from raygent.algorithms.prompt_search import Candidate, Search, Trial
from raygent.records import Task

DEFAULTS = {"group_size": 1, "tasks_per_step": 3}  # the paper's minibatch
logger = logging.getLogger("raygent")


def optimise(search: Search, feedback: list[Task], selection: list[Task], settings: Any, seed: int) -> Candidate:
    import gepa  # an extra of the package

    adapter: Any = Adapter(search)
    gepa.optimize(
        seed_candidate=search.tree.texts(search.tree.first),
        trainset=feedback,
        valset=selection,
        adapter=adapter,
        reflection_lm=adapter.reflect,
        reflection_minibatch_size=min(settings.tasks_per_step, len(feedback)),
        use_merge=len(search.tree.first) > 1,
        skip_perfect_score=False,  # rewards have no bound that would be perfect
        stop_callbacks=adapter.is_over,
        logger=Quiet(),
        seed=seed,
    )
    if adapter.broken:
        raise adapter.broken
    return search.best


class Adapter:
    """A gepa.core.adapter.GEPAAdapter over a Search."""

    propose_new_texts = None  # gepa's own, which asks reflect()

    def __init__(self, search: Search) -> None:
        self.search = search
        self.parent = search.tree.first  # of what is proposed next
        self.reflection = ""  # the last
        self.begun = False
        self.broken: Exception | None = None  # what reflect() raised: gepa goes on after that

    def evaluate(self, batch: list[Task], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        from gepa import EvaluationBatch

        tree = self.search.tree
        versions = {name: tree.find(name, text) for name, text in candidate.items()}
        known = self.parent | {name: number for name, number in versions.items() if number is not None}
        for name in (name for name, number in versions.items() if number is None):
            known = tree.grow(known, name, candidate[name], "gepa", self.search.step, self.reflection)
        (trials,) = self.search.evaluate([known], batch)
        scores = [trial.score for trial in trials]
        return EvaluationBatch([trial.output for trial in trials], scores, trials if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, str]]]:
        self.parent = self.versions_of(candidate)
        trials: list[Trial] = eval_batch.trajectories
        records = [{"Run": trial.transcript, "Feedback": f"reward {trial.score:g}"} for trial in trials]
        return dict.fromkeys(components_to_update, records)

    def reflect(self, text: Any) -> str:
        try:
            (self.reflection,) = self.search.ask([str(text)])
        except Exception as error:
            self.broken = error
            raise
        if not self.reflection:
            raise ValueError("the optimiser's model gave no reply")  # gepa makes no proposal of it
        return self.reflection

    def is_over(self, state: Any) -> bool:
        """gepa asks before each iteration; `state` has all candidates that it took up, with their scores."""
        if self.broken:  # in the step that has not ended
            return True
        for texts, scores in zip(state.program_candidates, state.prog_candidate_val_subscores, strict=True):
            self.search.note(self.versions_of(texts), sum(scores.values()) / len(scores), len(scores))
        if self.begun:
            self.search.end_step()
        self.begun = True
        return not self.search.go_on()

    def versions_of(self, texts: dict[str, str]) -> Candidate:
        found = {name: self.search.tree.find(name, text) for name, text in texts.items()}
        assert None not in found.values()
        return found  # type: ignore[return-value]


class Quiet:
    def log(self, message: str) -> None:
        logger.debug("gepa: %s", message)
