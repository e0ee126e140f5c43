"""A run's checkpoints: `checkpoints/step-NNNNNN/`, complete once it has that name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from raygent.config import Config, ConfigError
from raygent.records import PromptVersion

CRITIC = "critic"  # the folder of its part in a checkpoint
BEST = "best"  # leads to the checkpoint with the best evaluation


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: weights as transformers and vLLM load them, and the optimiser's state in `optimiser/`."""

    path: Path
    step: int
    version: int
    # See laid_out(); empty in those of older runs.
    laid_out: dict[str, int | str] = field(default_factory=dict, compare=False)
    # The prompts in force, by name, where they are improved in turn with the weights.
    prompts: dict[str, PromptVersion] = field(default_factory=dict, compare=False)

    def of_critic(self) -> Checkpoint:
        """The critic's part. Raises ConfigError where there is none."""
        if not (self.path / CRITIC).is_dir():
            raise ConfigError(
                f"algorithm.name: {self.path} holds no critic, so the run was begun without one; choose another run.name"
            )
        return replace(self, path=self.path / CRITIC)


def laid_out(config: Config) -> dict[str, int | str]:
    """How the optimiser's state is cut up into files and kept in them, by the keys of the config that tell it."""
    learner = config.learner
    keys: dict[str, int | str] = {
        "learner.ranks": learner.ranks,
        "learner.zero_stage": learner.zero_stage,
        "learner.dtype": learner.dtype,
    }
    return keys | ({"critic.ranks": critic.learner.ranks} if (critic := config.of_critic) else {})


def latest_checkpoint(run_directory: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps."""
    return max(_checkpoints(run_directory), key=lambda checkpoint: checkpoint.step, default=None)


def checkpoint_to_evaluate(config: Config) -> Checkpoint | None:
    """The one that `evaluate.checkpoint` names; None: the first weights. Raises ConfigError where it is not there."""
    chosen = config.evaluate.checkpoint
    if chosen == 0:
        return None
    if chosen is None:
        return latest_checkpoint(config.run_directory)
    found = _checkpoints(config.run_directory)
    best = (config.run_directory / "checkpoints" / BEST).resolve()
    for checkpoint in found:
        if checkpoint.step == chosen or (chosen == BEST and checkpoint.path.resolve() == best):
            return checkpoint
    there = ", ".join(str(step) for step in sorted(checkpoint.step for checkpoint in found))
    raise ConfigError(
        f"evaluate.checkpoint: {config.run_directory} has no checkpoint {chosen}; it has those of "
        f"{there or 'no step'}; choose one of these, or 0 for the first weights"
    )


def _checkpoints(run_directory: Path) -> list[Checkpoint]:
    """All complete ones: a folder gets its name only once all of it is written. Raises ConfigError for one that was damaged."""
    found = []
    for path in (run_directory / "checkpoints").glob("step-*"):
        try:
            about = json.loads((path / "raygent.json").read_text())
            step, version = about["step"], about["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"run.name: {path} is damaged, its raygent.json is not whole ({error!r}); move that folder away to go on from the "
                "checkpoint before"
            ) from error
        found.append(Checkpoint(path, step, version, about.get("laid_out", {}), prompts=about.get("prompts", {})))
    return found
