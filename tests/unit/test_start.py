"""A Ray of our own that does not come up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raygent.cluster.start import submit_and_follow
from raygent.config import Config

RAY = """#!{python}
import socket, sys
port = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--dashboard-port="))
with socket.create_server(("127.0.0.1", port)) as server:
    server.accept()[0].close()  # the dashboard is there before the raylet
print("the raylet did not register")
sys.exit(1)
"""


def test_a_ray_that_ends_while_it_starts_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "ray").write_text(RAY.format(python=sys.executable))
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "input": 1}\n')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = Config.model_validate(
        {"model": {"path": "model"}, "agent": {"run": "agent.py:answer"}, "data": {"train": "tasks.jsonl"}}
    )
    with pytest.raises(RuntimeError, match=r"(?s)Ray did not start; its logs are in .*the raylet did not register"):
        submit_and_follow(config, "raygent.jobs.train", [])
