"""Two steps of `raygent train` by each way to learn, with all its parts: something is trained, and the weights that are served and
saved move."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import known_optimum

from raygent.actors.checkpoint import latest_checkpoint
from raygent.cluster.metrics import read_lines
from raygent.config import load
from raygent.jobs.evaluate import evaluate_checkpoint
from raygent.jobs.train import train

SMALL = [
    "run.directory=runs", "run.steps=2", "algorithm.tasks_per_step=3", "algorithm.group_size=4", "evaluate.samples=1",
    "wandb.mode=disabled", "learner.ranks=2", "learner.zero_stage=2",
]  # fmt: skip
WAYS = {  # overrides, and metrics that the second step has to have
    "ppo": (
        ["algorithm.name=ppo", "algorithm.kl=0.05", "algorithm.kl_in=reward", "algorithm.epochs=2", "algorithm.mini_batches=3"],
        ["critic/loss", "critic/returns", "critic/explained_variance"],
    ),
    "remax": (["algorithm.name=remax"], []),
    "opo": (["algorithm.name=opo"], []),
    "gpg": (["algorithm.name=gpg"], []),
    "dr_grpo": (["algorithm.name=dr_grpo", "algorithm.horizon=64"], []),
    "dapo": (["algorithm.name=dapo", "algorithm.refills=1", "algorithm.kl=0.05", "reference.ranks=1"], ["kl_reference"]),
    "sft": (["algorithm.name=sft"], []),
    "sft_of_chats": (["algorithm.name=sft", "data.chats=chats.jsonl", "algorithm.group_size=1", "algorithm.tasks_per_step=4"], []),
    "dpo": (["algorithm.name=dpo"], []),
    "distill": (["algorithm.name=distill", "algorithm.teacher=teacher", "learner.zero_stage=3"], []),
    "adapters": (["learner.lora.rank=4", "algorithm.kl=0.05"], ["kl_reference"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drivers")
    for name in ("agent.py", "train.toml"):
        shutil.copy(known_optimum.HERE / name, folder / name)
    known_optimum.prepare(folder, ("string",))
    shutil.copytree(folder / "model", folder / "teacher")
    said = [{"role": "user", "content": "3 lower"}, {"role": "assistant", "content": "abcd"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 6)
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    files = [folder / "model.safetensors", *folder.glob("adapters/*/adapter_model.safetensors")]
    return {f"{file}: {name}": value for file in files if file.is_file() for name, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_steps_and_an_evaluation(
    cluster: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    overrides, told = WAYS[way]
    monkeypatch.chdir(folder)
    run = load("train.toml", [*SMALL, f"run.name={way}", *overrides])
    train(run)
    rows: list[dict[str, Any]] = read_lines(run.run_directory / "metrics.jsonl")
    assert len(rows) == 2 and set(told) <= rows[1].keys(), rows
    assert any(row["tokens_trained"] > 0 and row["gradient_norm"] > 0 for row in rows), rows
    checkpoint = latest_checkpoint(run.run_directory)
    assert checkpoint and (checkpoint.step, checkpoint.version) == (2, 2)
    first, last = weights(folder / "model"), weights(checkpoint.path)
    if run.adapters:
        assert last and all(np.any(value) for name, value in last.items() if "lora_B" in name)
    else:
        assert any(
            not np.array_equal(value, first[f"{folder / 'model' / 'model.safetensors'}: {name.partition(': ')[2]}"])
            for name, value in last.items()
        )
    capsys.readouterr()
    evaluate_checkpoint(load("train.toml", [*SMALL, f"run.name={way}", *overrides]))
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation at "))
    assert told.startswith("evaluation at step 2: reward ")
