"""A group of learners for tests, and what runs inside its ranks where the Learner answers no question of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from conversations import config
from ray import cloudpickle
from tiny_model import make_tiny_model

from raygent.actors.learner import Learner, LearnerGroup, checkpoint_activations
from raygent.config import Config
from raygent.records import Sample

Arrays = dict[str, np.ndarray]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks can't import it


@dataclass
class Group:
    """A started LearnerGroup, and how to have it as new."""

    learners: LearnerGroup
    model: Path
    kept: Path
    reference: Arrays

    @property
    def stage(self) -> int:
        return self.learners.config.learner.zero_stage

    def fresh(self, algorithm: dict[str, Any] | None = None, learner: dict[str, Any] | None = None) -> Config:
        """First weights, first optimiser state, and the config that its ranks now have."""
        base = self.learners.config.model_dump(by_alias=True)
        base["algorithm"] |= algorithm or {}
        base["learner"] |= learner or {}
        changed = Config.model_validate(base)
        on_ranks(self.learners, back_to_start, str(self.kept), changed)
        return changed

    def note_reference(self, samples: list[Sample]) -> None:
        """What the KL in the loss compares with, of samples that make_samples() did not make."""
        for sample, measured in zip(samples, self.learners.measure("reference", samples), strict=True):
            sample.reference = measured


OWN_TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"


def start_group(folder: Path, stage: int, tie: bool, **learner: Any) -> Group:
    """Two ranks on a tiny model, its head tied or not, with a KL reference that is not the policy."""
    model = make_tiny_model(folder / "model", tie=tie)
    template = folder / "own.jinja"
    template.write_text(OWN_TEMPLATE)
    settings = config(
        run={"directory": str(folder / "runs"), "name": "test", "steps": 10},
        model={"path": str(model), "chat_template": str(template)},
        algorithm={"kl": 0.3, "clip_low": 0.2, "clip_high": 0.25},
        learner={"zero_stage": stage, "learning_rate": 1e-3, "clip_gradient": 0.5, "weight_decay": 0.1} | learner,
    )
    learners = LearnerGroup(settings)
    learners.start(None)
    on_ranks(learners, keep_start, str(folder / "kept"))
    return Group(learners, model, folder / "kept", on_ranks(learners, move_reference)[0])


def on_ranks(group: LearnerGroup, function: Any, *arguments: Any) -> list[Any]:
    """`function(learner, *arguments)` of each rank, all at once (Ray's `__ray_call__`)."""
    return ray.get([rank.__ray_call__.remote(function, *arguments) for rank in group.ranks])


def keep_start(learner: Learner, folder: str) -> None:
    learner.engine.save_checkpoint(folder, tag="start", save_latest=False)


def back_to_start(learner: Learner, folder: str, config: Config) -> None:
    """The weights and optimiser that `keep_start` kept, under another config."""
    learner.config, learner.version = config, 0
    learner.engine.load_checkpoint(folder, tag="start")
    learner.engine.optimizer._hp_optimizer_states_linked = False  # else ZeRO-2's safe_get_* look at the old state


def move_reference(learner: Learner) -> Arrays:
    """Give the reference weights other than the policy's, else the gradient of the KL to it is zero. Returns them.

    Not far: verl cuts a token's k3 off at 10.
    """
    import deepspeed
    import torch

    noise, sharded = torch.Generator().manual_seed(1), learner.config.learner.zero_stage == 3
    named = dict((learner.reference.module if sharded else learner.reference).named_parameters())
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0, enabled=sharded):
        for parameter in named.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.01)
        return {name: parameter.float().numpy().copy() for name, parameter in named.items()}


def gradient(learner: Learner, samples: list[Sample]) -> Arrays:
    """The whole gradient of each parameter as it stands before the optimiser's step (which is then taken)."""
    from deepspeed.utils import safe_get_full_grad

    learner.backward(samples, {})
    named = list(learner.engine.module.named_parameters())
    found = {name: safe_get_full_grad(parameter).float().numpy().copy() for name, parameter in named}
    learner.engine.step()
    return found


def gradient_with_checkpointing(learner: Learner, samples: list[Sample]) -> tuple[Arrays, int, int]:
    """The gradient, how often the first layer ran for it, and in how many micro-batches."""
    model, ran = learner.engine.module, []
    micro_batches = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append("model"))
    layers = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append("layer"))
    checkpoint_activations(model)
    found = gradient(learner, samples)
    model.gradient_checkpointing_disable()
    model.eval()
    micro_batches.remove()
    layers.remove()
    return found, ran.count("layer"), ran.count("model")


def weights(learner: Learner) -> Arrays:
    from raygent.actors.weight_transfer import full_parameters

    stage = learner.config.learner.zero_stage
    return {
        name: tensor.float().numpy().copy()
        for name, tensor in full_parameters(learner.engine.module.named_parameters(), stage)
    }


def first_moment(learner: Learner) -> Arrays:
    """AdamW's running mean of the gradient: linear in the gradients that the optimiser was given."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine, found = learner.engine, {}
    for name, parameter in engine.module.named_parameters():
        if learner.config.learner.zero_stage == 0:
            state = engine.optimizer.state[parameter]["exp_avg"]
        else:
            state = safe_get_full_optimizer_state(parameter, "exp_avg")
        found[name] = state.numpy().copy()
    return found


def die_in_a_collective(learner: Learner) -> None:
    """Rank 1 is killed while the others wait for it: gloo tells them at once, and Ray of the death a while later."""
    import torch

    if learner.rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def optimiser_settings(learner: Learner) -> list[tuple[tuple[float, float], float]]:
    return [(tuple(group["betas"]), group["weight_decay"]) for group in learner.engine.optimizer.param_groups]
