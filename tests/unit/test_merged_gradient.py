"""The samples of a rollout's tree give the gradient that each of its calls would give alone: the tree only saves work."""

from __future__ import annotations

import pytest
import torch
from conversations import call, config, conversations, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from raygent.algorithms.batch import to_samples, weigh
from raygent.algorithms.loss import policy_loss
from raygent.algorithms.trajectory import build
from raygent.config import Algorithm
from raygent.records import Call

VOCABULARY = 8
PER_TOKEN = ("vanilla", "cispo", "gpg")  # gspo's ratio is of a whole sequence, the dppo losses mask by their own rule


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """In float64, so that what differs is no rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def loss_of(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    old: torch.Tensor,
    temperature: torch.Tensor,
    weight: float,
    advantage: float,
    algorithm: Algorithm,
) -> torch.Tensor:
    """The loss of one sequence: all [T], `mask` on what is trained."""
    logits = model(input_ids=tokens[None]).logits[0, :-1] / temperature[1:, None]
    logprobs = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0][None]
    mask = mask[1:][None]
    advantages, weights = mask * advantage, torch.full_like(logprobs, weight)
    return policy_loss(logprobs, old[1:][None], advantages, mask, weights, algorithm)[0]


def gradient(model: LlamaForCausalLM, losses: list[torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def merged(model: LlamaForCausalLM, calls: list[Call], advantage: float, algorithm: Algorithm) -> torch.Tensor:
    samples = [sample for tree in build(rows(calls)) for sample in to_samples(tree, "g", advantage)]
    weigh(samples, config())
    double = torch.float64
    return gradient(
        model,
        [
            loss_of(
                model,
                torch.tensor(sample.token_ids, dtype=torch.long),
                torch.tensor(sample.loss_mask),
                torch.tensor(sample.logprobs, dtype=double),
                torch.tensor(sample.temperature, dtype=double),
                sample.weight,
                advantage,
                algorithm,
            )
            for sample in samples
        ],
    )


def alone(model: LlamaForCausalLM, calls: list[Call], advantage: float, algorithm: Algorithm) -> torch.Tensor:
    trained = [one for one in calls if one.trainable and one.response_token_ids]
    weight = 1 / sum(len(one.response_token_ids) for one in trained)
    losses = []
    for one in trained:
        before, sampled = len(one.prompt_token_ids), len(one.response_token_ids)
        tokens = torch.tensor(one.prompt_token_ids + one.response_token_ids)
        mask = torch.arange(before + sampled) >= before
        old = torch.tensor([0.0] * before + one.logprobs, dtype=torch.float64)
        temperature = torch.full((before + sampled,), one.temperature, dtype=torch.float64)
        losses.append(loss_of(model, tokens, mask, old, temperature, weight, advantage, algorithm))
    return gradient(model, losses)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=conversations(), advantage=st.sampled_from([0.7, -1.3]), loss=st.sampled_from(PER_TOKEN))
def test_the_gradient_of_the_tree_is_that_of_its_calls(
    model: LlamaForCausalLM, calls: list[Call], advantage: float, loss: str
) -> None:
    if not any(one.trainable and one.response_token_ids for one in calls):
        return
    algorithm = Algorithm(loss=loss, clip_low=1.0, clip_high=9.0)
    whole, single = merged(model, calls, advantage, algorithm), alone(model, calls, advantage, algorithm)
    assert whole.abs().max() > 0
    assert (whole - single).norm() <= 1e-5 * single.norm()


def test_a_token_trained_twice_would_be_seen(model: LlamaForCausalLM) -> None:
    """The comparison is no empty one: the second call's own sample with the first's tokens masked in again differs."""
    first = call("r", 0, [1, 2], [3, 4])
    second = call("r", 1, [1, 2, 3, 4, 5], [6], first=2)
    algorithm = Algorithm(clip_low=1.0, clip_high=9.0)
    right = alone(model, [first, second], 1.0, algorithm)
    assert (merged(model, [first, second], 1.0, algorithm) - right).norm() <= 1e-5 * right.norm()
    assert (merged(model, [first, first, second], 1.0, algorithm) - right).norm() > 1e-2 * right.norm()
