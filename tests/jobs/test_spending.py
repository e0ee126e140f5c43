"""A run that a judge makes costly: it ends at the limit with one line, and goes on under a higher one."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from running import make_run
from vendor import serving

from raygent.cluster.metrics import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "sk-that-nobody-may-see"
COST = 0.003  # of a call
AGENT = """
import openai

async def answer(task, model):
    async with openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0) as client:
        messages = [{"role": "user", "content": task}]
        said = (await client.chat.completions.create(model="writer", messages=messages, max_tokens=8)).choices[0].message.content
        messages += [{"role": "assistant", "content": said}]
        judged = await client.chat.completions.create(model="judge", messages=messages)
        assert judged.choices[0].message.content == "well said"
    return sum(letter.isalpha() for letter in said) / max(len(said), 1)
"""


def train(folder, *overrides):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "raygent.cli", "train", "run.toml", *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        env=environment | {"JUDGE_KEY": KEY},
    )


def test_a_run_ends_at_its_limit_and_goes_on_under_a_higher_one(tmp_path):
    path = make_run(tmp_path, 3)
    (tmp_path / "agent.py").write_text(AGENT)
    with serving() as vendor:
        path.write_text(
            path.read_text().replace('[grader]\nrun = "agent.py:grade"\n', "")
            + f'[upstream.vendor]\nagents = ["judge"]\nbase_url = "{vendor.base_url}"\nmodel = "big"\n'
            'api_key_env = "JUDGE_KEY"\nprice_input = 2.0\nprice_output = 100.0\nmax_cost = 0.1\n'
        )  # the evaluation costs 8 x COST, a step 16 x COST: over in the second step
        ended = train(tmp_path)
        run = tmp_path / "runs" / "chaos"
        assert (
            ended.returncode != 0 and "upstream.vendor.max_cost: the run has spent 0.1" in ended.stdout + ended.stderr
        )
        assert "Traceback" not in ended.stdout + ended.stderr
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
        assert 34 <= len(vendor.requests) <= 42  # with those that were on their way: max_parallel is 8
        (run / "upstreams.json").unlink()  # what a kill may leave unwritten, the store knows
        refused = train(tmp_path)
        assert "upstream.vendor.max_cost: the run has spent 0.1" in refused.stdout + refused.stderr
        assert refused.returncode != 0 and len(vendor.requests) <= 42
        done = train(tmp_path, "upstream.vendor.max_cost=5.0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["upstream/vendor/calls"] == 16 for row in rows)
    assert all(row["upstream/vendor/cost"] == pytest.approx(16 * COST) for row in rows)
    calls = pq.read_table(run / "store" / "calls").to_pylist()
    spent = json.loads((run / "upstreams.json").read_text())["vendor"]
    assert spent == pytest.approx(sum(call["cost"] for call in calls)) == pytest.approx(len(vendor.requests) * COST)
    attempts = pq.read_table(run / "store" / "attempts").to_pylist()
    assert {row["outcome"] for row in attempts} <= {"succeeded", "upstream_lost", "lease_lost", "cancelled"}
    told = ended.stdout + ended.stderr + done.stdout + done.stderr
    assert KEY not in told
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
