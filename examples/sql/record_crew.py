"""Run the crew on the tasks of stdin, a line of JSON each, one after the other; a task's `id` is its API key.

For prepare_crew.py, in crew.py's environment: with a process a task, 3 s would go to loading CrewAI each time.
"""

from __future__ import annotations

import json
import os
import sys

from crew import answer

for line in sys.stdin:
    task = json.loads(line)
    os.environ["OPENAI_API_KEY"] = task["id"]
    answer(task["input"])
os._exit(0)  # CrewAI 1.6 holds an ending process for 5 s for every ten tasks, for events that do not come
