"""Turn Spider's or BIRD's files, where you have them, into tasks for the agent: data/NAME/train.jsonl and test.jsonl.

python spider.py SPIDER/train_spider.json SPIDER/database SPIDER/dev.json SPIDER/database
python spider.py BIRD/train.json BIRD/train_databases BIRD/dev.json BIRD/dev_databases --name bird
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
from pathlib import Path
from typing import Any

from database import HERE, QueryError, run_query

TASK = "Write one SQLite query that answers the question. Reply with the query alone, in a ```sql block.\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "test"):
        parser.add_argument(f"{split}_questions", type=Path)
        parser.add_argument(f"{split}_databases", type=Path)
    parser.add_argument("--name", default="spider", help="of the folder under data/ (default: spider)")
    arguments = parser.parse_args()
    folder = HERE / "data" / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        questions = json.loads(getattr(arguments, f"{split}_questions").read_text())
        tasks, left_out = read(questions, getattr(arguments, f"{split}_databases"), split)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
        print(f"{split}: {len(tasks)} questions; {left_out} left out, whose gold query fails, is slow, or gives no row")


def read(questions: list[dict[str, Any]], databases: Path, split: str) -> tuple[list[dict[str, Any]], int]:
    """The tasks, and how many questions were left out, because their gold query fails, is slow or gives no row."""
    tasks, schemas, left_out = [], {}, 0
    for number, asked in enumerate(questions):
        name = asked["db_id"]
        file = (databases / name / f"{name}.sqlite").resolve()
        sql = asked["SQL"] if "SQL" in asked else asked["query"]
        path = os.path.relpath(file, HERE)
        try:
            rows = run_query(path, sql)
        except QueryError:
            rows = []
        if not rows:
            left_out += 1
            continue
        if file not in schemas:
            schemas[file] = read_schema(file)
        hint = f"\nHint: {asked['evidence']}" if asked.get("evidence") else ""
        tasks.append(
            {
                "id": f"{split}-{number}",
                "input": {
                    "database": path,
                    "schema": TASK + schemas[file],
                    "question": f"Question: {asked['question']}{hint}",
                },
                "private": {"sql": sql, "ordered": is_ordered(sql)},
            }
        )
    return tasks, left_out


def read_schema(file: Path) -> str:
    """The CREATE TABLE statements of the database, blanks and comments drawn together."""
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    try:
        found = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        statements = [re.sub(r"--.*", "", statement) for (statement,) in found]
    finally:
        connection.close()
    return "\n".join(re.sub(r"\s+", " ", statement).strip() + ";" for statement in statements)


def is_ordered(sql: str) -> bool:
    """Whether the rows of the whole query are ordered: an ORDER BY outside all brackets, quoted text aside."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", sql)
    while bare != (bare := re.sub(r"\([^()]*\)", "", bare)):
        pass
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


if __name__ == "__main__":
    main()
