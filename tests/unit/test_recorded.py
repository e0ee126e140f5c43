"""Batches that were recorded before: another run's rollouts, and chats, token by token."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversations import config
from stores import crash, open_store, rollout, run_attempt
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from raygent.algorithms.batch import make_samples
from raygent.config import ConfigError
from raygent.data_files import load_tasks
from raygent.jobs import check
from raygent.jobs.recorded import batch_of, check_chats, check_rollouts, read_chats
from raygent.records import REWARDS, Reward, to_batch

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    {
        "messages": [
            {"role": "system", "content": "count"},
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "ü"}], "agent": "writer"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


def chats_config(model: Path, folder: Path, rows: list[Any] = CHATS, **more: Any) -> Any:
    folder.mkdir(exist_ok=True)
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm = {"name": "sft", "tasks_per_step": 3} | more.pop("algorithm", {})
    return config(model={"path": str(model)} | more, data={"chats": str(file)}, algorithm=algorithm)


def test_chats_are_trained_on_what_the_assistant_says(model: Path, tmp_path: Path) -> None:
    asked = chats_config(model, tmp_path)
    samples, metrics = make_samples(batch_of(asked, 0), asked)
    tokenizer = AutoTokenizer.from_pretrained(model)
    told = sorted(tokenizer.decode(sample.token_ids[sample.loss_mask]) for sample in samples)
    end = tokenizer.eos_token
    assert told == sorted([f"two{end}", f"2{end}4{end}", f"ü{end}"]) and metrics["rollouts_trained"] == 3
    for sample in samples:
        assert (sample.advantages[sample.loss_mask] == 1).all() and (
            sample.policy_versions[sample.loss_mask] == -1
        ).all()
    every = sum(int(sample.loss_mask.sum()) for sample in samples)
    assert all(sample.weight == pytest.approx(1 / every) for sample in samples)


def test_agents_that_are_not_trained_are_left_out(model: Path, tmp_path: Path) -> None:
    asked = chats_config(model, tmp_path)
    asked.agent.train = ["writer"]
    (sample,) = make_samples(batch_of(asked, 0), asked)[0]
    assert sample.agent == "writer"


def test_all_chats_are_seen_in_each_epoch(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}]} for n in range(7)
    ]
    asked = chats_config(model, tmp_path, rows, algorithm={"tasks_per_step": 2, "group_size": 2})
    seen = [name for step in range(7) for name in batch_of(asked, step)["rollouts"]["rollout_id"].to_pylist()]
    assert sorted(seen[:7]) == sorted(seen[7:]) == [f"chat-{n:06d}" for n in range(7)]
    assert batch_of(asked, 3)["calls"].equals(batch_of(asked, 3)["calls"])


def test_chats_from_parquet(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(CHATS[:1]), tmp_path / "chats.parquet")
    assert [row["messages"] for _, row in read_chats(str(tmp_path / "chats.parquet"))] == [CHATS[0]["messages"]]


def test_objects_from_parquet_have_their_own_keys(tmp_path: Path) -> None:
    """Arrow gives those of a column each other's."""
    calls = [
        {"function": {"name": "a", "arguments": {"city": "Paris"}}},
        {"function": {"name": "b", "arguments": {"n": 1}}},
    ]
    chat = {"messages": [CHATS[0]["messages"][0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    pq.write_table(pa.Table.from_pylist([chat]), tmp_path / "chats.parquet")
    assert [row for _, row in read_chats(str(tmp_path / "chats.parquet"))] == [chat]
    row = {"id": "1", "input": {"a": None}, "private": [{"name": "Bob", "age": None}]}  # of tasks a null may be meant
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "tasks.parquet")
    (task,) = load_tasks(tmp_path / "tasks.parquet")
    assert (task.input, task.private) == (row["input"], row["private"])


def talk(**first: Any) -> dict[str, Any]:
    """A chat whose first message is another one."""
    return {"messages": [CHATS[0]["messages"][0] | first, CHATS[0]["messages"][1]]}


WRONG: dict[str, tuple[Any, str]] = {
    "no messages": ({"text": "a"}, r'line 1 needs "messages"'),
    "no list": ({"messages": "a"}, r'line 1 needs "messages"'),
    "unknown": ({"messages": CHATS[0]["messages"], "id": 1}, r"line 1 has 'id'; a chat has agent, messages, tools"),
    "nothing said": ({"messages": CHATS[0]["messages"][:1]}, "line 1 has no message of the assistant"),
    "no name": ({"messages": CHATS[0]["messages"], "agent": 5}, 'line 1 has "agent": 5; write its name as text'),
    "empty": (
        {"messages": [*CHATS[0]["messages"][:1], {"role": "assistant"}]},
        "line 1: message 2 of the assistant says",
    ),
    "greeting alone": (
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        "line 1 has no message of the assistant",
    ),
    "no role": ({"messages": [{"content": "a"}]}, r'line 1 needs "messages"'),
    "another role": (talk(role="human"), "line 1: message 1 has the role 'human'; there are system, developer, user,"),
    "a list for a role": (talk(role=["user"]), r"line 1: message 1 has the role \['user'\]"),
    "nothing asked": (talk(content=None), "line 1: message 1 of the user has the content None; give a text, or parts"),
    "a number": (talk(content=5), "line 1: message 1 of the user has the content 5"),
    "an image": (talk(content=[{"type": "image_url"}]), "line 1: message 1 of the user has the content .*image_url"),
    "half a pair": (talk(content="\ud83d"), "line 1: message 1 holds half of a surrogate pair"),
    "a call without a function": (
        {"messages": [CHATS[0]["messages"][0], {"role": "assistant", "tool_calls": [{"name": "a"}]}]},
        "line 1: message 2: its tool_calls are no list",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_chat_is_told_with_its_line(model: Path, tmp_path: Path, case: str) -> None:
    row, what = WRONG[case]
    with pytest.raises(ConfigError, match=what):
        batch_of(chats_config(model, tmp_path, [row]), 0)


def test_a_template_that_leaves_out_a_role_is_told(model: Path, tmp_path: Path) -> None:
    template = (
        "{% for one in messages %}{% if one.role != 'tool' %}{{ one.role }}: {{ one.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    told = {"messages": [*CHATS[0]["messages"], {"role": "tool", "content": "3"}, CHATS[0]["messages"][1]]}
    for row, what in ((CHATS[0], ""), (told, "the chat template leaves out what the role tool says")):
        asked = chats_config(model, tmp_path, [row], chat_template=str(tmp_path / "template.jinja"))
        with pytest.raises(ConfigError, match=what) if what else nullcontext():
            check_chats(asked, 1000)
        read_chats.cache_clear()


def test_a_text_in_parts_is_one_text(model: Path, tmp_path: Path) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    whole, cut = (
        batch_of(chats_config(model, tmp_path / name, [row]), 0)["calls"]
        for name, row in (("a", CHATS[0]), ("b", {"messages": parts}))
    )
    assert cut.equals(whole)


def test_a_chat_that_is_too_long_is_told(model: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b"}]}
    asked = chats_config(model, tmp_path, [CHATS[0], long])
    check_chats(asked, 2048)
    with pytest.raises(ConfigError, match=r"line 2: \d+ tokens, and the model takes 64"):
        check_chats(asked, 64)


def test_a_chat_of_an_agent_that_is_not_trained_is_told(model: Path, tmp_path: Path) -> None:
    asked = chats_config(model, tmp_path)
    asked.agent.train = ["writer"]
    with pytest.raises(ConfigError, match=r"line 1: agent\.train and agent\.policies leave out its agent, 'agent'"):
        check_chats(asked, 2048)


def test_fewer_chats_than_a_step_takes_are_each_trained_once(model: Path, tmp_path: Path) -> None:
    asked = chats_config(model, tmp_path, algorithm={"tasks_per_step": 8, "group_size": 2})
    samples, _ = make_samples(batch_of(asked, 0), asked)
    assert len(samples) == len(CHATS)


def test_a_template_that_does_not_go_on_is_told(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}now:{% endif %}"
    )
    with pytest.raises(ConfigError, match="line 1: message 2 is rendered otherwise"):
        batch_of(chats_config(model, tmp_path, CHATS[:1], chat_template=str(template)), 0)


def test_a_teacher_with_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(model, other)
    asked = config(model={"path": str(model)}, algorithm={"name": "distill", "teacher": str(other), "group_size": 2})
    check._check_teacher(asked)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))  # written otherwise, it is the same
    check._check_teacher(asked)
    one, two = sorted(tokenizer["model"]["vocab"])[-2:]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"algorithm\.teacher: .* has another tokenizer"):
        check._check_teacher(asked)
    (other / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"algorithm\.teacher: .* has no config\.json"):
        check._check_teacher(asked)


# another run's rollouts


@pytest.mark.parametrize("rolled", [False, True], ids=["in the log", "in Parquet"])
async def test_another_runs_winners_are_trained(tmp_path: Path, rolled: bool) -> None:
    """Two groups of two, of which the second each has the better reward."""
    store = open_store(tmp_path / "first" / "store")
    await store.add_rollouts([rollout(number) for number in range(4)] + [rollout(4, mode="eval")])
    for lease in await store.lease("worker", 5):
        await run_attempt(store, lease, reward=float(lease.rollout.index))
    if rolled:
        await store.roll()
    crash(store)
    asked = config(
        data={"rollouts": str(tmp_path / "first")}, algorithm={"name": "sft", "tasks_per_step": 1, "group_size": 2}
    )
    trained = [make_samples(batch_of(asked, step), asked)[0] for step in range(2)]
    assert sorted(samples[0].rollout_id for samples in trained) == ["r1", "r3"]
    for sample in (sample for samples in trained for sample in samples):
        assert (
            sample.token_ids[sample.loss_mask].tolist()[0] == 3
            and (sample.policy_versions[sample.loss_mask] == -1).all()
        )


async def test_recorded_rollouts_that_nothing_can_be_trained_of_are_told(tmp_path: Path) -> None:
    store = open_store(tmp_path / "first" / "store")
    await store.add_rollouts([rollout(0)])
    (lease,) = await store.lease("worker", 1)
    await store.append("rewards", to_batch(REWARDS, [Reward("r0", 1, "x", 0, 250.0, "speed", "{}", "agent")]))
    await run_attempt(store, lease, reward=0.5)
    crash(store)

    def asked(threshold: float, train: str) -> Any:
        algorithm = {"name": "sft", "tasks_per_step": 2, "group_size": 1, "threshold": threshold}
        return config(
            data={"rollouts": str(tmp_path / "first")}, algorithm=algorithm, agent={"run": "a:b", "train": [train]}
        )

    check_rollouts(asked(0.5, "*"))
    with pytest.raises(ConfigError, match=r"algorithm\.threshold: 0\.75, and the best reward in .* is 0\.5"):
        check_rollouts(asked(0.75, "*"))
    with pytest.raises(ConfigError, match=r"agent\.train: names none of the agents that .* has recorded, agent;"):
        check_rollouts(asked(0.5, "writer"))


def test_a_run_without_rollouts_is_told(tmp_path: Path) -> None:
    crash(open_store(tmp_path / "first" / "store"))
    asked = config(data={"rollouts": str(tmp_path / "first")}, algorithm={"name": "dpo"})
    with pytest.raises(ConfigError, match="has no rollouts of training that ended"):
        batch_of(asked, 0)


def test_only_what_learns_from_others_takes_recorded_rollouts() -> None:
    with pytest.raises(ValueError, match=r"data\.rollouts: grpo learns from what its own policy samples"):
        config(data={"rollouts": "runs/first"})
    with pytest.raises(ValueError, match=r"data\.chats: dpo needs rewards"):
        config(data={"chats": "chats.jsonl"}, algorithm={"name": "dpo"})
    for key, value in (("threshold", 2.0), ("overlong_tokens", 2)):
        with pytest.raises(ValueError, match=rf"algorithm\.{key}: .*chats .*leave it out"):
            config(data={"chats": "chats.jsonl"}, algorithm={"name": "sft", key: value, "overlong_buffer": 1})
    with pytest.raises(ValueError, match=r"data\.chats: given beside data\.rollouts"):
        config(data={"chats": "chats.jsonl", "rollouts": "runs/first"}, algorithm={"name": "sft"})
    with pytest.raises(ValueError, match=r"data\.train: missing"):
        config(data={})


def test_a_greeting_is_read_and_not_trained(model: Path, tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "hello"}
    asked = chats_config(model, tmp_path, [{"messages": [greeting, *CHATS[0]["messages"][:2]]}])
    check_chats(asked, 2048)
    (sample,) = make_samples(batch_of(asked, 0), asked)[0]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert "hello" in tokenizer.decode(sample.token_ids)
    assert "hello" not in tokenizer.decode(sample.token_ids[sample.loss_mask])
