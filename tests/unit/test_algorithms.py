"""Each algorithm's advantages against its paper's formula in numpy, from the store's tables on, split and branching rollouts
included; and its loss's gradient against finite differences of a tiny model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conversations import branching, call, config, logprob_of, reward, rollout, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

from raygent.algorithms.batch import lacking_groups, make_samples
from raygent.algorithms.named import NAMES, algorithm
from raygent.algorithms.verl_names import ADVANTAGES, NO_ADVANTAGES
from raygent.records import Call, Sample

Array = np.ndarray
GREEDY = 0.25  # the reward of each group's greedy rollout


# From the rewards of the rollouts of one group, and how many tokens each sampled: the advantage of each rollout.


def grpo(rewards: Array, lengths: Array) -> Array:
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def centred(rewards: Array, lengths: Array) -> Array:
    return rewards - rewards.mean()


def rloo(rewards: Array, lengths: Array) -> Array:
    return np.array([value - np.delete(rewards, place).mean() for place, value in enumerate(rewards)])


def opo(rewards: Array, lengths: Array) -> Array:
    return rewards - (rewards * lengths).sum() / lengths.sum()


def remax(rewards: Array, lengths: Array) -> Array:
    return rewards - GREEDY


BY_GROUP: dict[str, Callable[[Array, Array], Array]] = {
    "grpo": grpo, "dapo": grpo, "gspo": grpo, "cispo": grpo, "dr_grpo": centred, "gpg": centred, "rloo": rloo, "opo": opo,
    "remax": remax,
}  # fmt: skip


def batch(seed: int, groups: int = 3, size: int = 4) -> tuple[dict[str, pa.Table], dict[str, list[tuple[str, float]]]]:
    """Tables of rollouts that go on, branch and begin anew, and by group the ids and rewards of its rollouts. No two rewards of
    a group are alike."""
    rng = np.random.default_rng(seed)
    rollouts, calls, told = [], [], {}
    for group in range(groups):
        rewards = rng.permutation(size) / size
        for member, value in enumerate(rewards):
            name = f"{group}-{member}"
            rollouts.append(rollout(name, f"g{group}", float(value)))
            made, first = branching(rng, name, 12, int(rng.integers(1, 5)), 5), 0
            for one in made:  # no two tokens of a rollout have the same
                one.logprobs = [logprob_of(first + place) for place in range(len(one.logprobs))]
                first += len(one.logprobs)
            calls += made
            told.setdefault(f"g{group}", []).append((name, float(value)))
    return tables(rollouts, calls), told


def greedy_of(told: dict[str, Any]) -> dict[str, pa.Table]:
    return tables([rollout(f"{group}-greedy", group, GREEDY) for group in told], [])


OWN_KEYS: dict[str, dict[str, Any]] = {"dr_grpo": {"horizon": 64}, "distill": {"teacher": "other", "group_size": 2}}


def settings_of(name: str, **more: Any) -> Any:
    return config(algorithm={"name": name} | OWN_KEYS.get(name, {}) | more)


def measured(what: str, logprobs: Array) -> Array:
    """Stands for the learners' forward passes: something of each token that its recorded log-probability tells."""
    return {"current": 0.9 * logprobs - 0.1, "reference": 1.3 * logprobs + 0.2, "values": np.sin(7 * logprobs)}[what]


def measure(what: str, samples: list[Sample]) -> list[Array]:
    return [measured(what, sample.logprobs) * sample.loss_mask for sample in samples]


def in_order(found: dict[str, pa.Table]) -> dict[str, list[Array]]:
    """By rollout the recorded log-probabilities of its trainable calls, in the order of the calls."""
    rows = sorted(found["calls"].to_pylist(), key=lambda row: (row["rollout_id"], row["sequence"]))
    told: dict[str, list[Array]] = {}
    for row in (row for row in rows if row["trainable"]):
        told.setdefault(row["rollout_id"], []).append(np.array(row["logprobs"], np.float64))
    return told


def by_logprob(samples: list[Sample], values: str) -> dict[str, dict[float, float]]:
    """By rollout, for each trained token (its recorded log-probability names it) the sample's `values` there."""
    told: dict[str, dict[float, float]] = {}
    for sample in samples:
        mine = told.setdefault(sample.rollout_id, {})
        pairs = zip(sample.logprobs[sample.loss_mask], getattr(sample, values)[sample.loss_mask], strict=True)
        mine |= {float(name): float(value) for name, value in pairs}
    return told


def trained(samples: list[Sample], rollout_id: str) -> Array:
    mine = [sample for sample in samples if sample.rollout_id == rollout_id]
    return np.concatenate([sample.advantages[sample.loss_mask] for sample in mine] or [np.zeros(0)])


def sampled_tokens(found: dict[str, pa.Table]) -> dict[str, int]:
    rows = found["calls"].select(["rollout_id", "response_token_ids", "trainable"]).to_pylist()
    return {
        name: sum(len(row["response_token_ids"]) for row in rows if row["rollout_id"] == name and row["trainable"])
        for name in {row["rollout_id"] for row in rows}
    }


@pytest.mark.parametrize("name", BY_GROUP)
@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_every_trained_token_has_its_rollouts_advantage(name: str, seed: int) -> None:
    found, told = batch(seed)
    samples, _ = make_samples(found, settings_of(name), greedy_of(told))
    tokens = sampled_tokens(found)
    for members in told.values():
        lengths = np.array([tokens[rollout_id] for rollout_id, _ in members], float)
        wanted = BY_GROUP[name](np.array([value for _, value in members]), lengths)
        for (rollout_id, _), value in zip(members, wanted, strict=True):
            mine = trained(samples, rollout_id)
            assert len(mine) == tokens[rollout_id]
            np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_reinforce_plus_plus_is_normalised_over_the_batchs_tokens(seed: int) -> None:
    found, told = batch(seed)
    samples, _ = make_samples(found, settings_of("reinforce_plus_plus", group_size=1, min_group=2))
    tokens = sampled_tokens(found)
    every = np.concatenate([np.full(tokens[name], value) for members in told.values() for name, value in members])
    for members in told.values():
        for name, value in members:
            wanted = (value - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
            np.testing.assert_allclose(trained(samples, name), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_token_to_train_is_no_sample(name: str) -> None:
    rollouts = [rollout("a", "g", 1.0), rollout("b", "g", 0.0)]
    calls = [call(one, 0, [1], [5], trainable=False) for one in "ab"]
    assert make_samples(tables(rollouts, calls), settings_of(name), greedy_of({"g": []}), measure)[0] == []


def test_every_named_algorithm_is_tested() -> None:
    assert set(NAMES) == set(BY_GROUP) | {"reinforce_plus_plus", "ppo", "sft", "dpo", "distill"}


def test_every_estimator_of_verl_is_judged() -> None:
    assert set(ADV_ESTIMATOR_REGISTRY) == set(ADVANTAGES) | set(NO_ADVANTAGES)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_estimator_of_verl_by_its_name(name: str) -> None:
    """It goes through: finite, and better rollouts have no smaller advantages."""
    found, told = batch(3)
    samples, _ = make_samples(found, settings_of("grpo", advantage=name))
    for members in told.values():
        ordered = [trained(samples, rollout_id) for rollout_id, _ in sorted(members, key=lambda one: one[1])]
        values = [mine[0] for mine in ordered if len(mine)]
        assert np.isfinite(values).all() and values == sorted(values) and values[-1] > values[0]


# credit by turn


def two_turns(name: str, first: float | None, last: float, sequence: int = 0) -> tuple[list[Call], list[Any]]:
    """Two calls, the second extends the first; the reward of the first turn, if any."""
    calls = [call(name, 0, [1, 2], [5, 5]), call(name, 1, [1, 2, 5, 5, 3], [6], first=2)]
    return calls, [] if first is None else [reward(name, first, "", sequence, call_sequence=0)]


def credited(told: dict[str, tuple[float | None, float]], **more: Any) -> dict[str, Array]:
    rollouts, calls, rewards = [], [], []
    for name, (first, last) in told.items():
        made, given = two_turns(name, first, last)
        rollouts.append(rollout(name, "g", last))
        calls += made
        rewards += given
    samples, _ = make_samples(tables(rollouts, calls, rewards), settings_of("grpo", credit="turn", **more))
    return {name: trained(samples, name) for name in told}


def test_a_turns_reward_counts_for_the_turns_up_to_it() -> None:
    found = credited({"a": (1.0, 1.0), "b": (0.0, 1.0), "c": (1.0, 0.0)}, discount=0.5)
    every = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    normal = (every - every.mean()) / (every.std(ddof=1) + 1e-6)
    for name, (first, last) in zip("abc", normal.reshape(3, 2), strict=True):
        np.testing.assert_allclose(found[name], [first + 0.5 * last] * 2 + [last], rtol=1e-5)


def test_without_rewards_of_turns_credit_by_turn_is_grpo() -> None:
    found = credited({"a": (None, 1.0), "b": (None, 0.0), "c": (None, 0.5)})
    for name, value in zip("abc", grpo(np.array([1.0, 0.0, 0.5]), np.zeros(3)), strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_a_group_whose_turns_alone_differ_tells_something() -> None:
    found = credited({"a": (1.0, 1.0), "b": (0.0, 1.0)})
    assert found["a"][0] > 0 > found["b"][0] and len(found["a"]) == 3


def test_an_agents_turns_are_counted_by_themselves() -> None:
    """The second call of "main" is the third of the rollout."""
    rollouts, calls, rewards = [rollout("a", "g", 0.0), rollout("b", "g", 0.0)], [], []
    for name, value in (("a", 1.0), ("b", 0.0)):
        calls += [
            call(name, 0, [1], [5]),
            call(name, 1, [2], [6], first=1, agent="helper"),
            call(name, 2, [3], [7], first=2),
        ]
        rewards.append(reward(name, value, "main", 0, call_sequence=1))
    samples, _ = make_samples(tables(rollouts, calls, rewards), settings_of("grpo", credit="turn"))
    mains = [sample for sample in samples if sample.agent == "main" and sample.rollout_id == "a"]
    assert [float(sample.advantages[sample.loss_mask][0]) > 0 for sample in mains] == [True, True]
    found = {
        int(sample.token_ids[0]): float(sample.advantages[sample.loss_mask][0])
        for sample in samples
        if sample.rollout_id == "a"
    }
    assert found[1] == found[3]  # both up to it, and the second call of "helper" does not exist


def test_a_turns_reward_is_not_trained_by_rollout() -> None:
    calls, given = two_turns("a", 1.0, 0.0)
    more, others = two_turns("b", 0.0, 0.0)
    both = tables([rollout("a", "g", 0.0), rollout("b", "g", 0.0)], calls + more, given + others)
    assert make_samples(both, settings_of("grpo"))[0] == []


# what tokens count


@pytest.mark.parametrize("aggregation", ["rollout", "token", "constant"])
@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_weights_by_aggregation(aggregation: str, seed: int) -> None:
    found, _ = batch(seed)
    samples, metrics = make_samples(found, settings_of("grpo", aggregation=aggregation, horizon=64))
    tokens, rollouts = sampled_tokens(found), {sample.rollout_id for sample in samples}
    assert sum(sample.share for sample in samples) == pytest.approx(1)
    for sample in samples:
        wanted = {
            "rollout": 1 / len(rollouts) / tokens[sample.rollout_id],
            "token": 1 / metrics["tokens_trained"],
            "constant": 1 / len(rollouts) / 64,
        }[aggregation]
        assert sample.weight == pytest.approx(wanted)
        if aggregation != "constant":
            assert sample.share == pytest.approx(sample.weight * sample.loss_mask.sum())


@pytest.mark.parametrize("aggregation", ["rollout", "token", "constant"])
def test_a_policy_counts_as_though_it_were_trained_alone(aggregation: str) -> None:
    """What the learner makes of weight and share, whatever other policies did in the same rollouts, and in others."""
    rollouts = [rollout(name, "g", float(name == "a")) for name in "abc"]
    calls = [call(name, 0, [1], [5] * length, agent="long") for name, length in {"a": 9, "b": 1}.items()]
    calls += [call(name, 1, [2], [6] * 3, first=9, agent="short") for name in "abc"]
    policies = {"long": ["long"], "short": ["short"]}
    asked = config(
        algorithm={"name": "grpo", "aggregation": aggregation, "horizon": 10},
        agent={"run": "agent:run", "policies": policies},
        learner={"lora": {"rank": 4}},
    )

    def weights(agent: str, calls: list[Any]) -> list[float]:
        samples, _ = make_samples(tables(rollouts, calls), asked)
        mine = [sample for sample in samples if sample.agent == agent]
        total = sum(sample.share for sample in mine)
        return [sample.weight / total for sample in mine]

    for agent in policies:
        alone = weights(agent, [one for one in calls if one.agent == agent])
        assert weights(agent, calls) == pytest.approx(alone)
    wanted = {"rollout": [1 / 2 / 9, 1 / 2], "token": [1 / 10] * 2, "constant": [1 / 2 / 10] * 2}[aggregation]
    assert weights("long", calls) == pytest.approx(wanted)


def test_what_is_overlong_is_punished() -> None:
    lengths = {"a": 4, "b": 7, "c": 9, "d": 12}  # 6 are free, 10 are too many
    rollouts = [rollout(name, "g", 1.0) for name in lengths]
    calls = [call(name, 0, [1], [5] * length) for name, length in lengths.items()]
    asked = settings_of("dapo", overlong_tokens=10, overlong_buffer=4, normalise_std=False)
    samples, _ = make_samples(tables(rollouts, calls), asked)
    penalties = np.array([0.0, -0.25, -0.75, -1.0])
    for name, value in zip(lengths, penalties - penalties.mean(), strict=True):
        np.testing.assert_allclose(trained(samples, name), value, rtol=1e-5)


def test_tokens_that_are_not_trained_are_long_too() -> None:
    calls = [call("a", 0, [1], [5] * 4), call("a", 1, [2], [6] * 6, first=4, trainable=False), call("b", 0, [1], [5])]
    asked = settings_of("dapo", overlong_tokens=10, overlong_buffer=4, normalise_std=False)
    samples, _ = make_samples(tables([rollout(name, "g", 1.0) for name in "ab"], calls), asked)
    for name, value in {"a": -0.5, "b": 0.5}.items():
        np.testing.assert_allclose(trained(samples, name), value, rtol=1e-5)


def test_groups_without_signal_are_lacking() -> None:
    rollouts = [
        rollout(f"{group}-{n}", group, float(n and group != "flat")) for group in ("a", "b", "flat") for n in (0, 1)
    ]
    found = tables(rollouts, [call(row["rollout_id"], 0, [1], [5]) for row in rollouts])
    assert lacking_groups(found, settings_of("dapo", tasks_per_step=3)) == 1
    assert lacking_groups(found, settings_of("dapo", tasks_per_step=2)) == 0
    # Greedy rollouts are sampled behind the refills.
    assert lacking_groups(found, settings_of("remax", tasks_per_step=2)) == 0


def test_a_group_whose_greedy_rollout_was_lost_is_dropped() -> None:
    found, told = batch(1)
    rows = greedy_of(told)["rollouts"].to_pylist()
    rows[0]["status"] = "lost"
    samples, metrics = make_samples(found, settings_of("remax"), tables(rows, []))
    assert {sample.group_id for sample in samples} == {"g1", "g2"} and metrics["groups_dropped"] == 1


def test_the_greedy_rollout_is_rewarded_as_the_others_are() -> None:
    """With what is too long taken off, and by what an agent got of its own."""
    asked = settings_of("remax", overlong_tokens=10, overlong_buffer=10)
    found = tables([rollout("a", "g", 1.0)], [call("a", 0, [1], [5] * 5)], [reward("a", 7.0, "main")])
    greedy = tables([rollout("z", "g", 1.0)], [call("z", 0, [1], [5] * 8)], [reward("z", 3.0, "main")])
    samples, _ = make_samples(found, asked, greedy)
    np.testing.assert_allclose(trained(samples, "a"), (7.0 - 0.5) - (3.0 - 0.8), rtol=1e-6)


# the losses


class Model(torch.nn.Module):
    """A causal language model in float64 throughout, as Llama's is not: finite differences need it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 12)
        self.double()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token [T], given those before; 0 for the first."""
        seen = self.embed(token_ids).cumsum(0) / torch.arange(1, len(token_ids) + 1)[:, None]
        logits = self.head(torch.tanh(self.hidden(seen)) + self.embed(token_ids))
        found = torch.log_softmax(logits[:-1], -1).gather(1, token_ids[1:, None])[:, 0]
        return torch.cat([torch.zeros(1, dtype=found.dtype), found])


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """Along random directions of the weights, where nothing has been trained yet: there every policy gradient is that of
    - sum of weight x advantage x logprob, whatever its loss's own value is."""
    found, told = batch(7)
    asked, model, double = settings_of(name), Model(), torch.float64
    samples, _ = make_samples(found, asked, greedy_of(told), measure)
    gains = [torch.tensor(sample.advantages, dtype=double)[None] for sample in samples]
    masks = [torch.tensor(sample.loss_mask)[None] for sample in samples]
    weights = [mask.double() * sample.weight for mask, sample in zip(masks, samples, strict=True)]

    def logprobs() -> list[torch.Tensor]:
        return [model(torch.tensor(sample.token_ids, dtype=torch.long))[None] for sample in samples]

    losses = [
        asked.named_algorithm.loss(now, now.detach(), gain, mask, weight, asked.algorithm)[0]
        for now, gain, mask, weight in zip(logprobs(), gains, masks, weights, strict=True)
    ]
    gradient = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))

    @torch.no_grad()
    def value_at(direction: list[torch.Tensor], step: float) -> float:
        for one, way in zip(model.parameters(), direction, strict=True):
            one.add_(way, alpha=step)
        value = -sum((weight * gain * now).sum() for weight, gain, now in zip(weights, gains, logprobs(), strict=True))
        for one, way in zip(model.parameters(), direction, strict=True):
            one.sub_(way, alpha=step)
        return float(value)

    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = [torch.randn(one.shape, generator=rng, dtype=double) for one in gradient]
        slope = sum(float((one * way).sum()) for one, way in zip(gradient, direction, strict=True))
        step = 1e-5
        differences = (value_at(direction, step) - value_at(direction, -step)) / (2 * step)
        assert slope == pytest.approx(differences, rel=1e-5) and abs(slope) > 1e-4


# a critic, winners, pairs, a teacher


def gae(rewards: Array, values: Array, discount: float, factor: float) -> Array:
    """Schulman et al. 2015, eq. 16, as the sum it is."""
    deltas = rewards + discount * np.append(values[1:], 0.0) - values
    return np.array(
        [sum((discount * factor) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    )


@pytest.mark.parametrize("credit", ["rollout", "turn"])
@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.95, 0.0]))
@settings(max_examples=10)
def test_ppo_is_gae_over_the_tokens_or_the_turns(credit: str, seed: int, discount: float, factor: float) -> None:
    found, told = batch(seed)
    asked = settings_of("ppo", credit=credit, discount=discount, gae_lambda=factor)
    samples, _ = make_samples(found, asked, None, measure)
    rewards = dict(one for members in told.values() for one in members)
    raw, returns = {}, {}
    for name, calls in in_order(found).items():
        if credit == "turn":
            values = np.array([measured("values", call[0]) for call in calls])
            spread = np.repeat(np.arange(len(calls)), [len(call) for call in calls])
        else:
            values = measured("values", np.concatenate(calls))
            spread = np.arange(len(values))
        got = np.zeros(len(values))
        got[-1] = rewards[name]
        gained = gae(got, values, discount, factor)
        tokens = [float(np.float32(one)) for one in np.concatenate(calls)]
        raw[name] = dict(zip(tokens, gained[spread], strict=True))
        returns[name] = dict(zip(tokens, (gained + values)[spread], strict=True))
    every = np.concatenate([list(mine.values()) for mine in raw.values()])
    for name, mine in by_logprob(samples, "advantages").items():
        for token, value in mine.items():
            wanted = (raw[name][token] - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
            assert value == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    for name, mine in by_logprob(samples, "returns").items():
        assert mine == pytest.approx(returns[name], rel=1e-3, abs=1e-4)


def test_the_kl_in_the_reward() -> None:
    """Dr.GRPO's advantage of rewards less the sum over tokens of kl x (logprob - reference)."""
    found, told = batch(3)
    asked = settings_of("dr_grpo", kl=0.1, kl_in="reward")
    samples, _ = make_samples(found, asked, None, measure)
    calls = in_order(found)
    for members in told.values():
        scores = []
        for name, value in members:
            tokens = np.concatenate(calls.get(name, [np.zeros(0)]))
            scores.append(value - 0.1 * (tokens - measured("reference", tokens)).sum())
        for (name, _), score in zip(members, scores, strict=True):
            np.testing.assert_allclose(trained(samples, name), score - np.mean(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_sft_trains_the_winners_alone(threshold: float | None) -> None:
    found, told = batch(11)
    samples, metrics = make_samples(found, settings_of("sft", threshold=threshold))
    members = [one for group in told.values() for one in group]
    least = 0.75 if threshold is None else threshold  # the best of each group has 3/4
    winners = {name for name, value in members if value >= least}
    assert {sample.rollout_id for sample in samples} == winners & in_order(found).keys()
    assert all((trained(samples, name) == 1).all() for name in winners)
    assert sum(sample.weight * sample.loss_mask.sum() for sample in samples) == pytest.approx(1)
    assert metrics["rollouts_trained"] == len({sample.rollout_id for sample in samples})


def test_best_of_n_trains_no_group_that_is_all_alike() -> None:
    rollouts = [rollout("a", "g", 0.0), rollout("b", "g", 0.0)]
    assert make_samples(tables(rollouts, [call(one, 0, [1], [5]) for one in "ab"]), settings_of("sft"))[0] == []


@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0]))
@settings(max_examples=15)
def test_dpo_has_the_gradient_of_its_paper(seed: int, beta: float) -> None:
    found, told = batch(seed)
    samples, _ = make_samples(found, settings_of("dpo", beta=beta), None, measure)
    calls = {name: np.concatenate(tokens) for name, tokens in in_order(found).items()}
    now = {name: torch.tensor(measured("current", tokens), requires_grad=True) for name, tokens in calls.items()}
    margins, paired = [], set()
    for members in told.values():
        acted = [one for one in members if one[0] in calls]
        best, worst = max(acted, key=lambda one: one[1])[0], min(acted, key=lambda one: one[1])[0]
        if best == worst:
            continue
        gains = [now[name].sum() - measured("reference", calls[name]).sum() for name in (best, worst)]
        margins.append(beta * (gains[0] - gains[1]))
        paired |= {best, worst}
    assert {sample.rollout_id for sample in samples} == paired
    torch.stack([-torch.nn.functional.logsigmoid(margin) for margin in margins]).mean().backward()
    for name in paired:
        mine = [sample.weight * sample.advantages[sample.loss_mask] for sample in samples if sample.rollout_id == name]
        gradient = now[name].grad
        assert gradient is not None and len(np.concatenate(mine)) == len(gradient)
        np.testing.assert_allclose(-np.concatenate(mine), gradient.numpy(), rtol=1e-4, atol=1e-9)


def test_distillation_is_worth_what_the_teacher_finds_likelier() -> None:
    found, _ = batch(2)
    samples, _ = make_samples(found, settings_of("distill"), None, measure)
    assert {sample.rollout_id for sample in samples} == in_order(found).keys()
    for sample in samples:
        mine = sample.logprobs[sample.loss_mask]
        np.testing.assert_allclose(sample.advantages[sample.loss_mask], measured("reference", mine) - mine, rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_kl_in_the_reward_is_no_signal(name: str) -> None:
    """What is left of it by rounding would be scaled up to a spread of 1; and who acted alone is compared with nobody."""
    rollouts = [rollout(name, name[0], 1.0) for name in ("a1", "a2", "b1", "b2")]
    calls = [call(one, 0, [1], [5, 6]) for one in ("a1", "a2")] + [call("b1", 0, [1], [5], agent="helper")]
    samples, metrics = make_samples(tables(rollouts, calls), settings_of(name, kl=0.001, kl_in="reward"), None, measure)
    assert samples == [] and metrics["groups_flat"] == 2


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo"])
def test_who_acted_alone_in_a_group_has_no_advantage(name: str) -> None:
    """Also where groups without signal are kept."""
    rollouts = [rollout(name, "g", value) for name, value in {"a": 5.0, "b": 1.0}.items()]
    calls = [call("a", 0, [1], [5], agent="helper"), call("a", 1, [1], [5], first=1), call("b", 0, [1], [6])]
    samples, metrics = make_samples(tables(rollouts, calls), settings_of(name, drop_flat_groups=False))
    gains = {(one.agent, one.rollout_id): float(one.advantages[one.loss_mask][0]) for one in samples}
    assert gains["helper", "a"] == 0 and gains["main", "a"] > 0 > gains["main", "b"] and metrics["groups_flat"] == 0


def test_a_reward_of_a_call_that_is_not_trained() -> None:
    """Is of the calls before it, else nothing that is trained had a part in it."""
    rollouts = [rollout(name, "g", 0.0) for name in "ab"]
    calls = [
        call(name, place, [1] * place, [5, 6], first=2 * place, trainable=place != 1)
        for name in "ab"
        for place in (0, 1, 2)
    ]
    rewards = [reward(name, value, "main", 0, call_sequence=1) for name, value in {"a": 1.0, "b": 0.0}.items()]
    asked = settings_of("dr_grpo", credit="turn", horizon=4)
    samples, _ = make_samples(tables(rollouts, calls, rewards), asked)
    for name, value in {"a": 0.75, "b": -0.25}.items():  # of four rewards of mean 1/4; the last turn got 0
        np.testing.assert_allclose(trained(samples, name), [value - 0.25] * 2 + [-0.25] * 2, rtol=1e-6)
    first = [reward(name, value, "main", 0, call_sequence=0) for name, value in {"a": 1.0, "b": 0.0}.items()]
    calls = [call(name, 0, [1], [5], trainable=False) for name in "ab"] + [call(name, 1, [2], [6]) for name in "ab"]
    samples, metrics = make_samples(tables(rollouts, calls, first), asked)
    assert samples == [] and metrics["groups_flat"] == 1


# a user's own, and what is refused

OWN = """
from raygent.algorithms.loss import policy_loss as loss

DEFAULTS = {"clip_high": 0.5, "mini_batches": 2}
COMPARES_GROUPS = False


def advantages(episodes, settings):
    return (episodes.scores - 0.5)[:, None] * episodes.mask
"""


def test_an_algorithm_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    asked = config(algorithm={"name": "mine.py", "group_size": 1, "mini_batches": 1}, path=str(tmp_path / "train.toml"))
    assert (asked.algorithm.clip_high, asked.algorithm.mini_batches) == (0.5, 1)
    found, told = batch(5)
    samples, _ = make_samples(found, asked)
    for members in told.values():
        for name, value in members:
            np.testing.assert_allclose(trained(samples, name), value - 0.5)


@pytest.mark.parametrize(
    ("text", "what"),
    {
        "def advantages(episodes, settings): ...": "mine.py has no function loss",
        "import nothing_of_that_name": "mine.py cannot be imported: ModuleNotFoundError",
    }.items(),
)
def test_a_file_that_is_no_algorithm(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=what):
        algorithm("mine.py", tmp_path)


def test_advantages_of_another_shape_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.replace("[:, None] * episodes.mask", ""))
    asked = config(algorithm={"name": "mine.py"}, path=str(tmp_path / "train.toml"))
    with pytest.raises(ValueError, match=r"the advantages of mine\.py are float64 \[12\]; they must be"):
        make_samples(batch(5)[0], asked)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"name": "gropo"}, r"algorithm\.name: there is no 'gropo'; use one of grpo, "),
    "no file": ({"name": "mine.py"}, r"algorithm\.name: no file .*mine\.py; paths are relative to the TOML"),
    "critic": ({"advantage": "gae"}, r"algorithm\.advantage: gae: it needs a critic"),
    "no estimator": ({"advantage": "best"}, r"algorithm\.advantage: best: verl 0\.9\.1 has none of that name"),
    "turns": ({"name": "rloo", "credit": "turn"}, r"algorithm\.credit: rloo weighs whole rollouts"),
    "budget": ({"max_rollouts": 10}, r"algorithm\.max_rollouts: grpo takes as many as run\.steps x"),
    "refills": ({"name": "remax", "refills": 1}, r"algorithm\.refills: remax compares no groups"),
    "refills of its own": ({"name": "dapo", "advantage": "reinforce_plus_plus"}, r"refills: reinforce_plus_plus .* set algorithm\.refills=0"),
    "turns of verl's": ({"advantage": "reinforce_plus_plus", "credit": "turn"}, r"algorithm\.credit: .* leave algorithm\.advantage out"),
    "horizon": ({"name": "dr_grpo"}, r"algorithm\.horizon: .* set model\.max_tokens"),
    "buffer": ({"overlong_tokens": 5}, r"algorithm\.overlong_buffer: 0 is not within 1 and .* = 5"),
    "group": ({"name": "rloo", "group_size": 1}, r"algorithm\.group_size: rloo compares the rollouts"),
    "dpo's loss": ({"name": "dpo", "loss": "vanilla"}, r"algorithm\.loss: vanilla is not sound for dpo"),
    "dpo's steps": ({"name": "dpo", "mini_batches": 2}, r"algorithm\.mini_batches: 2 is not sound for dpo"),
    "sft's loss": ({"name": "sft", "loss": "vanilla"}, r"algorithm\.loss: vanilla is no cross-entropy"),
    "sft alone": ({"name": "sft", "group_size": 1}, r"algorithm\.threshold: missing"),
    "teacher": ({"name": "distill"}, r"algorithm\.teacher: missing"),
    "two references": ({"name": "distill", "teacher": "a", "kl": 0.1}, r"algorithm\.kl: distill has the teacher"),
    "own advantage": ({"name": "ppo", "advantage": "rloo"}, r"algorithm\.advantage: ppo has its own"),
    "greedy for nothing": ({"name": "remax", "advantage": "rloo"}, r"algorithm\.advantage: remax has its own"),
    "dpo's losers": ({"name": "dpo", "drop_flat_groups": False}, r"algorithm\.drop_flat_groups: False is not sound for dpo"),
    "sft's losers": ({"name": "sft", "drop_flat_groups": False}, r"algorithm\.drop_flat_groups: false would let sft"),
    "flat of ppo": ({"name": "ppo", "drop_flat_groups": False}, r"algorithm\.drop_flat_groups: false leaves the critic"),
    "teacher of others": ({"teacher": "other"}, r"algorithm\.teacher: grpo has none"),
    "k1": ({"kl": 0.1, "kl_kind": "k1"}, r"algorithm\.kl_kind: k1 has no gradient"),
    "k3": ({"kl": 0.1, "kl_in": "reward", "kl_kind": "k3"}, r"algorithm\.kl_kind: k3 in the reward has not the KL's gradient"),
    "no_ratio": ({"name": "gpg", "mini_batches": 4}, r"algorithm\.mini_batches: the loss gpg has no ratio"),
    "stale": ({"loss": "gpg", "staleness": 1}, r"algorithm\.staleness: the loss gpg has no ratio"),
    "opo_by_verl": ({"advantage": "opo", "staleness": 1}, r"algorithm\.staleness: the baseline of opo"),
    "opo": ({"name": "opo", "mini_batches": 4}, r"algorithm\.mini_batches: the baseline of opo"),
    "opo again": ({"name": "opo", "epochs": 2}, r"algorithm\.epochs: the baseline of opo"),
    "gpg again": ({"name": "gpg", "epochs": 2}, r"algorithm\.epochs: the loss gpg has no ratio"),
    "dpo again": ({"name": "dpo", "epochs": 2}, r"algorithm\.epochs: 2 is not sound for dpo"),
    "kl of turns": ({"kl": 0.1, "kl_in": "reward", "credit": "turn"}, r'algorithm\.kl_in: credit = "turn"'),
    "kl of sft": ({"name": "sft", "kl": 0.1, "kl_in": "reward"}, r"algorithm\.kl_in: sft is not made of rewards alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_weighed_is_refused(case: str) -> None:
    asked, what = REFUSED[case]
    with pytest.raises(ValueError, match=what):
        config(algorithm=asked)


@pytest.mark.parametrize(
    ("asked", "clip"),
    [
        ({"loss": "gspo"}, (3e-4, 4e-4)),
        ({"loss": "cispo"}, (1.0, 4.0)),
        ({"name": "gspo", "loss": "vanilla"}, (0.2, 0.2)),
        ({"name": "gspo", "loss": "cispo", "clip_low": 0.5}, (0.5, 4.0)),
        ({"name": "dapo", "loss": "vanilla"}, (0.2, 0.28)),
        ({"name": "gspo"}, (3e-4, 4e-4)),
    ],
)
def test_a_loss_brings_its_own_clip_range(asked: dict[str, Any], clip: tuple[float, float]) -> None:
    settings = config(algorithm=asked).algorithm
    assert (settings.clip_low, settings.clip_high) == clip


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_rounding_makes_no_winner(name: str) -> None:
    found, _ = batch(1, groups=1)
    place = found["rollouts"].schema.get_field_index("reward")
    found["rollouts"] = found["rollouts"].set_column(place, "reward", pa.array([0.1 + 0.2, 0.3, 0.3, 0.3]))
    samples, metrics = make_samples(found, config(algorithm={"name": name, "group_size": 4}))
    assert not samples and metrics["groups"] == 1
