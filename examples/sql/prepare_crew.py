"""Make crew_model/, for the CrewAI crew of crew.py: a small Llama as prepare_tools.py's, that knows CrewAI's prompts.

Its demonstrations are the crew's calls of an oracle in the place of a vendor, made on a few tasks in CrewAI's own environment,
which `uv sync --script` installs first, compiled (about 0.5 GB), and then filled in with other tasks. Half an hour and more;
run again it does nothing, unless this folder's recipe has changed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from typing import Any

from database import HERE
from oracle import oracle_of
from prepare import encode, is_made, make_data, recipe_of, settle
from prepare_tools import teach
from sql_tool import run_sql

RECORDED = 30  # tasks
VALIDATION = 50  # tasks, all of whose calls count: a rollout needs each of its calls right
WRITTEN = 1500  # calls of the author
COPIES = 1500  # calls in which the tester takes a query over
ENOUGH, MOST_STEPS = 0.65, 3000
CONTEXT = 1024

Call = dict[str, Any]  # `model`, and `messages` with the reply at their end
Parts = dict[str, str]
Patterns = dict[frozenset[str], tuple[Parts, list[Call]]]  # by the names of the parts


def main() -> None:
    started = time.time()
    subprocess.run(["uv", "sync", "--quiet", "--compile-bytecode", "--script", "crew.py"], cwd=HERE, check=True)
    sources = ["prepare_crew.py", "crew.py", "prepare_tools.py", "oracle.py", "sql_tool.py"]
    recipe = recipe_of("prepare.py", "tasks.py", "database.py", *sources)
    if is_made("crew_model", recipe):
        print("crew_model/ is there already")
        return
    settle()
    tasks = make_data()
    recorded = record(tasks["train"][:RECORDED])
    patterns = patterns_of(recorded, tasks["train"])
    train, validation = (
        [call for task in part for call in filled(patterns, parts_of(task))]
        for part in (tasks["train"], tasks["validation"][:VALIDATION])
    )
    print(f"demonstrations after {time.time() - started:.0f} s")
    written = [call for call in train if call["model"] == "author"][:WRITTEN]
    copied = [call for call in train if call["model"] == "tester" and not corrects(call)][:COPIES]
    corrected = [call for call in train if corrects(call)]
    teach("crew_model", recipe, written + copied + corrected, validation, encode_reply, CONTEXT, ENOUGH, MOST_STEPS)
    print(f"done in {time.time() - started:.0f} s")


def record(tasks: list[dict[str, Any]]) -> dict[str, list[Call]]:
    """The crew's calls of the oracle, by task."""
    calls: dict[str, list[Call]] = {}
    with oracle_of(tasks) as oracle:
        environment = os.environ | {"OPENAI_BASE_URL": f"{oracle.url}/v1"}
        variables = [{"OPENAI_API_KEY": task["id"], "RAYGENT_TASK": json.dumps(task["input"])} for task in tasks]
        lines = "".join(json.dumps(of_task) + "\n" for of_task in variables)
        command = ["uv", "run", "--quiet", "--script", "crew.py"]
        subprocess.run(
            command, cwd=HERE, env=environment, input=lines, text=True, stdout=subprocess.DEVNULL, check=True
        )
    for call in oracle.seen:
        messages = [*call["messages"], call["reply"]]
        calls.setdefault(call["task"], []).append({"model": call["model"], "messages": messages, "tools": []})
    return calls


def parts_of(task: dict[str, Any]) -> Parts:
    """What of a task stands in the crew's prompts and replies."""
    question, private = task["input"], task["private"]
    parts = {"asked": f"{question['schema']}\n{question['question']}", "guess": private["guess"]}
    parts["tried"] = run_sql(question["database"], private["guess"])
    if not parts["tried"].startswith("rows:"):
        parts |= {"sql": private["sql"], "found": run_sql(question["database"], private["sql"])}
    return parts


def patterns_of(recorded: dict[str, list[Call]], tasks: list[dict[str, Any]]) -> Patterns:
    """Of a task whose first query gives rows and of one whose first query does not: its parts and calls. The calls of all other
    recorded tasks must be these, filled in: so is what nobody has recorded."""
    found: Patterns = {}
    of = {task["id"]: parts_of(task) for task in tasks if task["id"] in recorded}
    for name, calls in recorded.items():
        found.setdefault(frozenset(of[name]), (of[name], calls))
    for name, calls in recorded.items():
        if filled(found, of[name]) != calls:
            raise SystemExit(
                f"{name}: CrewAI's prompts are others here than with another task; record all that is learnt from"
            )
    return found


def filled(patterns: Patterns, parts: Parts) -> list[Call]:
    """The calls of a task of these parts."""
    before, calls = patterns[frozenset(parts)]
    now = {before[name]: parts[name] for name in before}
    any_of = re.compile("|".join(re.escape(text) for text in sorted(now, key=len, reverse=True)))

    def fill(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": any_of.sub(lambda match: now[match[0]], message["content"])}

    return [call | {"messages": [fill(message) for message in call["messages"]]} for call in calls]


def corrects(call: Call) -> bool:
    """Whether it is the tester's next query after one that gave no rows."""
    observed = "\nObservation:" in call["messages"][-2]["content"]
    return observed and "Action Input:" in call["messages"][-1]["content"]


def encode_reply(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
    """As prepare.encode, with labels on the last reply alone: CrewAI puts what a tool said into the replies before."""
    ids, labels = encode(tokenizer, messages, tools)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return ids, [-100] * len(prompt) + labels[len(prompt) :]


if __name__ == "__main__":
    main()
