"""A step's rollouts as samples: advantages, weights, what is left out; and their way into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from conversations import call, config, conversations, reward, rollout, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from raygent.actors.micro_batches import deal, micro_batches
from raygent.algorithms.batch import make_samples
from raygent.algorithms.intervals import paired_gain
from raygent.records import Call, Sample

REWARDS = st.sampled_from([0.0, 0.25, 1.0, -3.5])


def group_advantages(rewards: list[float], normalise_std: bool = True) -> np.ndarray:
    """GRPO's formula in numpy (std over n - 1, as torch's)."""
    values = np.array(rewards)
    centred = values - values.mean()
    return centred / (values.std(ddof=1) + 1e-6) if normalise_std else centred


def spoken(rollout_id: str, agent: str = "main", length: int = 3, sequence: int = 0) -> Call:
    return call(rollout_id, sequence, [1, 2], [5] * length, agent=agent)


def of(samples: list[Sample], rollout_id: str, agent: str | None = None) -> list[Sample]:
    return [one for one in samples if one.rollout_id == rollout_id and agent in (None, one.agent)]


def total(samples: list[Sample]) -> float:
    return sum(sample.weight * int(sample.loss_mask.sum()) for sample in samples)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[dict], list[Call]]:
    """Two or three groups of one to four rollouts, each with its own conversation."""
    rollouts, calls = [], []
    for group in range(draw(st.integers(2, 3))):
        for member in range(draw(st.integers(1, 4))):
            name = f"g{group}-{member}"
            status = draw(st.sampled_from(["succeeded", "succeeded", "failed", "lost", "dropped"]))
            rollouts.append(rollout(name, f"g{group}", draw(REWARDS), status))
            calls += draw(conversations(name))
    return rollouts, calls


@given(batches(), st.booleans())
@settings(max_examples=60)
def test_weights_and_advantages_of_random_batches(batch: tuple[list[dict], list[Call]], drop_flat: bool) -> None:
    rollouts, calls = batch
    samples, metrics = make_samples(tables(rollouts, calls), config(algorithm={"drop_flat_groups": drop_flat}))
    groups: dict[str, list[dict]] = {}
    for row in rollouts:
        if row["status"] in ("succeeded", "failed"):
            groups.setdefault(row["group_id"], []).append(row)
    compared = {name: members for name, members in groups.items() if len(members) >= 2}

    trained = {sample.rollout_id for sample in samples}
    if samples:
        assert total(samples) == pytest.approx(1, abs=1e-9)
    for name in trained:
        assert total(of(samples, name)) == pytest.approx(1 / len(trained), abs=1e-9)
        assert len({sample.weight for sample in of(samples, name)}) == 1

    expected_tokens = 0
    for members in compared.values():
        names = [row["rollout_id"] for row in members]
        spoke = {
            name: {one.agent for one in calls if one.rollout_id == name and one.response_token_ids} for name in names
        }
        for agent in set().union(*spoke.values()):
            pool = [row for row in members if agent in spoke[row["rollout_id"]] or not spoke[row["rollout_id"]]]
            rewards = [row["reward"] for row in pool]
            flat = len(set(rewards)) == 1
            wanted = np.zeros(len(pool)) if flat else group_advantages(rewards)
            for row, value in zip(pool, wanted, strict=True):
                mine = of(samples, row["rollout_id"], agent)
                tokens = sum(
                    len(one.response_token_ids)
                    for one in calls
                    if one.rollout_id == row["rollout_id"] and one.agent == agent and one.trainable
                )
                tokens = 0 if flat and drop_flat else tokens
                expected_tokens += tokens
                assert sum(int(sample.loss_mask.sum()) for sample in mine) == tokens
                for sample in mine:
                    np.testing.assert_allclose(sample.advantages[sample.loss_mask], value, rtol=1e-5, atol=1e-6)
    assert metrics["tokens_trained"] == expected_tokens
    assert trained <= {row["rollout_id"] for members in compared.values() for row in members}
    asked = {row["group_id"] for row in rollouts}
    assert metrics["groups"] == len(asked)
    assert metrics["groups_dropped"] == sum(len(groups.get(name, [])) < 2 for name in asked)
    assert metrics["rollouts_valid"] == sum(map(len, compared.values()))


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
@settings(max_examples=50)
def test_a_rollouts_weight_is_the_same_however_it_split(turns: int, length: int, other_agent: bool) -> None:
    """The same answers, once in one appended conversation, once each behind a prompt of its own or by another agent."""
    whole, split = [], []
    prompt = [1]
    for turn in range(turns):
        response = [10 + turn] * length
        whole.append(call("a", turn, prompt, response, first=turn * length))
        agent = "helper" if other_agent and turn % 2 else "main"
        split.append(call("a", turn, [2 + turn], response, first=turn * length, agent=agent))
        prompt = [*prompt, *response, 3]
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0), rollout("c", "g", 0.0)]
    # the others take part in whatever comparison: in "b" both agents acted, in "c" none
    others = [spoken("b", "main", 7), spoken("b", "helper", 2, sequence=1)]
    one, _ = make_samples(tables(rollouts, whole + others), config())
    many, _ = make_samples(tables(rollouts, split + others), config())
    assert len(of(one, "a")) == 1 and len(of(many, "a")) == turns
    assert total(of(one, "a")) == pytest.approx(0.5) and total(of(many, "a")) == pytest.approx(0.5)
    assert {sample.weight for sample in of(many, "a")} == {of(one, "a")[0].weight}


def test_an_agents_own_reward_is_compared_instead_of_the_rollouts() -> None:
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0), rollout("c", "g", 0.5, "failed")]
    calls = [spoken(name, agent, sequence=place) for name in "abc" for place, agent in enumerate(["main", "critic"])]
    rewards = [
        reward("a", 0.9, "critic", sequence=0),
        reward("a", 0.0, "critic", sequence=2),  # the last one counts
        reward("a", 0.5, "critic", sequence=3, call_sequence=1),  # of a turn, not of the agent
        reward("a", 7.0, "critic", sequence=4, name="style"),  # a component
        reward("b", 1.0, "critic", sequence=0),
        reward("c", 7.0, "critic", sequence=0),  # its rollout failed
    ]
    samples, _ = make_samples(tables(rollouts, calls, rewards), config(algorithm={"normalise_std": False}))
    signs = {(one.rollout_id, one.agent): float(one.advantages[one.loss_mask][0]) for one in samples}
    mains = {("a", "main"): 0.5, ("b", "main"): -0.5, ("c", "main"): 0.0}
    assert signs == mains | {("a", "critic"): -0.5, ("b", "critic"): 0.5, ("c", "critic"): 0.0}


def test_only_agents_that_match_are_trained() -> None:
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0)]
    calls = [spoken(name, agent, sequence=place) for name in "ab" for place, agent in enumerate(["writer/1", "judge"])]
    samples, metrics = make_samples(
        tables(rollouts, calls), config(agent={"run": "agent:run", "train": ["writer*", "planner"]})
    )
    assert {sample.agent for sample in samples} == {"writer/1"}
    assert metrics["agents/judge/calls"] == metrics["agents/writer/1/calls"] == 2  # all are told of
    assert total(samples) == pytest.approx(1)


def test_what_an_upstream_answered_is_told_and_never_trained() -> None:
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0)]

    def judged(name: str, place: int) -> Call:
        said = {"policy": "upstream:vendor", "trainable": False, "untrainable_why": "upstream", "cost": 0.25}
        return call(name, place, [], [], agent="judge", **said)

    calls = [one for name in "ab" for one in (spoken(name), judged(name, 1))]
    alone, without = make_samples(tables(rollouts, [spoken("a"), spoken("b")]), config())
    samples, metrics = make_samples(tables(rollouts, calls), config())
    assert [one.token_ids.tolist() for one in samples] == [one.token_ids.tolist() for one in alone]
    assert total(samples) == pytest.approx(1) and {one.agent for one in samples} == {alone[0].agent}
    assert metrics["upstream/vendor/calls"] == 2 and metrics["upstream/vendor/cost"] == 0.5
    for name in ("tokens_sampled", "tokens_trained", "prompt_length", "response_length", "reward"):
        assert metrics[name] == without[name]
    assert metrics["turns"] == 2
    only_judged = [judged(name, 0) for name in "ab"]
    assert make_samples(tables(rollouts, only_judged), config())[0] == []


def test_a_rollout_without_a_call_counts_in_the_mean_but_a_lost_one_does_not() -> None:
    rollouts = [
        rollout("a", "g", 1.0),
        rollout("b", "g", 0.0),
        rollout("silent", "g", 0.0, "failed"),
        rollout("lost", "g", 9.0, "lost"),
        rollout("dropped", "g", 9.0, "dropped") | {"attempts": 0},
    ]
    calls = [spoken("a"), spoken("b"), spoken("lost")]
    samples, metrics = make_samples(tables(rollouts, calls), config())
    assert {sample.rollout_id for sample in samples} == {"a", "b"}
    wanted = group_advantages([1.0, 0.0, 0.0])
    np.testing.assert_allclose([one.advantages[2] for one in samples], wanted[:2], rtol=1e-5)
    assert metrics["failed/agent_error"] == 1 and metrics["failed/lost"] == 1
    assert metrics["attempts_not_won"] == 1 and metrics["groups"] == 1
    assert metrics["rollouts_valid"] == 3 and metrics["rollouts_trained"] == 2


def test_small_groups_are_dropped_and_flat_ones_left_out() -> None:
    rollouts = [rollout(f"{group}{n}", group, float(n == 0)) for group in "xy" for n in range(3)]
    rollouts += [rollout(f"z{n}", "z", 1.0) for n in range(3)] + [rollout("x3", "x", 0.0)]
    calls = [spoken(row["rollout_id"]) for row in rollouts]
    samples, metrics = make_samples(tables(rollouts, calls), config(algorithm={"min_group": 4}))
    assert {sample.group_id for sample in samples} == {"x"}
    assert (metrics["groups"], metrics["groups_dropped"], metrics["groups_flat"]) == (3, 2, 0)
    samples, metrics = make_samples(tables(rollouts, calls), config())
    assert {sample.group_id for sample in samples} == {"x", "y"}
    assert (metrics["groups_dropped"], metrics["groups_flat"]) == (0, 1)
    samples, _ = make_samples(tables(rollouts, calls), config(algorithm={"drop_flat_groups": False}))
    flat = [sample for sample in samples if sample.group_id == "z"]
    assert len(flat) == 3 and not any(sample.advantages.any() for sample in flat)
    assert total(samples) == pytest.approx(1) and total(flat) == pytest.approx(0.3)


def test_nothing_to_train_is_no_sample() -> None:
    assert make_samples(tables([], []), config())[0] == []
    alike = [rollout("a", "g", 1.0), rollout("b", "g", 1.0)]
    assert make_samples(tables(alike, [spoken("a"), spoken("b")]), config())[0] == []


def sample_of(length: int, number: int) -> Sample:
    tokens = np.full(length, number + 3, np.int32)
    mask = np.arange(length) > 0
    values = (mask * (number + 1)).astype(np.float32)
    ones = np.ones(length, np.float32)
    sample = Sample(f"r{number}", "g", "main", tokens, mask, -values, values, mask.astype(np.int32), 2 * ones, 0.5)
    sample.values, sample.returns, sample.reference = 2 * values, 3 * values, 4 * values
    return sample


@given(st.lists(st.integers(2, 40), max_size=12), st.integers(1, 4), st.integers(1, 90), st.booleans())
@settings(max_examples=200)
def test_each_sample_is_in_one_micro_batch_of_one_rank(
    lengths: list[int], ranks: int, tokens: int, packed: bool
) -> None:
    samples = [sample_of(length, number) for number, length in enumerate(lengths)]
    by_rank = [micro_batches(deal(list(enumerate(samples)), ranks), rank, tokens, packed) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1  # else ZeRO-3 hangs
    places = []
    for batch in (batch for batches in by_rank for batch in batches):
        rows, width = batch.token_ids.shape
        assert rows == 1 or (batch.lengths.sum() if packed else rows * width) <= tokens
        assert batch.real.sum(1).tolist() == batch.lengths.tolist()
        assert all(
            getattr(batch, name).shape == (rows, width) for name in vars(batch) if name not in ("places", "lengths")
        )
        for row, place in enumerate(batch.places):
            if place < 0:
                assert not batch.mask[row].any() and not batch.weights[row].any()
                continue
            places.append(place)
            sample, length = samples[place], lengths[place]
            assert batch.lengths[row] == length
            assert batch.token_ids[row, :length].tolist() == sample.token_ids.tolist()
            assert batch.mask[row].tolist() == sample.loss_mask.tolist() + [False] * (width - length)
            for name in ("logprobs", "advantages", "values", "returns", "reference"):
                assert torch_equal(getattr(batch, name)[row], getattr(sample, name))
            assert torch_equal(batch.weights[row], sample.loss_mask * 0.5)
            assert (batch.temperature[row, :length] == 2).all() and (batch.temperature[row, length:] == 1).all()
    assert sorted(places) == list(range(len(samples)))


def torch_equal(padded: object, values: np.ndarray) -> bool:
    """`values`, then zeros."""
    array = np.asarray(padded)
    return bool((array[: len(values)] == values).all() and not array[len(values) :].any())


def test_ranks_have_about_the_same_work() -> None:
    rng = np.random.default_rng(0)
    samples = [sample_of(int(length), number) for number, length in enumerate(rng.integers(2, 500, 64))]
    work = [sum(len(sample) for _, sample in share) for share in deal(list(enumerate(samples)), 4)]
    assert max(work) < 1.05 * min(work)


def test_the_paired_bootstrap_finds_a_gain_and_no_gain() -> None:
    rng = np.random.default_rng(0)
    before = {str(task): float(rng.random() < 0.4) for task in range(300)}
    after = {task: float(value or rng.random() < 0.2) for task, value in before.items()}
    gain, (low, high) = paired_gain(before, after | {"only after": 1.0})
    assert gain == pytest.approx(np.mean([after[task] - before[task] for task in before]))
    assert 0 < low < gain < high
    shuffled = dict(zip(before, rng.permutation(list(before.values())).tolist(), strict=True))
    _, (low, high) = paired_gain(before, shuffled)
    assert low < 0 < high
    assert paired_gain(before, after) == paired_gain(before, after)
    assert np.isnan(paired_gain({}, after)[0])


def test_the_only_token_of_a_batch_is_trained_where_it_tells_something() -> None:
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0)]
    (sample,) = make_samples(tables(rollouts, [spoken("a", length=1)]), config())[0]
    np.testing.assert_allclose(sample.advantages[sample.loss_mask], group_advantages([1.0, 0.0])[:1], rtol=1e-5)
    assert (
        make_samples(tables(rollouts, [spoken("a", length=1)]), config(algorithm={"name": "reinforce_plus_plus"}))[0]
        == []
    )
