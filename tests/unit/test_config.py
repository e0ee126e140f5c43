"""A user's mistakes, through the real command: each is one line that names the key and the mend, before anything starts."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_origin

import psutil
import pytest
from tiny_model import make_tiny_model

from raygent.algorithms.verl_names import SOUND_LOSSES, UNSOUND_LOSSES
from raygent.cli import main
from raygent.config import Config, ConfigError, load
from raygent.data_files import load_tasks
from raygent.jobs import check
from raygent.jobs.dry_run import count_parameters, memory_estimate

DOCS = Path(__file__).parents[2] / "docs"
RAY_PROCESSES = ("raylet", "gcs_server")
AGENT = """
def answer(task, model):
    return task

def grade(input, private, output):
    return float(private == output)

def unlike(output, expected):
    return 0

def greedy(task, model, temperature, seed):
    return task

number = 3
"""


@pytest.fixture(autouse=True)
def own_environment():
    """The command sets variables: that ends with the test."""
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder, all of it right."""
    (tmp_path / "adder.py").write_text(AGENT)
    (tmp_path / "train.jsonl").write_text(
        '{"id": "1", "input": "1 + 1", "private": "2"}\n{"id": 2, "input": "2 + 2"}\n'
    )
    (tmp_path / "test.jsonl").write_text('{"id": "1", "input": "3 + 3", "private": "6"}\n')
    make_model(tmp_path / "model")
    (tmp_path / "train.toml").write_text(toml())
    return tmp_path


def make_model(folder: Path) -> None:
    """A folder that looks like a model: one tensor of 2 x 3."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": 512, "vocab_size": 100, "num_attention_heads": 2})
    )
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))


def toml(**sections: str) -> str:
    """The right TOML, with the text of some sections replaced ("": left out)."""
    texts = {
        "model": 'path = "model"',
        "agent": 'run = "adder.py:answer"',
        "grader": 'run = "adder.py:grade"',
        "data": 'train = "train.jsonl"\neval = "test.jsonl"',
    } | sections
    return "".join(f"[{name.replace('__', '.')}]\n{text}\n" for name, text in texts.items() if text)


def refused(capsys, *arguments: str | Path) -> str:
    """What the command, run in this process, says to `arguments`: one line, exit code 2, with no Ray started."""
    children = ray_processes()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("raygent: ") and said.count("\n") == 1 and "Traceback" not in said, said
    assert ray_processes() == children
    return said


def ray_processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.name() in RAY_PROCESSES}


# the TOML

UPSTREAM = 'agents = ["judge"]\nmodel = "m"\n'
WRONG_SECTIONS = {
    "key_misspelt": ({"run": "stepz = 3"}, r"run\.stepz: unknown key; did you mean steps\?"),
    "key_of_another_section": ({"learner": "steps = 3"}, r"learner\.steps: unknown key; it belongs in \[run\]"),
    "key_of_none": ({"wandb": "zebra = 3"}, r"wandb\.zebra: unknown key; known here: project, mode"),
    "section_misspelt": ({"model": "", "modle": 'path = "model"'}, r"modle: unknown key; did you mean model\?"),
    "path_on_top": ({"model": "", "path": "x = 1"}, r"path: unknown key; it belongs in \[model\]"),
    "no_model": ({"model": ""}, r"model: missing; add a section \[model\]"),
    "no_model_path": ({"model": "context = 128"}, r'model\.path: missing; write path = "'),
    "no_agent": ({"agent": ""}, r"agent: missing; add a section \[agent\]"),
    "agent_without_a_way": ({"agent": "max_calls = 3"}, r"agent\.run: missing; give either"),
    "agent_two_ways": ({"agent": 'run = "adder.py:answer"\ncommand = ["cat"]'}, r"agent\.run: given beside"),
    "no_data": ({"data": ""}, r"data: missing; add a section \[data\]"),
    "no_data_train": ({"data": 'eval = "test.jsonl"'}, r'data\.train: missing; write train = "train.jsonl"'),
    "type": ({"run": 'steps = "ten"'}, r"run\.steps: should be a valid integer, not 'ten'"),
    "boolean_for_a_number": ({"run": "steps = true"}, r"run\.steps: should be a valid integer, not True"),
    "text_for_a_list": ({"agent": 'run = "adder.py:answer"\ntrain = "a*"'}, r"agent\.train: should be a list; write \['a\*'\]"),
    "empty_list": ({"agent": 'run = "adder.py:answer"\ntrain = []'}, r"agent\.train: should have at least one entry"),
    "empty_command": ({"agent": "command = []"}, r"agent\.command: should have at least one entry"),
    "prompt_not_there": ({"prompts": 'writer = "writer.txt"'}, r"prompts\.writer: no file .*writer\.txt; give a text file"),
    "prompt_no_text": ({"prompts": "writer = 3"}, r"prompts\.writer: should be a valid string, not 3"),
    "prompts_a_value": ({"run": "prompts = 3"}, r"run\.prompts: unknown key"),
    "turns_of_all": (
        {"algorithm": 'prompts = {name = "apo", every = 5, selection_tasks = 2}', "prompts": 'writer = "adder.py"'},
        r"algorithm\.prompts\.selection_tasks: 2 of the 2 tasks of data\.train leave none to learn from; lower it",
    ),
    "turns_without_every": ({"algorithm": 'prompts = {name = "apo"}'}, r"algorithm\.prompts\.every: missing"),
    "apo_without_prompts": ({"algorithm": 'name = "apo"'}, r"prompts: missing, and algorithm\.name = \"apo\" improves"),
    "selection_of_all": (
        {"algorithm": 'name = "apo"\nselection_tasks = 2', "prompts": 'writer = "adder.py"'},
        r"algorithm\.selection_tasks: 2 of the 2 tasks of data\.train leave none to learn from; lower it",
    ),
    "train_no_path": ({"data": "train = 3"}, r"data\.train: should be a path, or a list of paths, not 3"),
    "train_no_paths": ({"data": "train = []"}, r"data\.train: should be a path, or a list of paths, not \[\]"),
    "train_empty_path": ({"data": 'train = ["a.jsonl", ""]'}, r"data\.train: should be a path, or a list of paths, not"),
    "train_one_name": ({"data": 'train = ["a/x.jsonl", "b/x.jsonl"]'}, r"data\.train: a/x\.jsonl and b/x\.jsonl have one name, 'x'"),
    "weights_of_one_file": ({"data": 'train = "train.jsonl"\nweights = [1]'}, r"data\.weights: there are no files to weigh; write"),
    "weights_too_few": ({"data": 'train = ["a", "b"]\nweights = [1]'}, r"data\.weights: 1 for the 2 files of data\.train"),
    "weights_none": ({"data": 'train = ["a", "b"]\nweights = []'}, r"data\.weights: 0 for the 2 files of data\.train"),
    "weight_zero": ({"data": 'train = ["a", "b"]\nweights = [1, 0]'}, r"data\.weights\.1: should be greater than 0, not 0"),
    "weights_of_prompts": (
        {"data": 'train = ["a", "b"]\nweights = [1, 1]', "algorithm": 'name = "apo"', "prompts": 'w = "adder.py"'},
        r"data\.weights: apo draws its tasks by itself; leave weights out",
    ),
    "curriculum_of_prompts": (
        {"data": 'train = "a"\ncurriculum = true', "algorithm": 'name = "gepa"', "prompts": 'w = "adder.py"'},
        r"data\.curriculum: gepa draws its tasks by itself; leave curriculum out",
    ),
    "curriculum_of_rollouts": (
        {"data": 'rollouts = "r"\ncurriculum = true', "algorithm": 'name = "dpo"'},
        r"data\.curriculum: what is trained on was recorded before, so no tasks are drawn; leave curriculum out",
    ),
    "curriculum_of_chats": ({"data": 'chats = "r"\ncurriculum = true', "algorithm": 'name = "sft"'}, r"data\.curriculum: .* recorded"),
    "curriculum_of_a_teacher": (
        {"data": 'train = "a"\ncurriculum = true', "algorithm": 'name = "distill"\nteacher = "t"\ngroup_size = 8'},
        r"data\.curriculum: distill learns from a teacher and not by rewards",
    ),
    "curriculum_of_one": (
        {"data": 'train = "a"\ncurriculum = true', "algorithm": 'name = "ppo"\ngroup_size = 1\ntasks_per_step = 16'},
        r"data\.curriculum: it measures how .* algorithm\.group_size = 1; use 2 or more",
    ),
    "warmup_of_all_steps": (
        {"algorithm": 'name = "ppo"', "critic": "warmup_steps = 5", "run": "steps = 5"},
        r"critic\.warmup_steps: 5 of run\.steps = 5 leave none in which the policy learns; lower it",
    ),
    "empty_text": ({"model": 'path = ""'}, r"model\.path: should not be empty"),
    "nan": ({"learner": "learning_rate = nan"}, r"learner\.learning_rate: should be a finite number, not nan"),
    "infinite": ({"engine": "temperature = inf"}, r"engine\.temperature: should be a finite number"),
    "negative": ({"run": "steps = -1"}, r"run\.steps: should be greater than or equal to 0, not -1"),
    "zero": ({"agent": 'run = "adder.py:answer"\ntimeout_s = 0'}, r"agent\.timeout_s: should be greater than 0"),
    "choice": ({"agent": 'run = "adder.py:answer"\nin = "thread"'}, r"agent\.in: should be 'process' or 'subprocess'"),
    "slash_in_the_name": ({"run": 'name = "my/run"'}, r"run\.name: a name of .* letters, .*not 'my/run'"),
    "group_of_one": ({"algorithm": "group_size = 1"}, r"algorithm\.group_size: grpo compares .* use 2 or more"),
    "min_group": ({"algorithm": "group_size = 4\nmin_group = 5"}, r"algorithm\.min_group: 5 is more than .*lower it"),
    "mini_batches": ({"algorithm": "mini_batches = 3"}, r"algorithm\.mini_batches: .* choose a divisor of 128"),
    "ranks": ({"learner": "ranks = 3"}, r"learner\.ranks: 128 rollouts .* choose a divisor of 128"),
    "checkpoint": ({"evaluate": 'checkpoint = "last"'}, r"evaluate\.checkpoint: the steps that one .* or \"best\", not 'last'"),
    "zero_stage": ({"learner": "zero_stage = 7"}, r"learner\.zero_stage: should be 0, 1, 2 or 3, not 7"),
    "betas": ({"learner": "betas = [0.9, 1.5]"}, r"learner\.betas\.1: should be less than 1"),
    "lora": ({"learner": "lora = 8"}, r"learner\.lora: a section, not the value 8; write \[learner\.lora\] and its keys below it"),
    "lora key": ({"learner": "lora = {rnk = 8}"}, r"learner\.lora\.rnk: unknown key; did you mean rank\?"),
    "policies without lora": (
        {"agent": 'run = "adder.py:answer"\npolicies = {w = ["writer"]}'},
        r"agent\.policies: a policy of an agent's own is a LoRA adapter; add \[learner\.lora\]",
    ),
    "policy's name": (
        {"agent": 'run = "adder.py:answer"\npolicies = {base = ["writer"]}', "learner": "lora = {}"},
        r"agent\.policies: the name base means another thing; take another",
    ),
    "agent without policy": (
        {"agent": 'run = "adder.py:answer"\npolicies = {w = ["writer"]}\ntrain = ["writer", "judge"]', "learner": "lora = {}"},
        r"agent\.train: judge has no policy to train; add it to one in agent\.policies",
    ),
    "loss_unknown": ({"algorithm": 'loss = "vanila"'}, r"algorithm\.loss: no loss 'vanila' in verl .*use one of vanilla"),
    "loss_unsound": ({"algorithm": 'loss = "sapo"'}, r"algorithm\.loss: sapo can't weight tokens: it averages"),
    "no_room": ({"model": 'path = "model"\ncontext = 64\nmax_tokens = 64'}, r"model\.max_tokens: 64 leaves no room"),
    "workers": ({"workers": "min = 3\nmax = 2"}, r"workers\.max: 2 is below workers\.min = 3; raise"),
    "gpus_of_engines_alone": ({"engine": "gpus = 1"}, r"learner\.gpus: engines on GPUs .*set learner\.gpus = 1"),
    "upstream_port": ({"upstream__judge": UPSTREAM + 'base_url = "http://localhost:99999/v1"'}, r"upstream\.judge\.base_url: .* is no URL"),
    "upstream_bracket": ({"upstream__judge": UPSTREAM + 'base_url = "http://[::1/v1"'}, r"upstream\.judge\.base_url: .* is no URL"),
    "upstream_of_no_agent": ({"upstream__judge": 'base_url = "http://x"\nmodel = "m"'}, r"upstream\.judge\.agents: missing"),
    "upstream_without_a_name": ({"upstream": UPSTREAM}, r"upstream\.agents: a value, and not an upstream; .* \[upstream\.NAME\]"),
    "upstream_key": ({"upstream__judge": UPSTREAM + "cost = 1"}, r"upstream\.judge\.cost: unknown key; did you mean max_cost\?"),
    "upstream_key_elsewhere": ({"agent": 'run = "adder.py:answer"\nbase_url = "x"'}, r"it belongs in \[upstream\.NAME\]"),
    "upstream_url": ({"upstream__judge": UPSTREAM + 'base_url = "api.openai.com"'}, r"upstream\.judge\.base_url: 'api\.openai\.com' is no URL"),
    "upstream_password": (
        {"upstream__judge": UPSTREAM + 'base_url = "https://me:hidden@api.openai.com/v1"'},
        r"upstream\.judge\.base_url: has a user or a password (?!.*hidden).*upstream\.judge\.api_key_env",
    ),
    "upstream_password_in_no_url": (
        {"upstream__judge": UPSTREAM + 'base_url = "me:hidden@api.openai.com/v1"'},
        r"upstream\.judge\.base_url: has a user or a password (?!.*hidden)",
    ),
    "upstream_trained": (
        {"agent": 'run = "adder.py:answer"\ntrain = ["w*", "judge"]', "upstream__vendor": UPSTREAM + 'base_url = "http://x"'},
        r"agent\.train: 'judge' has upstream\.vendor for a model, which is not trained; take it out of",
    ),
    "upstream_key_of_nobody": (
        {"upstream__judge": UPSTREAM + 'base_url = "http://x"\napi_key_env = "NO_SUCH_KEY"'},
        r"upstream\.judge\.api_key_env: the environment variable NO_SUCH_KEY is not set; set it",
    ),
    "upstream_free_and_limited": (
        {"upstream__judge": UPSTREAM + 'base_url = "http://x"\nmax_cost = 5.0'},
        r"upstream\.judge\.max_cost: nothing is known to cost anything; set upstream\.judge\.price_input",
    ),
    "upstream_shared_by_many": (
        {"upstream__judge": UPSTREAM + 'base_url = "http://x"\nmax_parallel = 1', "engine": "replicas = 2"},
        r"upstream\.judge\.max_parallel: 1 is less than engine\.replicas = 2",
    ),
    # files that the TOML names
    "no_data_file": ({"data": 'train = "tran.jsonl"'}, r"data\.train: no file .*; did you mean train\.jsonl\?"),
    "data_folder": ({"data": 'train = "."'}, r"data\.train: .* is a folder; give a JSONL or Parquet file"),
    "no_file_of_some": ({"data": 'train = ["train.jsonl", "tran.jsonl"]'}, r"data\.train: no file .*tran\.jsonl; did you mean"),
    "held_out_of_some": ({"data": 'train = ["adder.py", "train.jsonl"]\neval = "train.jsonl"'}, r"data\.eval: the same file"),
    "id_of_two_files": (
        {"data": 'train = ["train.jsonl", "test.jsonl"]'},
        r"data\.train: .*test\.jsonl line 1 repeats the id '1' of .*train\.jsonl line 1; ids are unique",
    ),
    "same_data": ({"data": 'train = "train.jsonl"\neval = "./train.jsonl"'}, r"data\.eval: the same file as data\.train"),
    "model_misspelt": ({"model": 'path = "./modl"'}, r"model\.path: no folder .*modl; did you mean .*model\?"),
    "model_far_off": ({"model": 'path = "/no/such/model"'}, r"model\.path: no folder .*; give a Hugging Face id"),
    "model_file": ({"model": 'path = "model/model.safetensors"'}, r"model\.path: .* is a file; give the folder"),
    "no_home": ({"data": 'train = "~nobody-of-test/x.jsonl"'}, r"data\.train: nobody's home .*; write the path out"),
    "kl_kind": ({"algorithm": 'kl_kind = "k4"'}, r"algorithm\.kl_kind: should be 'k1', 'k2' or 'k3', not 'k4'"),
    "no_template": ({"model": 'path = "model"\nchat_template = "x.jinja"'}, r"model\.chat_template: no file .*Jinja"),
    "context": ({"model": 'path = "model"\ncontext = 4096'}, r"model\.context: 4096 is more than the model's 512"),
    "tool_parser": ({"model": 'path = "model"\ntool_parser = "hermez"'}, r"model\.tool_parser: vLLM has no 'hermez'; did"),
    "reasoning_parser": ({"model": 'path = "model"\nreasoning_parser = "qwen33"'}, r"model\.reasoning_parser: .*qwen3\?"),
    # code that the TOML names
    "agent_names_no_function": ({"agent": 'run = "adder.py"'}, r"agent\.run: .*write .file\.py:function"),
    "no_agent_file": ({"agent": 'run = "ader.py:answer"'}, r"agent\.run: no file .*did you mean adder\.py\?"),
    "no_agent_module": ({"agent": 'run = "no_such:answer"'}, r"agent\.run: .* cannot be imported: ModuleNotFoundError"),
    "agent_function_like_none": ({"agent": 'run = "adder.py:zzz"'}, r"agent\.run: adder\.py has no 'zzz'; it has .*answer"),
    "no_agent_function": ({"agent": 'run = "adder.py:anser"'}, r"agent\.run: adder\.py has no 'anser'; did you mean answer\?"),
    "agent_no_function": ({"agent": 'run = "adder.py:number"'}, r"agent\.run: .* is int, not a function; name a callable"),
    "agent_asks_too_much": ({"agent": 'run = "adder.py:greedy"'}, r"agent\.run: takes .* called with \(task, model\)"),
    "agent_raises": ({"agent": 'run = "broken.py:answer"'}, r"agent\.run: .* cannot be imported: RuntimeError: two lines"),
    "agent_exits": ({"agent": 'run = "crash.py:answer"'}, r"agent\.run: .* cannot be imported: SystemExit"),
    "no_grader_file": ({"grader": 'run = "reward.py:rows"'}, r"grader\.run: no file .*relative to the TOML"),
    "grader_raises": ({"grader": 'run = "broken.py:grade"'}, r"grader\.run: .* cannot be imported: RuntimeError"),
    "grader_in_c": ({"grader": 'run = "builtins:max"'}, r"grader\.run: its parameters are not to be seen"),
    "grader_asks_else": ({"grader": 'run = "adder.py:unlike"'}, r"grader\.run: takes \(output, expected\); it is called"),
    "no_program": ({"agent": 'command = ["no-such-program"]'}, r"agent\.command: no program .* on PATH; install it"),
    "no_program_here": ({"agent": 'command = ["./agent.sh"]'}, r"agent\.command: no program .*/agent\.sh that can be run; paths"),
    "no_environment": ({"agent": 'command = [".venv/bin/python", "adder.py"]'}, r"agent\.command: .*/\.venv/bin/python that can"),
    "program_is_a_folder": ({"agent": 'command = ["./model"]'}, r"agent\.command: no program .*/model that can be run; paths"),
    "not_executable": ({"agent": 'command = ["./adder.py"]'}, r"agent\.command: .*make it executable \(chmod \+x adder\.py\)"),
    "beside_the_toml": ({"agent": 'command = ["adder.py"]'}, r"agent\.command: no program 'adder\.py' .*write \./adder\.py"),
    "limits_of_a_function": ({"agent": 'run = "adder.py:answer"\nmemory_mb = 500'}, r"agent\.memory_mb: .*set agent\.in = "),
    "number_of_functions": ({"agent": 'run = "adder.py:answer"\nprocesses = 5'}, r"agent\.processes: .*or leave processes out"),
    "no_memory": ({"agent": 'command = ["cat"]\nmemory_mb = 0'}, r"agent\.memory_mb: should be greater than or equal to 1"),
    "no_script": ({"agent": 'command = ["python3", "agent.py"]'}, r"agent\.command: no file .*agent\.py; paths are"),
    # the engine
    "vllm_argument": ({"engine": "gpu_memory_utilisation = 0.5"}, r"engine\.gpu_.*did you mean gpu_memory_utilization\?"),
    "engine_key": ({"engine": "replica = 2"}, r"engine\.replica: unknown key; did you mean replicas\?"),
    "engine_stranger": ({"engine": "max_tokens = 2"}, r"engine\.max_tokens: unknown key; it belongs in \[model\]"),
    "vllm_type": ({"engine": 'max_num_seqs = "many"'}, r"engine\.max_num_seqs: vLLM wants int, not 'many'"),
    "vllm_flag_type": ({"engine": "max_num_seqs = true"}, r"engine\.max_num_seqs: vLLM wants int, not True"),
    "ours": ({"engine": "max_model_len = 128"}, r"engine\.max_model_len: raygent sets it; use model\.context"),
    "ours_alone": ({"engine": 'logprobs_mode = "raw_logprobs"'}, r"engine\.logprobs_mode: .*; leave it out"),
    "ranks_on_one_gpu": ({"learner": "gpus = 0.5\nranks = 2"}, r"learner\.gpus: ranks cannot share a GPU; set learner\.gpus = 1"),
    "flash_on_cpu": ({"learner": 'attention = "flash_attention_2"'}, r"learner\.attention: .* is for GPUs and half precision"),
    "sequence_parallel_ranks": (
        {"learner": "ranks = 2\nsequence_parallel = 3"},
        r"learner\.sequence_parallel: 3 does not divide learner\.ranks = 2",
    ),
    "sequence_parallel_eager": (
        {"learner": 'ranks = 2\nsequence_parallel = 2\nattention = "eager"'},
        r'learner\.sequence_parallel: eager attention .*set learner\.attention = "sdpa"',
    ),
    "sequence_parallel_packed": (
        {"learner": "ranks = 2\nsequence_parallel = 2\npacked = true"},
        r"learner\.sequence_parallel: sdpa would see beyond a packed sample; leave learner\.packed out",
    ),
    "sequence_parallel_heads": (
        {"learner": "ranks = 4\nsequence_parallel = 4"},
        r"learner\.sequence_parallel: 4 ranks cannot share out the model's 2 heads of attention",
    ),
    "offload_zero_0": ({"learner": "zero_stage = 0\noffload_optimiser = true"}, r"learner\.offload_optimiser: ZeRO-0 .*zero_stage = 2"),
    "replicas_on_one_gpu": (
        {"learner": "gpus = 0.5\nranks = 1", "engine": "gpus = 0.5\nreplicas = 2"},
        r"engine\.gpus: replicas do not share a GPU; set engine\.gpus = 1",
    ),
    "one_and_a_half_gpus": ({"learner": "gpus = 1", "engine": "gpus = 1.5"}, r"engine\.gpus: 1\.5 is neither a whole number"),
    "tensor_parallel": ({"engine": "tensor_parallel_size = 2"}, r"engine\.tensor_parallel_size: .*needs engine\.gpus = 2"),
    "host": ({"engine": 'host = "192.0.2.1"'}, r"engine\.host: cannot serve on '192\.0\.2\.1'"),
    "host_of_nul": ({"engine": r'host = "a\u0000"'}, r"engine\.host: cannot serve on .*; use 127"),
    "no_tensor_parallel": ({"engine": "tensor_parallel_size = 0"}, r"engine\.tensor_parallel_size: 0 is below 1"),
    # what is no path at all
    "long_model": ({"model": f'path = "{"m" * 256}"'}, r"model\.path: 'mmm.* is no path: it is too long"),
    "long_data": ({"data": f'train = "{"d/" * 2100}"'}, r"data\.train: 'd/d.* is no path"),
    "nul_in_the_directory": ({"run": r'directory = "a\u0000"'}, r"run\.directory: 'a.x00' is no path: .*a NUL"),
    "nul_in_the_command": ({"agent": r'command = ["cat", "\u0000"]'}, r"agent\.command: no argument .* can hold a NUL"),
    "hub_id": ({"model": 'path = "x--y"'}, r"model\.path: x--y is neither a folder here nor an id of the hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SECTIONS)
def test_a_wrong_section_is_one_line(project, capsys, case):
    (project / "broken.py").write_text("raise RuntimeError('two lines\\nof it')")
    (project / "crash.py").write_text("raise SystemExit(0)")
    sections, expected = WRONG_SECTIONS[case]
    (project / "train.toml").write_text(toml(**sections))
    assert re.search(expected, refused(capsys, "train", project / "train.toml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model = "model"\nagent = 3\ndata = 1', r"model: a section, not the value 'model'; add a section"),
        ('run = "x"\n' + toml(), r"run: a section, not the value 'x'; write \[run\] and its keys below it"),
        ("[[run]]\nsteps = 1\n" + toml(), r"run: a section, not the value \[\{'steps': 1\}\]"),
        ("steps = 3\n" + toml(), r"steps: unknown key; it belongs in \[run\]"),
        ("[model\n", r"not valid TOML: .*line 1"),
        ("", r"model: missing"),
        (b"name = '\xff'", r"not valid TOML: .*decode byte"),
    ],
)
def test_a_wrong_file_is_one_line(project, capsys, text, expected):
    content = text if isinstance(text, bytes) else text.encode()
    (project / "train.toml").write_bytes(content)
    assert re.search(expected, refused(capsys, "train", project / "train.toml"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=3", r"steps=3: an override is written section\.key=value"),
        ("run.steps", r"run\.steps: an override is written"),
        ("run.steps=", r"run\.steps: should be a valid integer, not ''"),
        ("run..steps=3", r"an override is written"),
        ("run.stepz=3", r"run\.stepz: unknown key; did you mean steps\?"),
        ("model.path.x=3", r"model\.path\.x: path is a value, not a section"),
        ("--steps=3", r"unknown argument --steps=3"),
    ],
)
def test_a_wrong_override_is_one_line(project, capsys, override, expected):
    assert re.search(expected, refused(capsys, "train", project / "train.toml", override))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", r"holds no task"),
        ("{'id': 1}\n", r"line 1 is not JSON: .*give one row a line"),
        ('{"id": 1, "input": 1}\n\n{"id": 2}\n', r'line 3 needs "id" and "input".*, not \'id\''),
        ('[{"id": 1, "input": 1}]', r'line 1 needs "id" and "input" .*, not list'),
        ('{"id": 1, "input": 1, "gold": 2}', r"line 1 has 'gold'; put it under input or private"),
        ('{"id": 1, "input": 1}\n{"id": "1", "input": 2}', r"line 2 repeats the id '1' of line 1; ids are unique"),
        ('{"id": null, "input": 1}', r"line 1: the id is a text or a whole number, not None"),
        (b"\xff\xfe", r"is not UTF-8 at byte 0"),
        ("[" * 3000, r"line 1 is not JSON: .*recursion"),
    ],
)
def test_wrong_tasks_are_one_line(project, capsys, content, expected):
    (project / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(r"data\.train: .*" + expected, refused(capsys, "train", project / "train.toml"))
    (project / "test.jsonl").write_bytes((project / "train.jsonl").read_bytes())
    (project / "train.jsonl").write_text('{"id": 1, "input": 1}')
    assert re.search(r"data\.eval: .*" + expected, refused(capsys, "evaluate", project / "train.toml"))


def test_a_broken_parquet_of_tasks_is_one_line(project, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["a", "b"], "input": [1, 2], "private": [None, {"x": 1}]}), project / "ok.parquet")
    assert [task.private for task in load_tasks(project / "ok.parquet")] == [None, {"x": 1}]
    (project / "bad.parquet").write_bytes((project / "ok.parquet").read_bytes()[:-5])
    said = refused(capsys, "train", project / "train.toml", "data.train=bad.parquet")
    assert "data.train" in said and "not a whole Parquet file" in said
    pq.write_table(pa.table({"id": ["a"], "input": [b"\x00"]}), project / "bytes.parquet")
    said = refused(capsys, "train", project / "train.toml", "data.train=bytes.parquet")
    assert "values that JSON has not" in said


def test_a_task_may_hold_any_text(tmp_path):
    text = "a\u2028b\x85c"
    (tmp_path / "t.jsonl").write_text(
        "\ufeff" + json.dumps({"id": 1, "input": text}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert load_tasks(tmp_path / "t.jsonl")[0].input == text


def test_wrong_paths_on_the_command_line(project, capsys):
    assert "no such config; did you mean train.toml?" in refused(capsys, "train", project / "trian.toml")
    assert "a folder, not a config" in refused(capsys, "train", project)
    assert "invalid choice: 'trian'" in refused(capsys, "trian", project / "train.toml")
    assert "arguments are required" in refused(capsys, "train")
    assert "no run's folder; give runs/NAME" in refused(capsys, "store", "verify", project / "runs" / "x")


@pytest.mark.parametrize("content", ["[1, 2]", "null", "[" * 100_000], ids=["list", "null", "deep"])
def test_a_models_config_is_an_object(project, capsys, content):
    (project / "model" / "config.json").write_text(content)
    assert "model.path: " in refused(capsys, "train", project / "train.toml")


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_model_folder_that_lacks_something(project, capsys, lacking, expected):
    (project / "model" / lacking).unlink()
    said = refused(capsys, "train", project / "train.toml")
    assert "model.path" in said and expected in said


def test_a_run_that_stands_already(project, capsys):
    run = project / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.toml").write_text('[model]\npath = "/another/model"\n')
    toml = project / "train.toml"
    assert "run.resume: false, and" in refused(capsys, "train", toml, "run.name=mine", "run.resume=false")
    said = refused(capsys, "train", toml, "run.name=mine")
    assert "model.path" in said and "was begun with /another/model" in said
    assert "run.directory" in refused(capsys, "train", toml, "run.directory=adder.py")
    (run / "config.toml").write_text("[model]\npath = ")
    assert "config.toml is not whole" in refused(capsys, "train", toml, "run.name=mine")
    lost = "run.directory=/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    assert "job's own copy" in refused(capsys, "train", toml, lost)


@pytest.mark.parametrize(
    ("key", "now"), [("learner.ranks", 2), ("learner.zero_stage", 3), ("learner.dtype", "bfloat16")]
)
def test_a_checkpoint_that_is_cut_up_otherwise(project, capsys, key, now):
    checkpoint = project / "runs" / "mine" / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    (project / "runs" / "mine" / "config.toml").write_text(f'[model]\npath = "{project / "model"}"\n')
    as_it_is = {"learner.ranks": 1, "learner.zero_stage": 2, "learner.dtype": "float32"}
    about = {"step": 3, "version": 3, "laid_out": as_it_is}
    (checkpoint / "raygent.json").write_text(json.dumps(about))
    asked = ["run.name=mine", *(f"{name}={value}" for name, value in as_it_is.items())]
    check._check_checkpoint(load(project / "train.toml", asked))
    check.check(load(project / "train.toml", [*asked, f"{key}={now}"]), learn=False)  # an evaluation's
    said = refused(capsys, "train", project / "train.toml", *asked, f"{key}={now}")
    assert f"{key}: {now}, and " in said and "write it as it was" in said


def test_a_run_begun_by_a_job_with_another_copy_of_the_files(project):
    run = project / "runs" / "mine"
    run.mkdir(parents=True)
    for begun, same in (
        ("/ray/working_dir_files/1/model", True),
        ("/ray/working_dir_files/1/other", False),
        ("/model", False),
    ):
        (run / "config.toml").write_text(f'[model]\npath = "{begun}"\n')
        config = load(project / "train.toml", ["run.name=mine"])
        with nullcontext() if same else pytest.raises(ConfigError, match="was begun with"):
            check._check_begun(config)


def test_a_run_that_goes_on(project, capsys, monkeypatch):
    monkeypatch.setattr(check, "ENDING_S", 0.2)
    (project / "runs/run/store").mkdir(parents=True)
    with (project / "runs/run/store/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "run.name: " in (said := refused(capsys, "train", project / "train.toml")) and "goes on" in said


def test_try_leaves_a_try_that_goes_on_alone(project, capsys, monkeypatch):
    monkeypatch.setattr(check, "ENDING_S", 0.2)
    (project / "runs/run-try/store").mkdir(parents=True)
    with (project / "runs/run-try/store/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "run-try goes on" in refused(capsys, "try", project / "train.toml")
    assert (project / "runs/run-try/store/lock").exists()


def test_a_try_takes_whatever_the_last_one_was_of(project, capsys, monkeypatch):
    begun = []
    monkeypatch.setattr("raygent.cli.submit_and_follow", lambda config, *rest: begun.append(config.run.name) or 0)
    before = project / "runs" / "run-try" / "config.toml"
    before.parent.mkdir(parents=True)
    for text in (
        '[model]\npath = "/another"\n',
        '[algorithm]\nname = "apo"\n',
        "[learner.lora]\nrank = 3\n",
        "no TOML",
    ):
        before.write_text(text)
        assert main(["try", str(project / "train.toml"), "run.resume=false"]) == 0, capsys.readouterr().err
    assert begun == ["run-try"] * 4 and before.exists()


def test_an_input_that_no_process_can_be_given(project, capsys):
    (project / "train.jsonl").write_text(json.dumps({"id": 1, "input": "x" * (128 << 10)}))
    said = refused(capsys, "train", project / "train.toml", "agent.in=subprocess")
    assert "data.train: task 1: its input is over" in said


def test_evaluate_wants_held_out_tasks_and_try_a_task_that_is_there(project, capsys):
    (project / "train.toml").write_text(toml(data='train = "train.jsonl"'))
    assert "data.eval: missing; write eval" in refused(capsys, "evaluate", project / "train.toml")
    said = refused(capsys, "try", project / "train.toml", "--task", "7")
    assert "--task: no task '7'" in said and "the first are 1, 2" in said


def test_more_gpus_than_there_are(project, capsys):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    said = refused(capsys, "train", project / "train.toml", "learner.gpus=1")
    assert re.search(r"learner\.gpus: the run asks for 2 GPUs \(learner 2, engine 0\) and there are 0; lower", said)


def test_a_port_that_is_taken(project, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = refused(capsys, "train", project / "train.toml", f"engine.port={other.getsockname()[1]}")
    assert "engine.port: cannot serve on '127.0.0.1', port" in said and "0 takes a free one" in said


def test_a_cluster_that_does_not_answer(project, capsys):
    os.environ["RAY_ADDRESS"] = "http://127.0.0.1:9"
    assert "RAY_ADDRESS: no Ray answers at http://127.0.0.1:9" in refused(capsys, "train", project / "train.toml")
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    assert "RAY_ADDRESS: 127.0.0.1:6379 is no dashboard" in refused(capsys, "train", project / "train.toml")


# as a process of its own


def command(*arguments: str | Path, module: str = "raygent.cli", **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_as_a_process(project):
    before = set(psutil.pids())
    for arguments, expected in (
        (["train", project / "trian.toml"], "no such config"),
        (["train", project / "train.toml", "run.stepz=3"], "raygent: run.stepz: unknown key; did you mean steps?"),
        (["train", project / "train.toml", "agent.run=adder.py:anser"], "raygent: agent.run: adder.py has no 'anser'"),
        (["train", project / "train.toml", "engine.enforce_eagr=true"], "did you mean enforce_eager?"),
    ):
        code, out, error = command(*arguments)
        assert (code, out, error.count("\n")) == (2, "", 1) and expected in error, error
    code, _, error = command("train", project / "train.toml", "model.path=modell", HF_HUB_OFFLINE="1")
    assert code == 2 and error.count("\n") == 1, error
    assert "model.path: no folder" in error and "did you mean the folder model?" in error
    new = [process for process in psutil.process_iter(["name"]) if process.pid not in before]
    assert not [process for process in new if process.info["name"] in RAY_PROCESSES and process.ppid() == os.getpid()]


def test_the_driver_as_a_process(project):
    code, _, error = command(project / "train.toml", "run.stepz=3", module="raygent.jobs.train")
    assert code == 2 and error.count("\n") == 1 and "run.stepz: unknown key; did you mean steps?" in error


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_dry_run_tells_and_starts_nothing(project, capsys, order):
    toml, override = project / "train.toml", "learner.micro_batch_tokens=1024"
    arguments = ["train", "--dry-run", toml, override] if order == "first" else ["train", toml, "--dry-run", override]
    children = ray_processes()
    assert main(list(map(str, arguments))) == 0
    told = capsys.readouterr().out
    assert ray_processes() == children and not (project / "runs").exists()
    for expected in (
        r"config +.*/train\.toml: run 'run', 100 steps of 16 tasks x 8 rollouts, into .*/runs/run",
        r"micro_batch_tokens = 1024",
        r"data +2 tasks to train on, 1 held out",
        r"task +1: \"1 \+ 1\"",
        r"agent +adder\.py:answer: ready",
        r"grader +adder\.py:grade: 0 for no output, in \d",
        r"model +.*/model: 6 parameters, vocabulary 100, context 512",
        r"memory +about .* a learner rank .* an engine",
        r"cluster +up to 5 CPUs and 0 GPUs asked for; this machine has \d+ and 0, and .* of memory free",
    ):
        assert re.search(expected, told), (expected, told)


def test_a_dry_run_tells_the_share_of_each_file(project, capsys):
    (project / "hard.jsonl").write_text('{"id": "h", "input": "7 * 8"}\n')
    both = 'data.train=["train.jsonl", "hard.jsonl"]'
    for weights, told in ([], ("66.7", "33.3")), (["data.weights=[1, 3]"], ("25.0", "75.0")):
        assert main(["train", "--dry-run", str(project / "train.toml"), both, *weights]) == 0
        said = capsys.readouterr().out
        assert "3 tasks to train on" in said
        assert f"train: 2 tasks, {told[0]}% of a step's" in said and f"hard: 1 tasks, {told[1]}% of a step's" in said


def test_a_dry_run_refuses_as_a_run_does(project, capsys):
    assert "data.train" in refused(capsys, "train", "--dry-run", project / "train.toml", "data.train=x.jsonl")


def test_a_context_that_the_cache_has_no_room_for(project):
    """Of Qwen2.5-0.5B: 24,576 bytes a token in float32."""
    about = {
        "model_type": "qwen2", "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896,
        "max_position_embeddings": 32768, "use_sliding_window": False,
    }  # fmt: skip
    (project / "model" / "config.json").write_text(json.dumps(about))

    def checked(*overrides):
        check.check(load(project / "train.toml", list(overrides)))

    with pytest.raises(
        ConfigError, match=r"model\.context: 32,768 tokens, and .* = 268435456 hold 10,922; lower it to 10880, or"
    ):
        checked()
    with pytest.raises(
        ConfigError, match=r"hold 5,461; lower it to 5376, or set engine\.kv_cache_memory_bytes = 808452096"
    ):
        checked("engine.kv_cache_memory_bytes=134217728")
    checked("model.context=10880")
    checked("engine.kv_cache_memory_bytes=808452096")
    with pytest.raises(ConfigError, match="hold 21,845"):
        checked("engine.dtype=bfloat16")


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_prj"], r"the model has no layer 'q_prj'; did you mean q_proj\?"),
        (["q_proj", "nope"], "the model has no layer 'nope'; name linear layers of the model"),
        (["embed_tokens"], "names what is no linear layer"),
        (["norm"], "LlamaRMSNorm.* is not supported"),
        (["q_proj", "mlp.up_proj"], ""),
    ],
)
def test_layers_that_adapters_go_around(project, targets, told):
    shutil.rmtree(project / "model")
    make_tiny_model(project / "model")
    (project / "train.toml").write_text(toml(learner__lora=f"targets = {json.dumps(targets)}"))
    with pytest.raises(ConfigError, match=rf"learner\.lora\.targets: .*{told}") if told else nullcontext():
        check.check(load(project / "train.toml"))


# what is right


def test_the_memory_of_each_zero_stage(project):
    """16 bytes a parameter in bfloat16: 2 weights, 2 gradients, 12 master copy and moments; a stage shards one more."""
    sizes = {}
    for stage in range(4):
        overrides = [f"learner.zero_stage={stage}", "learner.dtype=bfloat16", "learner.ranks=4"]
        config = load(project / "train.toml", overrides)
        assert count_parameters(config) == 6
        sizes[stage] = memory_estimate(config)["learner_states"] / 6
    assert sizes == {0: 16, 1: 7, 2: 5.5, 3: 4}


REFERENCES = {  # of [algorithm], [learner], [reference]: whether the learners keep a model, and ranks of one in its own place
    "none": ("", "", "ranks = 1", False, None),
    "kl": ("kl = 0.1", "", "", True, None),
    "kl in the reward": ('kl = 0.1\nkl_in = "reward"', "", "", True, None),
    "its own place": ("kl = 0.1", "", "ranks = 1", False, 1),
    "its own place, as the learner's": ("kl = 0.1", "", "gpus = 0.0", False, 2),
    "the model without its adapters": ("kl = 0.1", "lora = {}", "", False, None),
    "adapters, and its own place": ("kl = 0.1", "lora = {}", "ranks = 1", False, 1),
    "a teacher": ('name = "distill"\nteacher = "model"', "lora = {}", "", True, None),
    "a teacher in its own place": ('name = "distill"\nteacher = "model"', "", "ranks = 1", False, 1),
    "a teacher that is served": ('name = "distill"\nteacher = "http://x/v1"', "", "ranks = 1", False, None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_who_keeps_what_is_compared_with(project, case):
    algorithm, learner, reference, kept, ranks = REFERENCES[case]
    (project / "train.toml").write_text(toml(algorithm=algorithm, learner=learner, reference=reference))
    config = load(project / "train.toml")
    assert config.with_reference == kept
    apart = config.of_reference
    assert (apart and apart.learner.ranks) == ranks
    assert list(config.learners) == ["learner", *["reference"] * (ranks is not None)]
    if apart:
        assert apart.with_reference and apart.learner.lora is None and apart.of_reference is None
    memory = memory_estimate(config)
    assert ("reference_rank" in memory) == bool(apart)
    (project / "again.toml").write_text(config.to_toml())
    assert load(project / "again.toml").learners == config.learners


def test_a_resolved_config_loads_as_itself(project):
    config = load(project / "train.toml", ["engine.max_num_seqs=3", "learner.betas=[0.8, 0.9]", "run.name=a.b-c"])
    (project / "again.toml").write_text(config.to_toml())
    again = load(project / "again.toml")
    again.path = config.path
    assert again == config


def test_paths_are_relative_to_the_toml(project, monkeypatch):
    (project / "more").mkdir()
    (project / "more" / "hard.v2.jsonl").write_text('{"id": "h", "input": "7 * 8"}\n')
    monkeypatch.chdir("/")
    config = load(project / "train.toml")
    assert config.data.train == str(project / "train.jsonl") and config.model.path == str(project / "model")
    assert config.run_directory == project / "runs" / "run"
    several = load(
        project / "train.toml", ['data.train=["train.jsonl", "more/hard.v2.jsonl"]', "data.weights=[1, 2.5]"]
    )
    assert several.data.train == [str(project / "train.jsonl"), str(project / "more" / "hard.v2.jsonl")]
    assert [task.source for task in load_tasks(several.data.train)] == ["train", "train", "hard.v2"]
    assert [task.source for task in load_tasks(config.data.train)] == ["", ""]
    (project / "again.toml").write_text(several.to_toml())
    assert load(project / "again.toml").data == several.data
    assert load(project / "train.toml", ["model.path=org/name-1.5B"]).model.path == "org/name-1.5B"


def test_the_losses_are_verls():
    source = (Path(sys.prefix) / "lib/python3.11/site-packages/verl/trainer/ppo/core_algos.py").read_text()
    registered = set(re.findall(r'@register_policy_loss\("(\w+)"\)', source))
    assert registered == {*SOUND_LOSSES, *UNSOUND_LOSSES}


def fields_below(prefix: str, model: Any) -> Iterator[tuple[str, Any]]:
    """Each key with its default, or "required"; of an optional section also itself."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}" + ".NAME" * (get_origin(field.annotation) is dict and not prefix)
        for inner in (field.annotation, *get_args(field.annotation)):
            if hasattr(inner, "model_fields"):
                yield from fields_below(f"{key}.", inner)
        if prefix and not hasattr(field.annotation, "model_fields"):
            yield key, "required" if field.is_required() else field.default


def test_every_key_is_documented():
    """docs/config.md has a row `section.key` | type | default for every field, and no others."""
    rows = re.findall(r"^\| `([\w.]+)` \| .*? \| (.*?) \|", (DOCS / "config.md").read_text(), re.MULTILINE)
    documented = dict(rows)
    expected = dict(fields_below("", Config))
    assert set(documented) == set(expected)
    for key, default in expected.items():
        shown = documented[key].strip("`")
        if default == "required":
            assert shown == "required", key
        elif default is None:
            assert shown == "none", key
        else:
            value = list(default) if isinstance(default, tuple) else default
            assert json.loads(shown) == value, key


def test_load_raises_one_line():
    with pytest.raises(ConfigError) as error:
        load("/no/such/file.toml")
    assert "\n" not in str(error.value)
    assert str(ConfigError("two\nlines")) == "two lines"
