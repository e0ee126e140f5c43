"""A run that changes prompts, with all its parts: the served model plays the agent, an upstream the optimiser's model."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_model import make_tiny_model
from vendor import CHAT, serving

from raygent.actors.checkpoint import latest_checkpoint
from raygent.cluster.metrics import read_lines
from raygent.config import load
from raygent.jobs.optimise_prompts import optimise_prompts
from raygent.jobs.train import train

AGENT = """
import openai, raygent

async def answer(task, model):
    text = raygent.prompt("writer", "no run")
    client = openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key)
    await client.chat.completions.create(
        model=model.model, messages=[{"role": "user", "content": f"{text} {task}"}], temperature=0, max_tokens=4
    )
    return text

def grade(input, private, output):
    return {"reward": sum(word in output for word in private) / len(private), "words": len(output.split())}
"""
TOML = """
[run]
name = "prompts"
steps = 2
[model]
path = "model"
context = 2048
[agent]
run = "prompted_agent_of_test.py:answer"
timeout_s = 120.0
[grader]
run = "prompted_agent_of_test.py:grade"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[prompts]
writer = "writer.txt"
[algorithm]
name = "apo"
tasks_per_step = 3
selection_tasks = 4
beam = 1
edits = 2
[engine]
threads = 1
[workers]
max = 1
cpus = 0.1
[upstream.reviser]
agents = ["optimiser"]
base_url = "{base_url}"
model = "big"
price_input = 1.0
price_output = 1.0
max_cost = 100.0
[wandb]
mode = "disabled"
"""
WORDS = ["alpha", "beta"]


def said(text: str) -> tuple[int, dict, dict]:
    message = {"role": "assistant", "content": text}
    return 200, CHAT | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}, {}


def revise(body: dict) -> tuple[int, dict, dict]:
    """A critique asks for the word that is lacking; an edit adds it."""
    asked = body["messages"][0]["content"]
    prompt = re.search(r"```\n(.*?)\n```", asked, re.DOTALL)[1]
    if "Give one reason" in asked:
        return said(next((word for word in WORDS if word not in prompt), "nothing"))
    word = re.search(r"says:\n\n(\w+)\n", asked)[1]
    return said(f"```\n{prompt} {word}\n```")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "prompted_agent_of_test.py").write_text(AGENT)
    (tmp_path / "writer.txt").write_text("Write.\n")
    for name, numbers in (("train", range(10)), ("eval", range(10, 15))):
        tasks = [{"id": str(number), "input": f"task {number}", "private": WORDS} for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return tmp_path


def test_apo_finds_a_better_prompt_and_goes_on_where_it_stood(cluster, folder, capfd):
    with serving() as vendor:
        vendor.answers = [revise]
        (folder / "run.toml").write_text(TOML.replace("{base_url}", vendor.base_url))
        optimise_prompts(load(folder / "run.toml", ["run.steps=1"]))
        asked = len(vendor.requests)
        assert asked == 4  # two critiques, two edits
        optimise_prompts(load(folder / "run.toml"))
        assert len(vendor.requests) == asked + 4  # the first step's replies are in the store
    run = folder / "runs" / "prompts"
    assert "5 of 5 rollouts of step 0 are in the store from before" in capfd.readouterr().out

    tree = pq.read_table(run / "store" / "prompts").to_pylist()
    texts = {row["version"]: row["text"] for row in tree}
    assert texts == {0: "Write.", 1: "Write. alpha", 2: "Write. alpha beta"}
    assert [(row["parents"], row["origin"], row["step"], row["critique"], row["score"]) for row in tree] == [
        ([], "first", 0, "", 0.0),
        ([0], "apo", 0, "alpha", 0.5),
        ([1], "apo", 1, "beta", 1.0),
    ]
    assert [row["best"] for row in tree] == [False, False, True]
    assert (run / "prompts" / "writer.txt").read_text() == "Write. alpha beta\n"

    rollouts = pq.read_table(run / "store" / "rollouts").to_pylist()
    calls = pq.read_table(run / "store" / "calls").to_pylist()
    assert {row["status"] for row in rollouts} == {"succeeded"}
    by_mode = {mode: [row for row in rollouts if row["mode"] == mode] for mode in ("score", "ask", "eval")}
    assert {mode: len(rows) for mode, rows in by_mode.items()} == {"score": 4 + 3 + 4 + 3 + 4, "ask": 8, "eval": 15}
    for row in by_mode["score"]:
        prompt = json.loads(row["prompts"])["writer"]
        assert prompt["text"] == texts[prompt["version"]]
        (request,) = [json.loads(call["request"]) for call in calls if call["rollout_id"] == row["rollout_id"]]
        assert request["messages"][0]["content"] == f"{prompt['text']} {json.loads(row['input'])}"
    of_optimiser = [call for call in calls if call["agent"] == "optimiser"]
    assert {call["policy"] for call in of_optimiser} == {"upstream:reviser"} and len(of_optimiser) == 8
    assert all(call["cost"] > 0 for call in of_optimiser)
    eval_tasks = {row["task_id"] for row in by_mode["eval"]}
    assert not eval_tasks & {row["task_id"] for row in by_mode["score"]}

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["held_out"]["n"]) == (2, 5)
    assert (summary["held_out"]["before"], summary["held_out"]["after"]) == (0.0, 1.0)
    assert [(line["step"], line["reward"], line["prompt_versions"]) for line in read_lines(run / "metrics.jsonl")] == [
        (0, 0.5, 2),
        (1, 1.0, 3),
    ]


IN_TURN = [
    "algorithm.name=grpo", "algorithm.tasks_per_step=2", "algorithm.group_size=4", "algorithm.prompts.name=apo",
    "algorithm.prompts.every=1", "algorithm.prompts.tasks_per_step=3", "algorithm.prompts.selection_tasks=4",
    "algorithm.prompts.beam=1", "algorithm.prompts.edits=2", "learner.ranks=1", "learner.learning_rate=1e-3",
    "agent.run=varied_agent_of_test.py:answer", "grader.run=varied_agent_of_test.py:grade",
]  # fmt: skip
VARIED = (
    AGENT.replace("temperature=0, ", "")
    .replace("await client", "reply = await client", 1)
    .replace("return text", 'return f"{text}|{reply.choices[0].message.content}"')
    .replace('return {"reward": sum(', 'return {"reward": 1e-3 * (hash(output) % 7) + sum(')
    .replace("in output for", 'in output.split("|")[0] for')
)


def test_weights_and_prompts_in_turn_and_a_turn_done_again_is_the_same(cluster, folder, capfd):
    """A step of each, twice; then the second once more, from the checkpoint before it."""
    (folder / "varied_agent_of_test.py").write_text(VARIED)
    with serving() as vendor:
        vendor.answers = [revise]
        (folder / "run.toml").write_text(TOML.replace("{base_url}", vendor.base_url))
        train(load(folder / "run.toml", IN_TURN))
        run = folder / "runs" / "prompts"
        asked, tree = len(vendor.requests), pq.read_table(run / "store" / "prompts").to_pylist()
        lines = read_lines(run / "metrics.jsonl")
        shutil.rmtree(latest_checkpoint(run).path)
        assert latest_checkpoint(run).prompts == {"writer": {"version": 1, "text": "Write. alpha"}}
        train(load(folder / "run.toml", IN_TURN))
        assert len(vendor.requests) == asked == 8
    assert "going on at step 1" in capfd.readouterr().out
    again = pq.read_table(run / "store" / "prompts").to_pylist()
    assert again == tree and [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1]
    assert [(row["text"], row["parents"], row["step"], row["best"]) for row in tree] == [
        ("Write.", [], 0, False),
        ("Write. alpha", [0], 0, False),
        ("Write. alpha beta", [1], 1, True),
    ]
    of_turns = [{name: line[f"prompts/{name}"] for name in ("versions", "rollouts", "asked")} for line in lines]
    assert of_turns == [{"versions": versions, "rollouts": 11, "asked": 4} for versions in (2, 3)]
    assert latest_checkpoint(run).prompts == {"writer": {"version": 2, "text": "Write. alpha beta"}}

    rollouts = pq.read_table(run / "store" / "rollouts").to_pylist()
    versions = {
        (mode, step): {
            json.loads(row["prompts"])["writer"]["version"]
            for row in rollouts
            if (row["mode"], row["step"]) == (mode, step)
        }
        for mode, step in {(row["mode"], row["step"]) for row in rollouts} - {("ask", 0), ("ask", 1)}
    }
    assert versions == {
        ("eval", 0): {0}, ("score", 0): {0, 1}, ("train", 0): {1},
        ("score", 1): {1, 2}, ("train", 1): {2}, ("eval", 2): {2},
    }  # fmt: skip
    assert {row["resource_version"] for row in rollouts if (row["mode"], row["step"]) == ("score", 1)} == {1}
    assert sum(row["trained_step"] >= 0 for row in rollouts) > 0
