"""From calls to samples: every token that may be trained is trained once, in the context that it was sampled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from conversations import call, conversations, logprob_of, rows
from hypothesis import given, settings

from raygent.algorithms.batch import to_samples
from raygent.algorithms.trajectory import Trajectory, build, paths
from raygent.records import Call, Sample


def samples_of(calls: list[Call], advantage: float = 0.5) -> list[Sample]:
    return [sample for trajectory in build(rows(calls)) for sample in to_samples(trajectory, "g", advantage)]


def contexts(calls: list[Call]) -> dict[float, tuple[Call, list[int], int]]:
    """logprob -> the call of the sampled token of that name, the tokens before it, and the token."""
    found = {}
    for one in calls:
        for place, token in enumerate(one.response_token_ids):
            found[one.logprobs[place]] = (one, one.prompt_token_ids + one.response_token_ids[:place], token)
    return found


def extends(prompt: list[int], earlier: Call) -> bool:
    said = earlier.prompt_token_ids + earlier.response_token_ids
    return prompt[: len(said)] == said


@given(conversations())
@settings(max_examples=300)
def test_each_trainable_token_is_trained_once_in_its_own_context(calls: list[Call]) -> None:
    samples = samples_of(calls)
    trained: list[float] = []
    known = contexts(calls)
    for sample in samples:
        assert sample.loss_mask.any()
        for place in np.flatnonzero(sample.loss_mask):
            name = float(sample.logprobs[place])
            trained.append(name)
            made, before, token = known[name]
            assert sample.agent == made.agent
            assert sample.token_ids[:place].tolist() == before
            assert sample.token_ids[place] == token
            assert logprob_of(int(sample.policy_versions[place])) == name
            assert sample.temperature[place] == made.temperature
            assert sample.advantages[place] == 0.5
        apart = ~sample.loss_mask
        assert not sample.logprobs[apart].any() and not sample.advantages[apart].any()
        assert not sample.policy_versions[apart].any() and (sample.temperature[apart] == 1).all()
    assert sorted(trained) == sorted(name for name, (made, _, _) in known.items() if made.trainable)


@given(conversations())
@settings(max_examples=300)
def test_a_call_hangs_under_the_longest_one_it_extends(calls: list[Call]) -> None:
    for trajectory in build(rows(calls)):
        mine = [one for one in calls if one.agent == trajectory.agent and one.response_token_ids]
        for place, one in enumerate(mine):
            before = [earlier for earlier in mine[:place] if extends(one.prompt_token_ids, earlier)]
            node = trajectory.nodes[place]
            if before:
                assert node.parent is not None
                longest = max(len(earlier.prompt_token_ids + earlier.response_token_ids) for earlier in before)
                assert len(node.parent.tokens) == longest
            else:
                assert node.parent is None
        parents = [id(node.parent) for node in trajectory.nodes if node.parent]
        assert trajectory.branches == len(mine) - len(set(parents)) - 1
        assert len(paths(trajectory)) == len(trajectory.leaves())


@given(conversations())
@settings(max_examples=50)
def test_the_order_is_the_sequence_not_the_order_of_the_rows(calls: list[Call]) -> None:
    def told(trajectories: list[Trajectory]) -> list[Any]:
        return [[(node.call["sequence"], node.tokens.tolist()) for node in one.nodes] for one in trajectories]

    assert told(build(rows(calls))) == told(build(rows(calls)[::-1]))


def turns(count: int) -> list[Call]:
    """A conversation that is only appended to: a system prompt, then user 7, assistant's two tokens, user 7 ..."""
    calls: list[Call] = []
    prompt = [1, 2, 3]
    for turn in range(count):
        calls.append(call("r", turn, prompt, [10 + turn, 20 + turn], first=2 * turn))
        prompt = [*prompt, 10 + turn, 20 + turn, 7]
    return calls


def test_a_conversation_only_appended_to_is_one_sample() -> None:
    (sample,) = samples_of(turns(5))
    assert len(sample) == 3 + 5 * 2 + 4
    assert sample.loss_mask.sum() == 10
    assert build(rows(turns(5)))[0].branches == 0


def test_retokenised_history_starts_a_branch_and_both_are_trained() -> None:
    calls = turns(3)
    calls[2] = replace(calls[2], prompt_token_ids=[1, 2, 3, 10, 20, 7, 99, 7])  # [11, 21] came back as [99]
    (trajectory,) = build(rows(calls))
    assert trajectory.branches == 1
    first, second = to_samples(trajectory, "g", 1.0)
    assert first.loss_mask.sum() == 4 and second.loss_mask.sum() == 2
    assert second.token_ids.tolist() == [1, 2, 3, 10, 20, 7, 99, 7, 12, 22]


def test_two_answers_to_one_prompt_share_what_came_before_and_train_it_once() -> None:
    first, second, third = turns(3)
    other = replace(second, sequence=3, response_token_ids=[50], logprobs=[-0.75], policy_versions=[0])
    samples = samples_of([first, second, third, other])
    assert [int(sample.loss_mask.sum()) for sample in samples] == [6, 1]
    assert samples[1].token_ids.tolist() == [*second.prompt_token_ids, 50]


def test_a_call_without_a_sampled_token_is_no_part_of_it() -> None:
    calls = turns(2)
    refused = call("r", 5, calls[1].prompt_token_ids, [])
    assert len(samples_of([*calls, refused])) == 1
    assert build(rows([refused])) == []
