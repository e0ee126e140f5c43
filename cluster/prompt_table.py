"""The table `prompts` of a run that changes prompts, alone or in turn with the weights: `store/prompts/prompts.parquet`, all
versions of all prompts with their parents, written whole by the driver; and `prompts/NAME.txt`, the best version of each as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from raygent.actors.checkpoint import Checkpoint
from raygent.actors.segments import write_atomically
from raygent.actors.store_tables import read_parquet, write_parquet
from raygent.cluster.digests import digest, evaluation_digest
from raygent.cluster.metrics import read_lines
from raygent.config import Config, ConfigError
from raygent.records import PROMPTS, PromptVersion, Task, to_batch

Row = dict[str, Any]
BEGUN = "begun.json"  # a file of the run: what its prompts are scored by


def scored_by(config: Config, tasks: list[Task]) -> dict[str, str]:
    """Digests of what the scores of prompts depend on: the training tasks, and the rest (digests.evaluation_digest())."""
    return {
        "tasks": digest(*([task.id, task.input, task.private] for task in tasks)),
        "rest": evaluation_digest(config),
    }


def note_begun(config: Config, tasks: list[Task]) -> None:
    write_atomically(config.run_directory / BEGUN, [json.dumps(scored_by(config, tasks)).encode()])


def begun_by(run_directory: Path) -> dict[str, str] | None:
    """scored_by() as the run was begun; None of one not begun. Raises ConfigError."""
    file = run_directory / BEGUN
    try:
        found = json.loads(file.read_text())
        return {name: found[name] for name in ("tasks", "rest")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"run.name: {file} is not whole ({error!r}); delete it to go on with the run") from error


def file_of(store: Path) -> Path:
    return store / "prompts" / "prompts.parquet"


def write_prompts(run_directory: Path, rows: list[Row]) -> None:
    file, texts = file_of(run_directory / "store"), run_directory / "prompts"
    for folder in (file.parent, texts):
        folder.mkdir(parents=True, exist_ok=True)
    write_parquet(file, pa.Table.from_batches([to_batch(PROMPTS, rows)]))
    for row in rows:
        if row["best"]:
            write_atomically(texts / f"{row['name']}.txt", [f"{row['text']}\n".encode()])


def read_prompts(run_directory: Path) -> list[Row]:
    """Empty where no step has ended yet. Raises StoreDamaged."""
    file = file_of(run_directory / "store")
    return read_parquet(file).to_pylist() if file.is_file() else []


def steps_done(run_directory: Path) -> int:
    return len(read_lines(run_directory / "metrics.jsonl"))


def prompts_in_force(config: Config, checkpoint: Checkpoint | None) -> dict[str, PromptVersion]:
    """Where a run changes prompts alone its best until now, where it does in turn with the weights the checkpoint's; else the
    first ones."""
    if config.changes_prompts:
        best = [row for row in read_prompts(config.run_directory) if row["best"]]
        found: dict[str, PromptVersion] = {
            row["name"]: {"version": row["version"], "text": row["text"]} for row in best
        }
    else:
        found = checkpoint.prompts if checkpoint else {}
    return found or {name: {"version": 0, "text": text} for name, text in config.first_prompts().items()}
