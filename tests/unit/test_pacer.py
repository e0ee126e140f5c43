import numpy as np
import pyarrow as pa
import pytest

from raygent.cluster.digests import evaluation_digest
from raygent.cluster.pacer import (
    Versions,
    drop_stale,
    eval_rollouts,
    refill_rollouts,
    steps_to_admit,
    train_rollouts,
)
from raygent.config import Upstream, load
from raygent.records import SCHEMAS, Task


@pytest.fixture
def config(tmp_path):
    (tmp_path / "agent.py").write_text("def answer(task, model): return 1.0")
    (tmp_path / "tasks.jsonl").write_text('{"id": "1", "input": "x"}\n')
    (tmp_path / "c.toml").write_text(
        '[model]\npath = "a/b"\n[agent]\nrun = "agent.py:answer"\n[data]\ntrain = "tasks.jsonl"\n'
        "[algorithm]\ntasks_per_step = 3\ngroup_size = 2\nstaleness = 1\n[run]\nsteps = 4\n"
    )
    return load(tmp_path / "c.toml")


def test_data_order_covers_each_epoch_and_depends_on_seed_and_step_alone(config):
    tasks = [Task(str(number), number) for number in range(7)]
    steps = [train_rollouts(config, tasks, step, 0, {}) for step in range(7)]
    assert steps[3] == train_rollouts(config, tasks, 3, 0, {})
    order = [rollout.task_id for step in steps for rollout in step if rollout.index == 0]
    for epoch in range(3):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == [task.id for task in tasks]
    assert order[:7] != order[7:14]
    ids = [rollout.rollout_id for step in steps for rollout in step]
    assert len(set(ids)) == len(ids) == 7 * 3 * 2


def test_refills_are_other_groups_of_the_same_step(config):
    tasks = [Task(str(number), number) for number in range(7)]
    first, again = refill_rollouts(config, tasks, 2, 5, 1, 3, {}), refill_rollouts(config, tasks, 2, 5, 2, 3, {})
    assert first == refill_rollouts(config, tasks, 2, 5, 1, 3, {})
    assert len({rollout.group_id for rollout in [*first, *again, *train_rollouts(config, tasks, 2, 5, {})]}) == 9
    assert {(rollout.step, rollout.mode, rollout.resource_version) for rollout in first} == {(2, "train", 5)}
    assert len({rollout.task_id for rollout in first}) == 3
    had = {rollout.task_id for rollout in train_rollouts(config, tasks, 2, 5, {})}
    others = {rollout.task_id for rollout in refill_rollouts(config, tasks, 2, 5, 1, 30, {})}
    assert others == {task.id for task in tasks} - had


def test_remax_has_a_greedy_rollout_in_each_group(config):
    config.algorithm.name = "remax"
    rollouts = train_rollouts(config, [Task("a", 1), Task("b", 2)], 0, 0, {})
    greedy = [rollout for rollout in rollouts if rollout.mode == "greedy"]
    assert [rollout.index for rollout in greedy] == [2] * 3 and len(rollouts) == 9
    assert {rollout.group_id for rollout in greedy} == {rollout.group_id for rollout in rollouts}
    assert len({rollout.rollout_id for rollout in rollouts}) == 9


def test_eval_runs_each_task(config):
    rollouts = eval_rollouts(config, [Task("a", 1), Task("b", 2)], 5, 9)
    assert [(rollout.task_id, rollout.resource_version) for rollout in rollouts] == [("a", 9), ("b", 9)]
    edited = eval_rollouts(config, [Task("a", 1), Task("b", 2, "gold")], 5, 9)
    assert [one.rollout_id == two.rollout_id for one, two in zip(rollouts, edited, strict=True)] == [True, False]


def test_a_program_that_a_shell_runs_is_looked_at_too(config):
    config.agent.run, config.agent.command = None, ["sh", "-c", 'exec node agent.mjs "$RAYGENT_TASK"']
    (config.folder / "agent.mjs").write_text("one")
    before = evaluation_digest(config)
    assert before == evaluation_digest(config)
    (config.folder / "agent.mjs").write_text("two")
    assert before != evaluation_digest(config)


@pytest.mark.parametrize("change", ["agent", "command", "limit", "judge", "engine", "upstream"])
def test_what_another_outcome_may_come_of_is_another_evaluation(config, change):
    (before,) = eval_rollouts(config, [Task("a", 1)], 5, 9, None, evaluation_digest(config))
    assert before == eval_rollouts(config, [Task("a", 1)], 5, 9, None, evaluation_digest(config))[0]
    if change == "agent":
        (config.folder / "agent.py").write_text("def answer(task, model): return 2.0")
    elif change == "command":
        config.agent.command = ["python", "agent.py"]
    elif change == "engine":
        config.engine.continuation = "exact"
    elif change == "limit":
        config.model.max_tokens = 5
    elif change == "judge":
        config.grader.failed_reward = -1.0
    else:
        config.upstream = {"big": Upstream(agents=["*"], base_url="http://127.0.0.1/v1", model="big")}
    (after,) = eval_rollouts(config, [Task("a", 1)], 5, 9, None, evaluation_digest(config))
    assert after.rollout_id != before.rollout_id and after.task_id == before.task_id


def test_admission_is_bounded_by_staleness_and_the_last_step(config):
    assert list(steps_to_admit(config, 0)) == [0, 1]
    assert list(steps_to_admit(config, 3)) == [3]


def test_a_version_is_never_given_twice(tmp_path):
    versions = Versions(tmp_path)
    assert [versions.issue(1), versions.issue(2), versions.issue(3)] == [1, 2, 3]
    resumed = Versions(tmp_path)  # back at a checkpoint of step 1
    assert resumed.issue(2) == 4
    assert (resumed.at(0), resumed.at(1), resumed.at(2)) == (0, 1, 4)
    assert resumed.steps_of(np.array([0, 1, 4])).tolist() == [0, 1, 2]


def test_stale_rollouts_are_left_out_of_every_table():
    def table(name, **columns):
        rows = len(columns["rollout_id"])
        return pa.table({field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in SCHEMAS[name]})

    calls = table(
        "calls", rollout_id=["r1", "r1", "r2"], policy_versions=pa.array([[3, 4], [4], [2, 4]], pa.list_(pa.int32()))
    )
    tables = {"rollouts": table("rollouts", rollout_id=["r1", "r2"]), "calls": calls}
    fresh, stale = drop_stale(tables, 3)
    assert stale == ["r2"]
    assert fresh["rollouts"]["rollout_id"].to_pylist() == ["r1"] and len(fresh["calls"]) == 2
    assert drop_stale(tables, 2) == (tables, [])


@pytest.mark.parametrize("torn", ['{"version": 2, "st', '{"version": 2, "step": 2}'])
def test_a_torn_line_of_versions_is_taken_away(tmp_path, torn):
    Versions(tmp_path).issue(1)
    with (tmp_path / "versions.jsonl").open("a") as file:
        file.write(torn)
    assert Versions(tmp_path).issue(2) == 2
    assert Versions(tmp_path).at(2) == 2
