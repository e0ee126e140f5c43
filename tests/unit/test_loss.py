"""The policy losses against their formulas, and that a token's weight is what it counts for, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conversations import config
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from raygent.algorithms.loss import kl_loss, policy_loss
from raygent.algorithms.verl_names import SOUND_LOSSES, UNSOUND_LOSSES
from raygent.config import Algorithm

LOW, HIGH = 0.1, 0.3
Array = np.ndarray


def algorithm(loss: str = "vanilla") -> Algorithm:
    return config(algorithm={"loss": loss, "clip_low": LOW, "clip_high": HIGH}).algorithm


def batch(seed: int, rows: int = 5, columns: int = 9) -> list[torch.Tensor]:
    """logprobs, old logprobs, advantages, mask, weights; float64 [rows, columns], the padding of each kind in it."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, columns)) < 0.6) & (np.arange(columns) < rng.integers(2, columns + 1, (rows, 1)))
    now = -rng.exponential(1.0, (rows, columns))
    old = np.where(mask, np.minimum(now + rng.normal(0, 0.6, now.shape), -1e-3), 0)
    advantages = np.where(mask, rng.normal(0, 1, (rows, 1)) * np.ones((rows, columns)), 0)
    weights = np.where(mask, rng.random((rows, 1)) * np.ones((rows, columns)), 0)
    return [torch.tensor(array) for array in (now, old, advantages, mask, weights)]


# Each gives the gradient of the loss by logprobs, before weights, from (logprobs, old logprobs, advantages, mask) alone.


def vanilla(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    ratio = np.exp(now - old)
    clipped = np.where(gain >= 0, ratio > 1 + HIGH, ratio < 1 - LOW) | ((gain < 0) & (ratio > 3))
    return np.where(clipped, 0, -gain * ratio)


def cispo(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    return -gain * np.clip(np.exp(now - old), 1 - LOW, 1 + HIGH)


def gpg(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    return -gain


def gspo(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    lengths = np.maximum(mask.sum(1, keepdims=True), 1)
    ratio = np.exp(((now - old) * mask).sum(1, keepdims=True) / lengths)
    clipped = np.where(gain >= 0, ratio > 1 + HIGH, ratio < 1 - LOW)
    return np.where(clipped, 0, -gain * ratio)


def dppo_tv(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    moved = np.exp(now) - np.exp(old)
    valid = np.where(gain > 0, moved <= HIGH, moved >= -LOW)
    return -gain * np.minimum(np.exp(now - old), 3) * valid


def dppo_kl(now: Array, old: Array, gain: Array, mask: Array) -> Array:
    new_p, old_p = np.exp(now), np.exp(old)
    kl = old_p * (old - now) + (1 - old_p) * (np.log1p(-old_p + 1e-8) - np.log1p(-new_p + 1e-8))
    valid = np.where(gain > 0, (kl <= HIGH) | (new_p <= old_p), (kl <= LOW) | (new_p >= old_p))
    return -gain * np.minimum(np.exp(now - old), 3) * valid


FORMULAS: dict[str, Callable[..., Array]] = {
    "vanilla": vanilla, "cispo": cispo, "gpg": gpg, "gspo": gspo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl
}  # fmt: skip


def gradient(tensors: list[torch.Tensor], loss: str) -> torch.Tensor:
    now = tensors[0].clone().requires_grad_()
    value, _ = policy_loss(now, *tensors[1:], algorithm(loss))
    (found,) = torch.autograd.grad(value, now)
    return found


@pytest.mark.parametrize("loss", SOUND_LOSSES)
@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_the_gradient_is_the_formulas_times_the_weight(loss: str, seed: int) -> None:
    tensors = batch(seed)
    now, old, gain, mask, weights = (tensor.numpy() for tensor in tensors)
    wanted = FORMULAS[loss](now, old, gain, mask) * weights * mask
    np.testing.assert_allclose(gradient(tensors, loss).numpy(), wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("loss", SOUND_LOSSES)
def test_micro_batches_add_up(loss: str) -> None:
    """Rows apart and padded further, with a filler, sum to the loss of the whole."""
    tensors = batch(1)
    whole, _ = policy_loss(*tensors, algorithm(loss))
    cuts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    padded = [[torch.nn.functional.pad(tensor[cut], (0, 3)) for tensor in tensors] for cut in cuts]
    filler = [torch.zeros(1, 2, dtype=tensor.dtype) for tensor in tensors]
    apart = [policy_loss(*part, algorithm(loss))[0] for part in [*padded, filler]]
    assert float(whole) != 0 and float(apart[-1]) == 0
    torch.testing.assert_close(torch.stack(apart).sum(), whole, rtol=1e-9, atol=0)


def test_vanilla_is_the_clipped_surrogate() -> None:
    """The value, not only the gradient: PPO's max of two terms, at most 3 |A| where the advantage is negative."""
    now, old, gain, mask, weights = batch(2)
    ratio = (now - old).exp()
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - LOW, 1 + HIGH) * gain)
    surrogate = torch.where(gain < 0, torch.maximum(surrogate, 3 * gain), surrogate)
    value, told = policy_loss(now, old, gain, mask, weights, algorithm())
    torch.testing.assert_close(value, -(surrogate * weights * mask).sum())
    clipped = ((gain > 0) & (ratio > 1 + HIGH)) | ((gain < 0) & (ratio < 1 - LOW))
    assert told["actor/pg_clipfrac"] == pytest.approx(float(clipped[mask].double().mean()))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_is_its_estimator(kind: str) -> None:
    now, reference, _, mask, weights = batch(3)
    log_ratio = now - reference
    terms = {"k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}
    wanted = (terms[kind] * weights)[mask].sum()
    torch.testing.assert_close(kl_loss(now, reference, mask, weights, kind), wanted)


@pytest.mark.parametrize("loss", [*UNSOUND_LOSSES, "ppo"])
def test_losses_that_weights_do_not_go_through_are_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.loss: .*use one of vanilla"):
        Algorithm(loss=loss)


def test_every_loss_of_verl_is_judged() -> None:
    """A new verl with a new loss: say whether it is sound."""
    assert set(POLICY_LOSS_REGISTRY) == {*SOUND_LOSSES, *UNSOUND_LOSSES}
    for loss in SOUND_LOSSES:
        assert Algorithm(loss=loss).loss == loss
