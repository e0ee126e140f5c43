"""Coding agents' command-line programs, by the scripts and the TOML of docs/coding_agents.md: what each asks is served and recorded.

The model is a random one, so they do nothing but talk; it ends its replies by itself.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_model import make_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "coding_agents.md").read_text()
SCRIPTS = {name: text for text, name in re.findall(r"```sh\n(#!/bin/sh\n# (\S+)\n.*?)```", PAGE, re.DOTALL)}
APIS = {"claude.sh": "messages", "codex.sh": "responses", "qwen.sh": "chat", "opencode.sh": "chat"}
CONTEXT = 131_072  # the tokens are bytes
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm installs the programs"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coding")
    packages = re.search(r"`npm install ([^`]+)`", PAGE)[1].split()
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages], check=True)
    make_tiny_model(folder / "model", context=CONTEXT)
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "tasks.jsonl").write_text('{"id": "1", "input": "Say hello."}\n')
    (folder / "other.jsonl").write_text('{"id": "2", "input": "Say goodbye."}\n')
    (folder / "grade.py").write_text("def grade(output):\n    return 1.0\n")
    toml = re.search(r"```toml\n# coding.toml\n(.*?)```", PAGE, re.DOTALL)[1]
    toml = re.sub(
        r"context = \d+", f'context = {CONTEXT}\npath = "model"\nmax_tokens = 3000\ntool_parser = "hermes"', toml
    )
    toml += '\n[data]\ntrain = "tasks.jsonl"\neval = "other.jsonl"\n[grader]\nrun = "grade.py:grade"\n'
    (folder / "coding.toml").write_text(toml.replace("timeout_s = 1800.0", "timeout_s = 240.0"))
    return folder


def test_the_page_has_a_script_for_each():
    assert set(SCRIPTS) == set(APIS)


@pytest.mark.parametrize("script", APIS)
def test_a_coding_agent_runs_as_the_page_says(folder, script):
    name = script.removesuffix(".sh")
    command = ["try", "coding.toml", f'agent.command=["./{script}"]', f"run.name={name}"]
    done = subprocess.run(
        [sys.executable, "-m", "raygent.cli", *command],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder}/node_modules/.bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    calls = pq.read_table(folder / "runs" / f"{name}-try" / "store" / "calls").to_pylist()
    assert {call["api"] for call in calls} == {APIS[script]}
    mine = [call for call in calls if call["agent"] == "agent"]
    assert mine and all(call["trainable"] and call["response_token_ids"] for call in mine)
    assert any("Say hello." in call["request"] for call in mine)
