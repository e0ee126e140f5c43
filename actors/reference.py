"""The frozen model that KL and distillation compare with, where `[reference]` gives it a place of its own: a learner that learns
nothing.
"""

from __future__ import annotations

from raygent.actors.checkpoint import Checkpoint
from raygent.actors.learner import Learner
from raygent.config import POLICY
from raygent.records import Sample


class Reference(Learner):
    """One rank: the first weights, or the teacher. It may be asked: `measure("reference", samples)`."""

    def start(self, host: str, port: int, checkpoint: Checkpoint | None) -> None:
        """`checkpoint`: of the policy, and so not looked at."""
        self._join(host, port)
        self.reference = self._load_reference()

    def policy_of(self, sample: Sample) -> str:
        return POLICY  # one reference, whosever the tokens are
