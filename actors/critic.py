"""The critic of PPO: a learner whose model tells what is still to be had before each token, in place of what comes next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raygent.actors.learner import DTYPES, Learner, add
from raygent.actors.micro_batches import MicroBatch
from raygent.config import POLICY
from raygent.records import Sample

LEAST = 1e-6  # variance of the returns; less is rounding


class Critic(Learner):
    """One rank. The policy's model with a head of one value, which begins at 0 everywhere."""

    MEANS = ("clip_fraction", "returns", "returns_squared", "error", "error_squared")

    def _load(self, path: str) -> Any:
        from transformers import AutoModelForTokenClassification

        settings = self.config.learner
        model = AutoModelForTokenClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=DTYPES[settings.dtype],
            attn_implementation=settings.attention,
            ignore_mismatched_sizes=True,
        )
        if path == self.config.model.path:
            for parameter in (getattr(model, "score", None) or model.classifier).parameters():
                parameter.data.zero_()
        return model

    def _load_reference(self) -> Any:
        return None

    @property
    def first_step(self) -> int:
        return 0

    def policy_of(self, sample: Sample) -> str:
        return POLICY  # one critic, whosever the tokens are

    def _note(self, **fields: Any) -> None:
        """The policy's learners tell of the steps."""

    def step(self, samples: list[Sample], step: int) -> dict[str, float]:
        """As Learner.step; `explained_variance` is 1 where the values were the returns, 0 where they told nothing of them."""
        told = super().step(samples, step)
        if not told.keys() >= {"loss", *self.MEANS}:  # nothing was learnt, or nothing of it is finite
            return {"loss": 0.0, "gradient_norm": 0.0, "updates_skipped": told["updates_skipped"]}
        variance = told["returns_squared"] - told["returns"] ** 2
        unexplained = told["error_squared"] - told["error"] ** 2
        return {
            "loss": told["loss"],
            "clip_fraction": told["clip_fraction"],
            "gradient_norm": told["gradient_norm"],
            "updates_skipped": told["updates_skipped"],
            "returns": told["returns"],
            "explained_variance": 1 - unexplained / variance if variance > LEAST else 0.0,
        }

    def _loss(
        self, batch: MicroBatch, scale: float, sums: dict[str, float], gaps: list[np.ndarray] | None
    ) -> torch.Tensor:
        """Half the squared error, of the value or of the value clipped to `critic.clip` around the old one, whichever is more:
        verl's, of PPO2 (https://github.com/openai/baselines)."""
        from verl.trainer.ppo.core_algos import compute_value_loss

        values, weights = self._measured("values", batch), batch.weights * scale
        assert batch.values is not None and batch.returns is not None
        loss, _ = compute_value_loss(
            values, batch.returns, batch.values, weights, self.config.critic.clip, loss_agg_mode="token-sum"
        )
        with torch.no_grad():
            returns, error = batch.returns[batch.mask], (batch.returns - values)[batch.mask]
            moved = (values - batch.values)[batch.mask].abs() > self.config.critic.clip
            told = {"loss": loss, "tokens": batch.mask.sum(), "clip_fraction": moved.sum(), "returns": returns.sum()}
            told |= {"returns_squared": (returns**2).sum(), "error": error.sum(), "error_squared": (error**2).sum()}
            for name, value in told.items():
                add(sums, name, float(value))
        return loss

    def _measured(self, what: str, batch: MicroBatch) -> torch.Tensor:
        """The value of what stands before each masked token, float32 [B, T], else 0."""
        logits, mine = self._logits_before(self.engine, batch)
        return self._spread(logits[:, 0].float(), mine, batch)
