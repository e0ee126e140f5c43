"""What a run tells of itself, and what it evaluates when."""

import json
from contextlib import nullcontext

import pyarrow as pa
import pytest
from conversations import call, config, rollout, tables
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from raygent.actors.checkpoint import checkpoint_to_evaluate
from raygent.algorithms.batch import make_samples
from raygent.algorithms.prompt_search import Tree
from raygent.cluster.failures import failures_to_tell, why_lost
from raygent.cluster.metrics import (
    RunLog,
    best_step,
    choice_metrics,
    evaluation_line,
    held_out,
    mismatch,
    read_lines,
    seconds_by_part,
)
from raygent.config import ConfigError
from raygent.jobs.evaluate import evaluate, summarise, tasks_due
from raygent.records import ATTEMPTS, Task


def evaluation(step: int, **by_task: float) -> dict:
    return {"step": step, "by_task": by_task, "several_calls_reward": 0.0, "several_calls_share": 0.0}


def test_a_gain_needs_two_evaluations():
    assert held_out([]) == held_out([evaluation(0, a=0.5)]) == {}
    found = held_out([evaluation(0, a=0.5, b=0.0), evaluation(9, a=1.0, b=0.5)])
    assert (found["n"], found["before"], found["after"], found["gain"]) == (2, 0.25, 0.75, 0.5)


def test_failures_that_change_the_gain_are_told(log, capsys):
    log.wandb.summary, log.wandb.finish = {}, lambda: None
    log.step(0, {"reward": 0.5, "groups": 4.0, "groups_flat": 0.0, "tokens_sampled": 80.0, "tokens_trained": 8.0})
    slow = tables([rollout("a", "a", 1.0), rollout("b", "b", 0.0) | {"outcome": "timeout"}], [])
    well = tables([rollout("c", "a", 1.0), rollout("d", "b", 1.0)], [])
    for step, told in ((0, slow), (1, well)):
        log.evaluation(step, told, summarise(told))
    counts = {name: 0 for name in ("asked", "succeeded", "retried", "lost", "trained")}
    log.finish({"rollouts": counts, "seconds": {}, "policy_version": 1})
    assert "of its rollouts failed: 1 timeout before, none after; they count" in capsys.readouterr().out


def test_the_seconds_are_the_whole_runs():
    rows = [
        {"step": 0, "seconds/start": 5.0, "seconds/learn": 1.0, "seconds/step": 9.0, "push_seconds": 1.0},
        {"step": 1, "seconds/start": 6.0, "seconds/learn": 2.0, "seconds/step": 9.0},  # by a second process
    ]
    assert seconds_by_part(rows, {"evaluate": 0.5}) == {"start": 11.0, "learn": 3.0, "evaluate": 0.5}


def test_a_step_without_a_mismatch_is_left_out_of_the_mean():
    told = {"mismatch_mean": 0.25, "mismatch_p99": 1.0, "mismatch_max": 2.0}
    assert mismatch([told, {"loss": 0.0}]) == {"mean": 0.25, "p99": 1.0, "max": 2.0}
    assert mismatch([{"loss": 0.0}]) == {}


def test_a_batch_counts_all_tokens_but_compares_like_with_like():
    rollouts = [rollout(name, name[0], 1.0) | {"attempts": 2} for name in ("a0", "a1", "b0")]
    calls = [call(name, turn, [1], [5, 5], agent=agent) for name, turn, agent in [
        ("a0", 0, "main"), ("a0", 1, "judge"), ("a1", 0, "main"), ("b0", 0, "main"), ("b0", 1, "main")
    ]]  # fmt: skip
    _, metrics = make_samples(tables(rollouts, calls), config(agent={"run": "agent:run", "train": ["main"]}))
    assert metrics["tokens_sampled"] == 10  # the judge's and the dropped group's too
    assert metrics["turns"] == 1.5  # of group a
    assert metrics["attempts_not_won"] == 3


def test_a_step_tells_the_reward_and_the_share_of_each_file():
    tasks = [
        Task("a", 1, None, "easy"),
        Task("b", 2, None, "easy"),
        Task("c", 3, None, "hard"),
        Task("d", 4, None, "rest"),
    ]
    rows = [
        rollout(f"{group}{n}", group, r)
        for group, rewards in {"a": [1, 0], "c": [0, 0.5], "b": [1]}.items()
        for n, r in enumerate(rewards)
    ]
    rows.append(rollout("c2", "c", None, "lost"))
    several = config(data={"train": ["easy.jsonl", "hard.jsonl", "rest.jsonl"]})
    assert choice_metrics(several, tasks, tables(rows, [])["rollouts"], {}) == {
        "sources/easy/share": 0.6, "sources/easy/reward": pytest.approx(2 / 3),
        "sources/hard/share": 0.4, "sources/hard/reward": 0.25, "sources/rest/share": 0.0,
    }  # fmt: skip
    assert choice_metrics(config(), tasks, tables(rows, [])["rollouts"], {}) == {}


def test_a_step_tells_whether_the_curriculum_chose_well():
    tasks = [Task(name, 1) for name in "abcd"]
    measured = {"a": [[0.0, 1.0]], "b": [[1.0, 1.0]]}  # variances 0.5 and 0: the mean is 0.25
    rows = [rollout(f"a{n}", "a", reward) for n, reward in enumerate([0.0, 0.0, 1.0])]
    told = choice_metrics(
        config(data={"train": "x", "curriculum": True}), tasks, tables(rows, [])["rollouts"], measured
    )
    a, b = (0.5 + 2 * 0.25) / 3, 2 * 0.25 / 3
    assert told == {
        "curriculum/unseen": 0.5, "curriculum/variance_of_all": pytest.approx((a + b + 0.5) / 4),
        "curriculum/variance_expected": pytest.approx(a), "curriculum/variance_found": pytest.approx(1 / 3),
    }  # fmt: skip


class FakeWandb:
    """W&B needs its own process, minutes for nothing here."""

    def __init__(self):
        self.rows, self.alerts = [], []

    def log(self, row):
        self.rows.append(row)

    def alert(self, title, text):
        self.alerts.append(title)


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLog, "_start_wandb", lambda self: FakeWandb())
    return RunLog(config(run={"directory": str(tmp_path)}, model={"path": str(make_tiny_model(tmp_path / "model"))}))


def test_a_collapse_is_told_once_and_while_it_stands(log, capsys):
    """Of the first steps and the last, also where the run goes on in another process."""
    for step in range(30):
        if step == 20:
            log.resume(20)
        log.step(step, {"entropy": 1.0 if step < 15 else 0.01})
    assert capsys.readouterr().out.count("ALARM entropy was 1 and is ") == 1
    assert log.wandb.alerts == ["raygent: entropy"]
    standing = [row["step"] for row in log.wandb.rows if row["alarm/entropy"]]
    assert standing == list(range(20, 31))  # from the step on that makes five of them
    assert [row["entropy"] for row in log.ends] == [1.0] * 5 + [0.01] * 5


def test_an_evaluation_tells_by_how_much_training_is_ahead(log):
    for step in range(8):
        log.step(step, {"reward": 0.25 if step < 3 else 0.75})
    tasks = ended(1.0, 0.0)
    log.evaluation(8, tasks, summarise(tasks))
    assert read_lines(log.evaluations)[0]["gap"] == pytest.approx(0.25)
    assert log.wandb.rows[-1]["eval/gap"] == pytest.approx(0.25)


def test_the_line_of_an_evaluation_has_intervals_and_failures():
    rows = [rollout(f"r{n}", f"t{n // 2}", float(n == 0)) for n in range(4)]
    rows[3] |= {"status": "failed", "outcome": "timeout"}
    summary = summarise(tables(rows, []))
    assert (summary["reward"], summary["pass@2"]) == (0.25, 0.5)
    assert evaluation_line(7, summary) == (
        "evaluation at step 7: reward 0.250 [0.000, 0.500] on 2 tasks; 0% of the rollouts made more than one call; "
        "pass@1 0.250 [0.000, 0.500]; pass@2 0.500 [0.000, 1.000]; failed: 1 timeout"
    )


def test_the_best_and_the_worst_rollouts_of_an_evaluation_are_shown_with_what_was_said(log):
    rewards = [None, *[n / 20 for n in range(20)], None]
    rows = [rollout(f"r{n}", f"r{n}", reward) for n, reward in enumerate(rewards)]
    asked = [{"role": "user", "content": "Say a word."}]
    made = [call("r20", 0, [5], [6, 7], agent="writer"), call("r20", 1, [5, 6, 7, 8], [9], agent="writer")]
    made[0].request = json.dumps({"messages": asked})
    made[1].request = json.dumps({"messages": [*asked, {"role": "assistant", "content": "hm"}]})
    log.evaluation(0, tables(rows, made), summarise(tables(rows, made)))
    shown = log.wandb.rows[-1]["eval/rollouts"]
    told = [row[0] for row in shown.data]
    assert told == [f"r{n}" for n in (20, 19, 18, 17, 16, 5, 4, 3, 2, 1)]
    reply = AutoTokenizer.from_pretrained(log.config.model.path).decode([9], skip_special_tokens=True)
    transcript = shown.data[0][shown.columns.index("transcript")]
    assert transcript == f"[conversation]\nuser: Say a word.\nassistant: hm\nassistant: {reply}"


def test_the_tree_of_prompts_is_told(log):
    tree = Tree({"writer": "Write."})
    tree.grow(tree.first, "writer", "Write SQL.", "apo", 0, "It says too little.")
    log.prompts(tree.rows(tree.first))
    shown = log.wandb.rows[-1]["prompts"]
    texts, parents = ([row[shown.columns.index(name)] for row in shown.data] for name in ("text", "parents"))
    assert texts == ["Write.", "Write SQL."] and parents == ["[]", "[0]"]


@pytest.mark.parametrize("chosen", [None, 0, 2, 4, "best", 3])
def test_the_checkpoint_that_is_evaluated(tmp_path, chosen):
    settings = config(run={"directory": str(tmp_path)}, evaluate={"checkpoint": chosen})
    root = settings.run_directory / "checkpoints"
    for step in (2, 4):
        (root / f"step-00000{step}").mkdir(parents=True)
        (root / f"step-00000{step}" / "raygent.json").write_text(json.dumps({"step": step, "version": step}))
    (root / "best").symlink_to("step-000002")
    if chosen == 3:
        with pytest.raises(ConfigError, match=r"evaluate\.checkpoint: .* has no checkpoint 3; it has those of 2, 4"):
            checkpoint_to_evaluate(settings)
    else:
        found = checkpoint_to_evaluate(settings)
        assert (found and found.step) == {None: 4, 0: None, "best": 2}.get(chosen, chosen)


def test_a_damaged_checkpoint_is_told(tmp_path):
    settings = config(run={"directory": str(tmp_path)})
    folder = settings.run_directory / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    for text in ('{"step": 2', '{"step": 2}', None):
        if text:
            (folder / "raygent.json").write_text(text)
        else:
            (folder / "raygent.json").unlink()
        with pytest.raises(
            ConfigError, match=r"run\.name: .*step-000002 is damaged, .* go on from the checkpoint before"
        ):
            checkpoint_to_evaluate(settings)


def ended(*rewards: float | None) -> dict:
    """An evaluation's tables: a task a reward, None of one that infrastructure lost."""
    return tables([rollout(str(n), str(n), reward) for n, reward in enumerate(rewards)], [])


def test_an_evaluation_that_lost_all_is_told_and_not_counted(log, capsys):
    lost = ended(None, None)
    log.evaluation(0, lost, summarise(lost))
    assert "lost all" in capsys.readouterr().out
    assert read_lines(log.evaluations) == []


def test_an_evaluation_tells_of_failures(log, capsys):
    told = tables([rollout("a", "a", 1.0), rollout("b", "b", 0.0) | {"outcome": "timeout"}], [])
    log.evaluation(0, told, summarise(told))
    out = capsys.readouterr().out
    assert out.endswith("0% of the rollouts made more than one call; failed: 1 timeout\n")
    assert read_lines(log.evaluations)[0]["failed/timeout"] == 1


def test_what_the_newest_error_of_a_kind_said_is_told_once():
    rows = [
        ("a", "succeeded", "", 1.0),
        ("b", "agent_error", "Traceback\nKeyError: 'x'", 3.0),
        ("c", "agent_error", "old", 2.0),
    ]
    attempts = [
        dict.fromkeys(ATTEMPTS.names) | dict(zip(("rollout_id", "outcome", "error", "finished"), row, strict=True))
        for row in rows
    ]
    found = tables([rollout(row[0], "a", 0.0) for row in rows], []) | {
        "attempts": pa.Table.from_pylist(attempts, ATTEMPTS)
    }
    gone = dict.fromkeys(ATTEMPTS.names) | {"rollout_id": "d", "outcome": "upstream_lost", "finished": 4.0}
    assert why_lost(found) == ""
    lost = found | {"lost": pa.Table.from_pylist([gone | {"error": "upstream.judge: HTTP 500"}], ATTEMPTS)}
    assert why_lost(lost) == "upstream_lost: upstream.judge: HTTP 500"
    assert "upstream_lost: 1 of 3 rollouts, the newest: upstream.judge: HTTP 500 (" in failures_to_tell(lost, set())[1]
    told = set()
    (line,) = failures_to_tell(found, told)
    assert line.startswith("agent_error: 2 of 3 rollouts, the newest: KeyError: 'x' (")
    assert told == {"agent_error"} and failures_to_tell(found, told) == []


def test_an_evaluation_counts_what_it_has(log):
    some = ended(1.0, None, 0.0)
    log.evaluation(0, some, summarise(some))
    (row,) = read_lines(log.evaluations)
    assert (row["reward"], list(row["by_task"].values())) == (0.5, [1.0, 0.0])


def test_branches_and_continued_calls_are_counted_by_agent():
    """A branch of the judge's, which is not trained, is its own; of the trained writer two of three later calls go on."""
    made = [
        call("a0", 0, [1], [2], agent="writer"),
        call("a0", 1, [1, 2, 3], [4], agent="writer"),
        call("a0", 2, [9], [4], agent="writer"),
        call("a0", 3, [1], [5], agent="judge"),
        call("a0", 4, [7], [5], agent="judge"),
        call("a1", 0, [1], [2], agent="writer"),
        call("a1", 1, [1, 2, 3], [4], agent="writer"),
    ]
    made[1].own_tokens, made[6].own_tokens = 2, 0
    settings = config(agent={"run": "agent:run", "train": ["writer"]})
    rollouts = [rollout("a0", "a", 1.0), rollout("a1", "a", 0.0)]
    _, metrics = make_samples(tables(rollouts, made), settings)
    told = {name: value for name, value in metrics.items() if name.startswith("agents/")}
    assert told == {
        "agents/writer/calls": 5, "agents/writer/branches": 1, "agents/writer/continued": 1,
        "agents/judge/calls": 2, "agents/judge/branches": 1, "agents/judge/continued": 0,
    }  # fmt: skip
    assert metrics["branches"] == 1 and metrics["continued"] == 1  # of what is trained
    assert metrics["branch_rate"] == pytest.approx(1 / 3)


def test_a_run_that_goes_on_past_its_end_keeps_the_evaluation_of_all_tasks(log):
    for tasks in (ended(1.0, 0.0, 1.0), ended(1.0, 0.0)):
        log.evaluation(50, tasks, summarise(tasks))
    (row,) = read_lines(log.evaluations)
    assert len(row["by_task"]) == 3


def test_tasks_taken_out_of_the_file_are_gone_from_the_last_evaluation(log):
    last = log.config.run.steps
    for tasks in (ended(1.0, 0.0, 1.0), ended(1.0, 0.0)):
        log.evaluation(last, tasks, summarise(tasks))
    (row,) = read_lines(log.evaluations)
    assert len(row["by_task"]) == 2


def test_a_task_with_another_gold_is_another_task(log):
    tasks = ended(0.0, 1.0)
    log.evaluation(0, tasks, summarise(tasks))
    rollouts = tasks["rollouts"].to_pylist()
    rollouts[0] |= {"private": '"another"', "reward": 1.0}
    tasks = tasks | {"rollouts": pa.Table.from_pylist(rollouts, tasks["rollouts"].schema)}
    log.evaluation(3, tasks, summarise(tasks))
    found = held_out(read_lines(log.evaluations))
    assert (found["n"], found["before"], found["after"]) == (1, 1.0, 1.0)
    assert (found["before_step"], found["after_step"]) == (0, 3)


def test_an_evaluation_of_an_older_raygent_is_compared_by_the_names_of_its_tasks():
    rows = [evaluation(0, a=0.5, b=1.0), evaluation(9, a=1.0, b=1.0) | {"lost": 0, "digests": {"a": "1", "b": "2"}}]
    assert held_out(rows)["n"] == 2 and best_step(rows) == 9


def test_an_evaluation_that_is_done_again_stays_in_its_place(log):
    for step in (0, 1, 0):
        log.evaluation(step, ended(1.0), summarise(ended(1.0)))
    assert [row["step"] for row in read_lines(log.evaluations)] == [0, 1]


@pytest.mark.parametrize(
    ("failed", "why"), [({}, "no group had rewards that differ"), ({"failed_grader_error": 4}, "no rollout succeeded")]
)
def test_a_run_that_trained_nothing_says_so(log, capsys, failed, why):
    metrics = {"reward": 1.0, "groups": 4.0, "groups_flat": 4.0, "tokens_sampled": 80.0, "tokens_trained": 0.0}
    log.step(0, metrics)
    log.wandb.summary, log.wandb.finish = {}, lambda: None
    counts = {name: 0 for name in ("asked", "succeeded", "retried", "lost", "trained")} | failed
    log.finish({"rollouts": counts, "seconds": {}, "policy_version": 1})
    said = capsys.readouterr().out
    assert "4 of 4 groups without signal" in said and f"NOTHING WAS TRAINED: {why}" in said


def test_a_run_whose_agents_are_not_those_to_be_trained_says_so(log, capsys):
    log.config.agent.train = ["writter"]
    acted = {"agents/writer/calls": 8.0, "agents/a/b/calls": 8.0}
    log.step(
        0, {"reward": 0.5, "groups": 4.0, "groups_flat": 4.0, "tokens_sampled": 80.0, "tokens_trained": 0.0} | acted
    )
    assert "agent.train: no agent that acted is trained; it names none of writer, a/b" in capsys.readouterr().out
    log.wandb.summary, log.wandb.finish = {}, lambda: None
    counts = {name: 0 for name in ("asked", "succeeded", "retried", "lost", "trained")}
    log.finish({"rollouts": counts, "seconds": {}, "policy_version": 1})
    assert (
        "NOTHING WAS TRAINED: agent.train names none of the agents that acted, a/b, writer" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("step", "due"), [(0, 5), (2, 3), (3, 0), (10, 5)])
def test_the_first_and_the_last_evaluation_take_all_tasks(step, due):
    settings = config(run={"steps": 10}, evaluate={"every": 2, "tasks": 3})
    assert tasks_due(settings, [Task(str(n), n) for n in range(5)], step) == [Task(str(n), n) for n in range(due)]


def test_an_evaluation_says_what_it_did_not_run(capsys):
    class Stored:
        """Parts whose store has all rollouts but the last from before."""

        config, step, version, prompts, depends_on = config(), 4, 4, {}, ""

        def queue(self, rollouts):
            self.rollouts = rollouts
            return 1

        def collect(self, step, mode):
            return tables([rollout(one.rollout_id, one.group_id, 1.0) for one in self.rollouts], [])

        clock = staticmethod(lambda part: nullcontext())

    _, summary = evaluate(Stored(), [Task(str(n), n) for n in range(3)])
    assert summary["n"] == 3
    assert capsys.readouterr().out.startswith("2 of 3 rollouts of step 4 are in the store from before and are not run")
