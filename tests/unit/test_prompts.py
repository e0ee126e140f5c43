"""Prompts: an agent reads the version under trial, the store keeps which it was, and the algorithms find better ones."""

import asyncio
import json
import os
import random
import re

import pyarrow.parquet as pq
import pytest
from conversations import config
from stores import open_store, rollout, rows_on_disk, run_attempt
from tiny_model import make_tiny_model

import raygent
from raygent import prompts
from raygent.actors.agent_runner import AgentRunner, AttemptRecorder
from raygent.actors.checkpoint import Checkpoint
from raygent.algorithms import apo, bootstrap_fewshot, gepa
from raygent.algorithms.prompt_search import Search, Tree, Trial, block_in, split
from raygent.callables import ModelEndpoint
from raygent.cluster.pacer import eval_rollouts
from raygent.cluster.prompt_table import note_begun, prompts_in_force, read_prompts, write_prompts
from raygent.config import Config, ConfigError, load
from raygent.data_files import load_tasks
from raygent.jobs import check
from raygent.jobs.optimise_prompts import given_by
from raygent.prompts import PROMPTS_VARIABLE, on_trial
from raygent.records import PromptVersion, Task

TASKS = [Task(str(number), f"question {number}") for number in range(40)]
FIRST = {"writer": "Write.", "checker": "Check."}


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    monkeypatch.setattr(prompts, "expected", False)


# the agent's side


def test_where_nobody_knows_which_rollout_asks_a_default_is_no_answer(monkeypatch):
    monkeypatch.setattr(prompts, "expected", True)
    with pytest.raises(LookupError, match="asked outside the agent's own call"):
        raygent.prompt("writer", "Write.")
    token = on_trial.set({"writer": "under trial"})
    assert raygent.prompt("writer", "Write.") == "under trial"
    on_trial.reset(token)


def test_outside_a_run_a_prompt_is_its_default():
    assert raygent.prompt("writer", "Write.") == "Write."
    with pytest.raises(LookupError, match=r'prompt\(\'writer\'\): .*writer = "FILE" to \[prompts\], or give a default'):
        raygent.prompt("writer")


def test_in_a_run_it_is_the_version_under_trial(monkeypatch):
    monkeypatch.setenv(PROMPTS_VARIABLE, json.dumps({"writer": "from the environment"}))
    assert raygent.prompt("writer", "default") == "from the environment"
    token = on_trial.set({"writer": "from the context"})
    assert raygent.prompt("writer", "default") == "from the context"
    with pytest.raises(LookupError, match="there are writer;"):
        raygent.prompt("checker")
    on_trial.reset(token)


AGENTS = """
import raygent
async def as_task(task, model): return [raygent.prompt("writer"), model.prompts["writer"], model.agent("a").prompts["writer"]]
def in_thread(task, model): return [raygent.prompt("writer"), model.prompts["writer"], model.agent("a").prompts["writer"]]
"""


@pytest.mark.parametrize("agent", ["as_task", "in_thread"])
@pytest.mark.parametrize("where", ["process", "subprocess"])
def test_each_way_to_run_an_agent_gives_it_the_prompts(tmp_path, agent, where):
    (tmp_path / "prompted_of_test.py").write_text(AGENTS)
    settings = {"run": f"prompted_of_test.py:{agent}", "in": where}
    runner = AgentRunner(config(path=str(tmp_path / "raygent.toml"), agent=settings))
    endpoint = ModelEndpoint("http://127.0.0.1:1/a/rg-key/v1", "rg-key", prompts={"writer": "Wörter“"})
    ended = asyncio.run(runner.run("task", endpoint, AttemptRecorder("r", 1, "w")))
    assert ended.value == ["Wörter“"] * 3, ended.error


def test_a_program_in_any_language_has_them_in_its_environment(tmp_path):
    settings = {"command": ["sh", "-c", 'echo "$RAYGENT_PROMPTS"']}
    runner = AgentRunner(config(path=str(tmp_path / "raygent.toml"), agent=settings))
    endpoint = ModelEndpoint("http://127.0.0.1:1/a/rg-key/v1", "rg-key", prompts={"writer": "Write."})
    assert asyncio.run(runner.run("task", endpoint, AttemptRecorder("r", 1, "w"))).value == {"writer": "Write."}
    assert PROMPTS_VARIABLE not in os.environ


# the store


async def test_the_store_keeps_what_a_rollout_was_run_with(tmp_path):
    prompts = {"writer": {"version": 3, "text": "Schön."}}
    asked = rollout(0)
    asked.prompts = prompts
    store = open_store(tmp_path)
    await store.add_rollouts([asked, rollout(1)])
    await store.close()
    store = open_store(tmp_path)  # the texts are in Parquet now, and in the log
    leases = await store.lease("w", 2)
    assert [lease.rollout.prompts for lease in leases] == [prompts, {}]
    for lease in leases:
        assert await run_attempt(store, lease) == "won"
    await store.roll()
    tables = await store.take(0, "train", spans=True)
    assert [json.loads(text) for text in tables["rollouts"]["prompts"].to_pylist()] == [prompts, {}]
    assert tables["spans"].num_rows == 0
    await store.close()
    assert [json.loads(row["prompts"]) for row in rows_on_disk(tmp_path, "rollouts")] == [prompts, {}]


async def test_rewind_to_the_newest_step_undoes_nothing_and_asks_again_for_what_was_lost(tmp_path):
    store = open_store(tmp_path, max_attempts=1)
    await store.add_rollouts([rollout(0, 0), rollout(1, 5), rollout(2, 5)])
    for lease in await store.lease("w", 3):
        lost = lease.rollout.rollout_id == "r2"
        await run_attempt(store, lease, outcome="engine_lost" if lost else "succeeded", reward=None if lost else 1.0)
    await store.rewind(None)
    assert {row.rollout_id: row.outcome for row in store.state.rollouts.values()} == {
        "r0": "succeeded",
        "r1": "succeeded",
        "r2": "rewound",
    }
    assert await store.add_rollouts([rollout(0, 0), rollout(1, 5), rollout(2, 5)]) == 1
    await store.close()


def test_the_table_has_the_tree_and_the_best(tmp_path):
    tree = Tree({"writer": "Write."})
    second = tree.grow(tree.first, "writer", "Write SQL.", "apo", 0, "It says too little.")
    third = tree.grow(second, "writer", "Write one query.", "apo", 1)
    assert tree.grow(third, "writer", "Write.", "apo", 2) == tree.first  # a text that is there already
    tree.note(second, 0.5, 10)
    tree.note(second, 0.25, 20)
    write_prompts(tmp_path, tree.rows(second))
    rows = pq.read_table(tmp_path / "store" / "prompts").to_pylist()
    assert [(row["version"], row["parents"], row["best"]) for row in rows] == [
        (0, [], False),
        (1, [0], True),
        (2, [1], False),
    ]
    assert (rows[1]["critique"], rows[1]["score"], rows[1]["tasks"]) == ("It says too little.", 0.5, 10)
    assert rows[2]["score"] is None and read_prompts(tmp_path) == rows
    assert (tmp_path / "prompts" / "writer.txt").read_text() == "Write SQL.\n"


def test_rollouts_get_the_best_prompts_of_the_run_else_the_first(tmp_path):
    (tmp_path / "writer.txt").write_text("\nWrite.\n")
    settings = {
        "run": {"directory": str(tmp_path)},
        "prompts": {"writer": "writer.txt"},
        "path": str(tmp_path / "r.toml"),
    }
    changing = config(**settings, algorithm={"name": "apo"})
    assert prompts_in_force(changing, None) == {"writer": {"version": 0, "text": "Write."}}
    tree = Tree({"writer": "Write."})
    write_prompts(changing.run_directory, tree.rows(tree.grow(tree.first, "writer", "Write SQL.", "apo", 0)))
    assert prompts_in_force(changing, None) == {"writer": {"version": 1, "text": "Write SQL."}}
    assert prompts_in_force(config(**settings), None) == {"writer": {"version": 0, "text": "Write."}}
    ids = [
        eval_rollouts(changing, TASKS[:1], 0, 0, told)[0].rollout_id
        for told in (None, {}, prompts_in_force(changing, None))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_in_turn_with_the_weights_the_checkpoint_tells_the_prompts(tmp_path):
    (tmp_path / "writer.txt").write_text("Write.")
    turns = {"prompts": {"name": "apo", "every": 5}}
    in_turn = config(path=str(tmp_path / "r.toml"), prompts={"writer": "writer.txt"}, algorithm=turns)
    made: dict[str, PromptVersion] = {"writer": {"version": 2, "text": "Write SQL."}}
    checkpoint = Checkpoint(tmp_path, 5, 5, prompts=made)
    assert prompts_in_force(in_turn, checkpoint) == made
    first = {"writer": {"version": 0, "text": "Write."}}
    assert prompts_in_force(in_turn, None) == prompts_in_force(in_turn, Checkpoint(tmp_path, 5, 5)) == first


def test_a_search_goes_on_with_the_tree_that_one_before_left():
    before = Tree({"writer": "Write."})
    second = before.grow(before.first, "writer", "Write SQL.", "apo", 0)
    before.note(before.first, 0.9, 10)
    before.note(second, 0.95, 10)
    tree = Tree({"writer": "Write SQL."}, before.rows(second))
    assert tree.first == second and len(tree) == 2
    assert tree.grow(tree.first, "writer", "Write.", "apo", 1) == before.first  # no new version
    tree.note(tree.first, 0.5, 10)  # the weights are others now
    tree.note(tree.first, 0.4, 10)
    assert [(row["version"], row["score"]) for row in tree.rows(tree.first)] == [(0, 0.9), (1, 0.5)]
    assert tree.grow(tree.first, "writer", "Write one.", "apo", 1) == {"writer": 2}


# the config


def test_a_prompts_file_that_is_not_there_or_says_nothing(tmp_path):
    def texts(**prompts: str) -> dict[str, str]:
        return Config.model_validate(
            config(path=str(tmp_path / "r.toml"), prompts=prompts).model_dump(by_alias=True)
        ).first_prompts()

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    for file, why in (
        ("empty.txt", "is empty; write"),
        ("latin.txt", "not UTF-8 at byte 2"),
        ("emty.txt", "did you mean empty"),
    ):
        with pytest.raises(ConfigError, match=rf"^prompts\.writer: .*{why}"):
            texts(writer=file)


def test_what_changes_prompts_needs_prompts_and_no_learner():
    with pytest.raises(
        ValueError, match=r'prompts: missing, and algorithm\.name = "apo" improves them; add \[prompts\]'
    ):
        config(algorithm={"name": "apo"})
    made = config(algorithm={"name": "gepa"}, prompts={"writer": "writer.txt"}, engine={"gpus": 1.0})
    assert (made.algorithm.group_size, made.algorithm.tasks_per_step, made.learners) == (1, 3, {})
    assert made.prompt_search is made.algorithm


def test_what_changes_prompts_in_turn_with_the_weights():
    turns = {"name": "gepa", "every": 10}
    made = config(algorithm={"prompts": turns}, prompts={"writer": "writer.txt"})
    assert (made.algorithm.group_size, made.algorithm.tasks_per_step) == (8, 16) and made.learners
    search = made.prompt_search
    assert (search.name, search.group_size, search.tasks_per_step, search.steps) == ("gepa", 1, 3, 1)
    for wrong, why in (
        (
            {"algorithm": {"prompts": turns}},
            r'prompts: missing, and algorithm\.prompts\.name = "gepa" improves them; add \[prompts\]',
        ),
        ({"algorithm": {"name": "apo", "prompts": turns}}, r"algorithm\.prompts: apo changes prompts alone"),
        ({"algorithm": {"prompts": {"name": "gepa"}}}, r"algorithm\.prompts\.every"),
        ({"algorithm": {"prompts": turns | {"name": "grpo"}}}, r"algorithm\.prompts\.name"),
        (
            {"algorithm": {"name": "sft", "prompts": turns}, "data": {"rollouts": "runs/x"}},
            r"algorithm\.prompts: what is trained on was recorded",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            config(**{"prompts": {"writer": "writer.txt"} if "missing" not in why else {}} | wrong)


# the algorithms: a run whose reward is the share of three words that the writer's prompt has


WORDS = ("alpha", "beta", "gamma")


def run(step, pairs):
    score = lambda prompts: sum(word in prompts["writer"]["text"] for word in WORDS) / len(WORDS)  # noqa: E731
    return [Trial(task, score(prompts), f"did {task.id}", f"answer {task.id}") for prompts, task in pairs]


def reply(step, texts):
    """A critique names a word at random, good or not; an edit adds the word that the critique names."""

    def one(text):
        dice = random.Random(text)
        if "Give one reason" in text:
            return dice.choice([*WORDS, "delta", "omega", ""])
        word = re.findall(r"^(\w+)$", text, re.MULTILINE)[-1] if "says:" in text else dice.choice([*WORDS, "delta"])
        old = re.search(r"```\n(.*?)\n```", text, re.DOTALL)
        return f"Here:\n```\n{old[1]} {word}\n```"

    return [one(text) for text in texts]


def search_of(steps=6, run=run, reply=reply, **rest):
    told = []
    search = Search(
        Tree(FIRST), run, reply, lambda search: told.append((search.step, search.best_score)), steps, **rest
    )
    return search, told


def optimise(algorithm, search, **settings):
    made = config(
        algorithm={"name": algorithm.__name__.rpartition(".")[2]} | settings, prompts={"writer": "w"}
    ).algorithm
    return algorithm.optimise(search, *split(TASKS, 10, seed=1), made, 1)


@pytest.mark.parametrize("algorithm", [apo, gepa])
def test_the_search_finds_the_words(algorithm):
    steps = {apo: 8, gepa: 60}[algorithm]
    search, told = search_of(steps)
    best = optimise(algorithm, search, tasks_per_step=4)
    assert all(word in search.tree.texts(best)["writer"] for word in WORDS)
    assert search.best_score == 1.0
    assert [step for step, _ in told] == list(range(steps))
    scores = [score for _, score in told]
    assert scores == sorted(scores)
    rows = search.tree.rows(best)
    writer = [row for row in rows if row["name"] == "writer"]
    assert [row["version"] for row in writer] == list(range(len(writer))) and [row["best"] for row in writer].count(
        True
    ) == 1
    assert all(parent < row["version"] for row in writer for parent in row["parents"])
    assert all(
        row["parents"] and row["origin"] == algorithm.__name__.rpartition(".")[2] and row["critique"]
        for row in writer[1:]
    )


@pytest.mark.parametrize("algorithm", [apo, gepa, bootstrap_fewshot])
def test_asked_again_it_does_the_same_again(algorithm):
    trees = []
    for steps in (3, 3, 4):
        search, _ = search_of(steps)
        optimise(algorithm, search, tasks_per_step=4)
        trees.append([(row["name"], row["text"], row["parents"]) for row in search.tree.rows(search.best)])
    assert trees[0] == trees[1]
    assert all(row in trees[2] for row in trees[0])  # and goes on from there


def test_apo_chooses_on_tasks_that_it_does_not_learn_from():
    read, scored = set(), set()

    def watched(step, pairs):
        trials = run(step, pairs)
        scored.update(trial.transcript for trial in trials)
        return trials

    def reader(step, texts):
        read.update(line for text in texts for line in text.splitlines() if line.startswith("did "))
        return reply(step, texts)

    search, _ = search_of(4, watched, reader)
    optimise(apo, search, tasks_per_step=8)
    feedback, selection = split(TASKS, 10, seed=1)
    assert {f"did {task.id}" for task in selection} <= scored
    assert read and read <= {f"did {task.id}" for task in feedback}


def test_apo_shows_what_went_badly():
    trials = [Trial(task, score) for task, score in zip(TASKS, (0.0, 1.0, 0.5, 1.0), strict=False)]
    assert [trial.score for trial in apo.failures(trials)] == [0.0, 0.5]
    assert len(apo.failures(trials[1:2])) == 1
    assert [trial.score for trial in bootstrap_fewshot.successes(trials)] == [1.0, 1.0]
    assert bootstrap_fewshot.successes(trials[:1]) == []


def test_gepa_knows_no_score_that_is_perfect():
    """A reward may be above 1: the search goes on."""

    def above_one(step, pairs):
        return [Trial(trial.task, 1 + trial.score, trial.transcript, trial.output) for trial in run(step, pairs)]

    search, _ = search_of(6, run=above_one)
    optimise(gepa, search, tasks_per_step=4)
    assert search.asked >= 6


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"algorithm": {"name": "apo", "beam": 2}}, r"algorithm\.beam: .* was begun with 4"),
        ({"algorithm": {"name": "gepa"}}, r"algorithm\.name: .* was begun with 'apo'"),
        ({"run": {"seed": 1}}, r"run\.seed: .* was begun with 0"),
        ({"algorithm": {"name": "grpo"}}, r"algorithm\.name: .* was begun with apo, and weights and prompts"),
    ],
)
def test_a_run_is_gone_on_with_by_the_same_search_alone(tmp_path, change, what):
    for name, rows in (("train", 8), ("test", 2)):
        lines = [json.dumps({"id": f"{name}{n}", "input": n}) + "\n" for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "writer.txt").write_text("Write.")

    def asked(**more):
        sections = {
            "run": {"directory": str(tmp_path)} | more.get("run", {}),
            "data": {"train": str(tmp_path / "train.jsonl")},
            "prompts": {"writer": str(tmp_path / "writer.txt")},
            "algorithm": {"selection_tasks": 4} | more.get("algorithm", {"name": "apo"}),
        }
        return config(**sections)

    begun = asked()
    begun.run_directory.mkdir()
    (begun.run_directory / "config.toml").write_text(begun.to_toml())
    (begun.run_directory / "store").mkdir()
    check._check_begun(begun)
    check._check_prompts(begun, True)
    again = asked(**change)
    with pytest.raises(ConfigError, match=what):
        check._check_begun(again)
        check._check_prompts(again, True)
    note_begun(begun, load_tasks(begun.data.train))
    check._check_prompts(begun, True)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "more", "input": 9}) + "\n")
    with pytest.raises(ConfigError, match=r"data\.train: .* was begun with other tasks"):
        check._check_prompts(begun, True)
    note_begun(begun, load_tasks(begun.data.train))
    check._check_prompts(begun, True)
    begun.grader.failed_reward = -1.0
    check._check_prompts(begun, False)  # an evaluation's, which searches for nothing
    with pytest.raises(ConfigError, match=r"grader, agent, .* was begun with others"):
        check._check_prompts(begun, True)


def test_the_same_command_goes_on_and_what_is_damaged_is_told(tmp_path):
    make_tiny_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"id": str(n), "input": n}) + "\n" for n in range(8)))
    (tmp_path / "writer.txt").write_text("Write.")
    (tmp_path / "agent.py").write_text("def answer(task, model):\n    return 1.0\n")
    (tmp_path / "train.toml").write_text(
        'model.path = "model"\nagent.run = "agent.py:answer"\ndata.train = "train.jsonl"\nprompts.writer = "writer.txt"\n'
        'algorithm.name = "apo"\nalgorithm.selection_tasks = 4\n'
    )
    begun = load(tmp_path / "train.toml", [])
    check.check(begun)
    begun.run_directory.mkdir(parents=True)
    (begun.run_directory / "config.toml").write_text(begun.to_toml())
    note_begun(begun, load_tasks(begun.data.train))
    check.check(load(tmp_path / "train.toml", []))
    for file in ("begun.json", "store/prompts/prompts.parquet"):
        damaged = begun.run_directory / file
        damaged.parent.mkdir(parents=True, exist_ok=True)
        whole = damaged.read_bytes() if damaged.exists() else None
        damaged.write_text('{"a')
        with pytest.raises(ConfigError, match=rf"run\.name: .*{damaged.name}"):
            check.check(load(tmp_path / "train.toml", []))
        if whole:
            damaged.write_bytes(whole)


@pytest.mark.parametrize("algorithm", [apo, gepa])
def test_a_model_that_says_nothing_of_use_changes_nothing(algorithm):
    search, told = search_of(3, reply=lambda step, texts: ["" for _ in texts])
    assert optimise(algorithm, search, tasks_per_step=4) == search.tree.first
    assert search.unanswered == search.asked > 0 and len(told) == 3 and len(search.tree) == 2


@pytest.mark.parametrize("algorithm", [apo, gepa])
def test_what_ends_the_run_is_raised(algorithm):
    def broken(step, texts):
        raise ConfigError("upstream.big.max_cost: reached")

    search, told = search_of(3, reply=broken)
    with pytest.raises(ConfigError, match="max_cost"):
        optimise(algorithm, search)
    assert told == []  # the step has not ended


def test_no_step_begins_over_the_budget():
    search, told = search_of(50, max_rollouts=100, samples=2)
    optimise(apo, search, tasks_per_step=4)
    assert search.rollouts >= 100 and len(told) < 50


@pytest.mark.parametrize("reward", [1, 1.0, True, {"reward": 0.5, "rows": 1}])
def test_a_reward_that_an_agent_returns_is_nothing_to_show(reward):
    assert given_by(reward, graded=False) == "" != given_by(reward, graded=True)
    assert given_by("SELECT 1", graded=False) == "SELECT 1" and given_by(None, graded=True) == ""


def test_bootstrapping_puts_what_went_well_behind_the_prompt():
    def demonstrated(step, pairs):
        shown = [prompts["writer"]["text"].count("Output:") for prompts, _ in pairs]
        return [
            Trial(task, 0.2 * many + 0.1 * (int(task.id) % 2), "", f"answer {task.id}")
            for many, (_, task) in zip(shown, pairs, strict=True)
        ]

    search, _ = search_of(3, demonstrated)
    best = optimise(bootstrap_fewshot, search, tasks_per_step=6, demonstrations=3, edits=4)
    text = search.tree.texts(best)["writer"]
    assert text.startswith("Write.\n\nExamples:\n\nInput: question ") and "\nOutput: answer " in text
    assert all(int(number) % 2 for number in re.findall(r"Input: question (\d+)", text))
    assert search.asked == 0


def test_the_text_between_the_fences():
    assert block_in("Well:\n```text\nUse ```sql``` blocks.\n```\nDone.") == "Use ```sql``` blocks."
    assert block_in("no fence") == block_in("``` one line ```") == ""
