# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["crewai==1.6.1"]
# ///
"""The SQL agent as a CrewAI crew: an author writes a query, a tester runs it with the tool `run_sql` and corrects it.

A program of its own, since CrewAI wants packages of its own: `uv run --script crew.py TASK` prints the query for TASK, which is JSON
with `database`, `schema` and `question`. OPENAI_BASE_URL and OPENAI_API_KEY say where the models are, AUTHOR_MODEL and
TESTER_MODEL their names. CrewAI takes seconds to load; without TASK it serves one task after the other: each line of its input is a
JSON object of the variables that hold for one, with the task in RAYGENT_TASK, and a line with the output answers it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TESTING": "true"}  # the latter: it prints and asks nothing

import sql_tool
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

CORRECTIONS = 2


def model(name: str) -> LLM:
    return LLM(model=os.environ.get(f"{name.upper()}_MODEL", name), provider="openai", temperature=0)


def answer(task: dict[str, str]) -> str:
    @tool("run_sql")
    def run_sql(sql: str) -> str:
        """Run a query: its rows, or the error and the columns."""
        return sql_tool.run_sql(task["database"], sql)

    author = Agent(role="Author", goal="write a query", backstory="You know SQL.", llm=model("author"))
    tester = Agent(
        role="Tester",
        goal="give a query that gives rows",
        backstory="You know SQL.",
        llm=model("tester"),
        tools=[run_sql],
        max_iter=2 + CORRECTIONS,
    )
    write = Task(description=f"{task['schema']}\n{task['question']}", expected_output="a query", agent=author)
    test = Task(description="Run the query, correct it.", expected_output="a query", agent=tester, context=[write])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as storage:  # else all crews wait for one SQLite file
        os.environ["CREWAI_STORAGE_DIR"] = storage
        found = Crew(agents=[author, tester], tasks=[write, test]).kickoff().raw
    return " ".join(found.split())


def main() -> None:
    if len(sys.argv) > 1:
        print(answer(json.loads(sys.argv[1])))
        return
    for line in sys.stdin:
        os.environ |= json.loads(line)
        print(json.dumps({"output": answer(json.loads(os.environ["RAYGENT_TASK"]))}), flush=True)


if __name__ == "__main__":
    main()
