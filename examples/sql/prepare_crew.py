"""Make crew_model/, for the CrewAI crew of crew.py: a small Llama as prepare_tools.py's, that knows CrewAI's prompts.

Its demonstrations are the crew's calls of an oracle in the place of a vendor, made in CrewAI's own environment, which
`uv sync --script` installs first, compiled (about 0.5 GB). Some minutes; run again it does nothing, unless this
folder's recipe has changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

from database import HERE
from oracle import oracle_of
from prepare import encode, is_made, make_data, recipe_of, settle
from prepare_tools import teach

TASKS = {"train": 600, "validation": 60}
COPIES = 300  # calls in which the tester takes a query over, learnt soon
A_PROCESS = 50  # tasks: the more crews CrewAI 1.6 has run in a process, the slower the next
CONTEXT = 1024


def main() -> None:
    started = time.time()
    subprocess.run(["uv", "sync", "--quiet", "--compile-bytecode", "--script", "crew.py"], cwd=HERE, check=True)
    sources = ["prepare_crew.py", "record_crew.py", "crew.py", "prepare_tools.py", "oracle.py", "sql_tool.py"]
    recipe = recipe_of("prepare.py", "tasks.py", "database.py", *sources)
    if is_made("crew_model", recipe):
        print("crew_model/ is there already")
        return
    settle()
    tasks = make_data()
    train, validation = (record(tasks[split][:number]) for split, number in TASKS.items())
    print(f"recorded after {time.time() - started:.0f} s")
    copied = [call for call in train if call["model"] == "tester" and not corrects(call)]
    train = [call for call in train if call["model"] == "author" or corrects(call)] + copied[:COPIES]
    teach("crew_model", recipe, train, [call for call in validation if corrects(call)], encode_reply, CONTEXT)
    print(f"done in {time.time() - started:.0f} s")


def record(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The crew's calls: the oracle's `seen`, with the reply at the end of `messages`."""
    python = subprocess.check_output(["uv", "python", "find", "--script", "crew.py"], cwd=HERE, text=True).strip()
    with oracle_of(tasks) as oracle:
        environment = os.environ | {"OPENAI_BASE_URL": f"{oracle.url}/v1"}
        for start in range(0, len(tasks), A_PROCESS):
            lines = "".join(json.dumps(task) + "\n" for task in tasks[start : start + A_PROCESS])
            subprocess.run([python, "record_crew.py"], cwd=HERE, env=environment, input=lines, text=True, check=True)
    return [call | {"messages": [*call["messages"], call["reply"]]} for call in oracle.seen]


def corrects(call: dict[str, Any]) -> bool:
    """Whether it is the tester's next query after one that gave no rows."""
    observed = "\nObservation:" in call["messages"][-2]["content"]
    return observed and "Action Input:" in call["reply"]["content"]


def encode_reply(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
    """As prepare.encode, with labels on the last reply alone: CrewAI puts what a tool said into the replies before."""
    ids, labels = encode(tokenizer, messages, tools)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return ids, [-100] * len(prompt) + labels[len(prompt) :]


if __name__ == "__main__":
    main()
