"""The run's configuration: one typed TOML beside the user's agent, with `section.key=value` overrides.

`load(path, overrides)` returns a `Config` or raises `ConfigError` with one line that names the key and the mend.
Paths in the file are relative to it; after loading they are absolute. Every key is explained in docs/config.md.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PATH_BYTES = 4096  # Linux's longest path, with the NUL at its end


class ConfigError(Exception):
    """What is wrong with the configuration, in one line: the key, and what to write instead."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Run(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    directory: Text = "runs"
    seed: int = Field(0, ge=0, lt=2**32)
    steps: int = Field(100, ge=0)
    resume: bool = True  # False: a run of that name that stands already is an error
    grace_s: float = Field(60.0, gt=0)  # how long Serve's app outlives a lost driver
    checkpoint_every: int = Field(10, ge=1)  # steps
    keep_checkpoints: int = Field(2, ge=1)


class Model(Section):
    path: Text
    tool_parser: Text | None = None
    reasoning_parser: Text | None = None
    max_tokens: int | None = Field(None, ge=1)  # default of a call that asks for none, and its upper bound
    context: int | None = Field(None, ge=16)  # None: the model's own
    chat_template: Text | None = None

    @model_validator(mode="after")
    def room_for_a_prompt(self) -> Model:
        if self.context is not None and self.max_tokens is not None and self.max_tokens >= self.context:
            raise ValueError(
                f"model.max_tokens: {self.max_tokens} leaves no room for a prompt in model.context = {self.context}; "
                "lower max_tokens or raise context"
            )
        return self


class Agent(Section):
    run: Text | None = None  # "agent.py:answer"
    command: list[Text] | None = Field(None, min_length=1)
    train: list[Text] = Field(["*"], min_length=1)  # patterns of agent names
    timeout_s: float = Field(300.0, gt=0)
    max_calls: int = Field(50, ge=1)
    in_: Literal["process", "subprocess"] = Field("process", alias="in")

    def trains(self, agent: str) -> bool:
        """Whether the calls of the agent of that name are trained."""
        return any(fnmatch(agent, pattern) for pattern in self.train)

    @model_validator(mode="after")
    def one_way_to_run(self) -> Agent:
        if (self.run is None) == (self.command is None):
            raise ValueError(
                f"agent.run: {'missing' if self.run is None else 'given beside agent.command'}; give either "
                'agent.run = "file.py:function" or agent.command = ["program", ...]'
            )
        return self


class Grader(Section):
    run: Text | None = None  # "grade.py:rows_equal"; None: the agent gives the reward
    timeout_s: float = Field(30.0, gt=0)
    failed_reward: float = 0.0  # of a rollout whose agent or grader failed


class Data(Section):
    train: Text
    eval: Text | None = None


# The losses of verl 0.9.1 that a weight a token goes through soundly. "gspo" takes a path for its sequence.
SOUND_LOSSES = ("vanilla", "cispo", "gpg", "gspo", "dppo_tv", "dppo_kl")
# Those it does not, and why.
UNSOUND_LOSSES = {
    "geo_mean": "it takes the weights into a geometric mean over the sequence",
    "sapo": "it averages over sequences by itself",
    "clip_cov": "what it clips depends on how the batch is cut into micro-batches",
    "kl_cov": "what it penalises depends on how the batch is cut into micro-batches",
    "bypass_mode": "it computes its own importance weights",
    "dro": "it needs a coefficient of its own, dro_beta, that raygent does not set",
}


class Algorithm(Section):
    name: Literal["grpo"] = "grpo"
    group_size: int = Field(8, ge=1)
    tasks_per_step: int = Field(16, ge=1)
    staleness: int = Field(0, ge=0)  # policy versions a sampled token may lag behind the step that trains it
    min_group: int = Field(2, ge=2)  # a group with fewer valid rollouts is dropped
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.2, ge=0)
    loss: str = "vanilla"  # the name of a policy loss verl registers
    normalise_std: bool = True  # False: Dr.GRPO
    drop_flat_groups: bool = True  # groups without signal are left out of the loss
    mini_batches: int = Field(1, ge=1)  # optimiser steps a batch
    kl: float = Field(0.0, ge=0)  # weight of the KL to the reference (the first weights) in the loss
    kl_kind: Literal["k2", "k3"] = "k3"  # k1 has no gradient of use in a loss
    entropy: float = Field(0.0, ge=0)  # weight of the entropy bonus

    @model_validator(mode="after")
    def groups_compare(self) -> Algorithm:
        if self.group_size < 2:
            raise ValueError("algorithm.group_size: GRPO compares the rollouts of a group; use 2 or more (8 is usual)")
        if self.min_group > self.group_size:
            raise ValueError(
                f"algorithm.min_group: {self.min_group} is more than algorithm.group_size = {self.group_size}, so every "
                "group would be dropped; lower it"
            )
        if self.tasks_per_step * self.group_size % self.mini_batches:
            raise ValueError(
                f"algorithm.mini_batches: {self.tasks_per_step} tasks x {self.group_size} rollouts do not divide into "
                f"{self.mini_batches} mini-batches; choose a divisor of {self.tasks_per_step * self.group_size}"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Learner(Section):
    ranks: int = Field(2, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    learning_rate: float = Field(1e-6, ge=0)
    decay: Literal["constant", "linear"] = "constant"  # over run.steps
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    clip_gradient: float = Field(1.0, ge=0)  # global norm; 0: none
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: int = Field(16384, ge=1)  # padded tokens a forward pass takes at most (one sample always fits)
    gradient_checkpointing: bool = False
    lora: None = None  # not there yet
    gpus: float = Field(0, ge=0, le=1)  # a rank; a part of one, as 0.5, shares it with an engine
    threads: int = Field(1, ge=1)  # a rank, on CPU
    gate: float = Field(0.02, gt=0)  # the start gate's bound on the mean |engine - learner| logprob difference


class Engine(BaseModel):
    """Besides these keys any argument of vLLM's engine by its name (`gpu_memory_utilization = 0.8`)."""

    model_config = ConfigDict(extra="allow", strict=True, validate_default=True, allow_inf_nan=False)
    replicas: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)  # of train rollouts, whatever the framework asks for
    gpus: float = Field(0, ge=0)  # a replica; a part of one, as 0.5, shares it with a learner
    dtype: Literal["float32", "bfloat16"] | None = None  # None: learner.dtype
    threads: int = Field(2, ge=1)  # a replica, on CPU
    host: Text = "127.0.0.1"  # "0.0.0.0" on a cluster of several machines
    port: int = Field(0, ge=0, le=65535)  # 0: Serve's running port, or a free one
    continuation: Literal["template", "exact"] = "template"  # where a conversation's earlier tokens come from
    grammar: Literal["mask", "refuse"] = "mask"  # train mode: tokens sampled under a grammar, penalties or logit_bias

    def vllm_arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Workers(Section):
    min: int = Field(1, ge=1)
    max: int = Field(4, ge=1)
    rollouts_each: int = Field(16, ge=1)
    cpus: float = Field(0.5, ge=0)  # an actor
    idle_s: float = Field(60.0, gt=0)
    lease_s: float = Field(30.0, gt=0)
    max_attempts: int = Field(3, ge=1)  # of a rollout, for infrastructure's sake

    @model_validator(mode="after")
    def bounds(self) -> Workers:
        if self.max < self.min:
            raise ValueError(f"workers.max: {self.max} is below workers.min = {self.min}; raise workers.max")
        return self


class Evaluate(Section):
    every: int = Field(20, ge=0)  # steps; 0: only before and after
    samples: int = Field(1, ge=1)  # a task
    tasks: int = Field(0, ge=0)  # of data.eval in the evaluations between first and last; 0: all


class Wandb(Section):
    project: Text = "raygent"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online where logged in, else offline


class Config(Section):
    run: Run = Run()
    model: Model
    agent: Agent
    grader: Grader = Grader()
    data: Data
    algorithm: Algorithm = Algorithm()
    learner: Learner = Learner()
    engine: Engine = Engine()
    workers: Workers = Workers()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    path: str = ""  # of the TOML itself, set by load()

    def to_toml(self) -> str:
        """The resolved configuration: every key with its value in force (keys that are None are left out)."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"path"}))

    @property
    def folder(self) -> Path:
        """Where the TOML lies: the root of the user's code."""
        return Path(self.path).parent

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory) / self.run.name

    @model_validator(mode="after")
    def whole(self) -> Config:
        rollouts = self.algorithm.tasks_per_step * self.algorithm.group_size
        if rollouts % self.learner.ranks:
            raise ValueError(
                f"learner.ranks: {rollouts} rollouts a step (algorithm.tasks_per_step x algorithm.group_size) do not "
                f"divide over {self.learner.ranks} ranks; choose a divisor of {rollouts}"
            )
        if self.engine.gpus and not self.learner.gpus:
            raise ValueError(
                "learner.gpus: engines on GPUs take their weights from learners on GPUs; set learner.gpus = 1"
            )
        if self.engine.gpus > 1 and self.engine.gpus % 1:
            raise ValueError(
                f"engine.gpus: {self.engine.gpus} is neither a whole number nor a part of one; choose {self.engine.gpus:.0f}"
            )
        if self.engine.continuation == "exact" and self.engine.replicas > 1:
            raise ValueError(
                'engine.continuation: "exact" needs all calls of a conversation at one replica; set engine.replicas = 1, '
                "or leave it out"
            )
        if 0 < self.engine.gpus < 1 < self.engine.replicas:
            raise ValueError("engine.gpus: replicas do not share a GPU; set engine.gpus = 1, or engine.replicas = 1")
        if 0 < self.learner.gpus < 1 < self.learner.ranks:
            raise ValueError("learner.gpus: ranks cannot share a GPU; set learner.gpus = 1, or learner.ranks = 1")
        return self

    @property
    def nccl(self) -> bool:
        """Whether weights go from GPU to GPU; processes that share one GPU cannot, their weights go through memory."""
        return self.learner.gpus == 1 and self.engine.gpus >= 1


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `section.key=value` overrides, check, and make paths absolute.

    Raises ConfigError with one line for a missing file, bad TOML, an unknown key, a wrong type or value, or a named
    file that is not there.
    """
    path = expanded("CONFIG", path).resolve()
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, not a config; give the path of a TOML file")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], 1)
        raise ConfigError(f"{path}: no such config; {f'did you mean {near[0]}?' if near else 'give a TOML file'}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also of a huge number, and of bytes that are no UTF-8
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for override in overrides or []:
        _override(tree, override)
    if "path" in tree:
        raise ConfigError("path: unknown key; it belongs in [model]")
    tree["path"] = str(path)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from error
    check_loss(config.algorithm)
    return _absolute(config)


def check_loss(algorithm: Algorithm) -> None:
    """Raises ConfigError where verl has no loss of that name, or none that the weights of tokens go through soundly."""
    if algorithm.loss not in SOUND_LOSSES:
        why = UNSOUND_LOSSES.get(algorithm.loss)
        wrong = f"{algorithm.loss} can't weight tokens: {why}" if why else f"no loss {algorithm.loss!r} in verl 0.9.1"
        raise ConfigError(f"algorithm.loss: {wrong}; use one of {', '.join(SOUND_LOSSES)}")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"{override}: an override is written section.key=value, as in algorithm.group_size=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare string
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section; see the keys in docs/config.md")
    tree[parts[-1]] = value


def _one_line(error: ValidationError) -> str:
    """The first error, an unknown key before all: a section misspelt makes its keys missing too."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    loc = [str(part) for part in first["loc"]]
    key, kind, given = ".".join(loc), first["type"], _shown(first["input"])
    if kind == "value_error":
        return str(first["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_near(loc)}"
    if kind == "missing":
        return f"{key}: missing; {_MISSING.get(key, 'add it to the TOML')}"
    if kind == "model_type":
        return f"{key}: a section, not the value {given}; {_MISSING.get(key, f'write [{key}] and its keys below it')}"
    if kind == "none_required":
        return f"{key}: not there yet; leave it out"
    mend = _MENDS.get(key) or _MENDS.get(kind) or first["msg"].removeprefix("Input ")
    return f"{key}: {mend[0].lower() + mend[1:]}, not {given}"


def _shown(value: Any) -> str:
    """The beginning of its repr(); what has none (nested too deep, an integer of thousands of digits) by its type."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"such a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


_MISSING = {
    "model": 'add a section [model] with path = "a Hugging Face id or a folder"',
    "model.path": 'write path = "a Hugging Face id or a folder"',
    "agent": 'add a section [agent] with run = "agent.py:answer"',
    "data": 'add a section [data] with train = "train.jsonl"',
    "data.train": 'write train = "train.jsonl"',
}
_MENDS = {
    "run.name": "a name of at most 64 letters, digits and . _ - that begins with a letter or digit",
    "too_short": "should have at least one entry",
    "string_too_short": "should not be empty",
    "finite_number": "should be a finite number",
}


def _near(loc: list[str]) -> str:
    """What was meant by the unknown key at `loc`: a key like it, or of its name elsewhere."""
    name, known = loc[-1], keys_of(loc[:-1])
    if near := difflib.get_close_matches(name, known, 1):
        return f"did you mean {near[0]}?"
    if homes := homes_of(name):
        return f"it belongs in [{homes[0]}]"
    return f"known here: {', '.join(known)}"


def homes_of(name: str) -> list[str]:
    """The sections that have a key `name`."""
    return [section for section in keys_of([]) if name in keys_of([section])]


def keys_of(loc: list[str]) -> list[str]:
    """The keys of the section at `loc`, as the TOML has them; of the whole file for []."""
    model: Any = Config
    for part in loc:
        model = model.model_fields[part].annotation
    return [info.alias or name for name, info in model.model_fields.items() if loc or name != "path"]


def _absolute(config: Config) -> Config:
    config.run.directory = str(_beside(config, "run.directory", config.run.directory))
    for key in ("train", "eval"):
        if value := getattr(config.data, key):
            setattr(config.data, key, str(_file(config, f"data.{key}", value, "give a JSONL or Parquet file of tasks")))
    config.model.path = _model(config)
    if config.model.chat_template:
        template = _file(
            config, "model.chat_template", config.model.chat_template, "give a Jinja file, or leave it out"
        )
        config.model.chat_template = str(template)
    for key, run in (("agent.run", config.agent.run), ("grader.run", config.grader.run)):
        if run is not None:
            file, _, function = run.partition(":")
            if not function.isidentifier():
                raise ConfigError(
                    f'{key}: {run!r} names no function; write "file.py:function" or "package.module:function"'
                )
            if file.endswith(".py"):
                _file(config, key, file, "paths are relative to the TOML")
    return config


def _beside(config: Config, key: str, value: str) -> Path:
    return (config.folder / expanded(key, value)).resolve()


def expanded(key: str, value: str | Path) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: nobody's home folder is known by {value}; write the path out") from error
    if "\0" in str(path) or len(os.fsencode(path)) >= PATH_BYTES or any(len(os.fsencode(p)) > 255 for p in path.parts):
        raise ConfigError(f"{key}: {_shown(str(value))} is no path: it is too long, or holds a NUL; give another")
    return path


def _file(config: Config, key: str, value: str, mend: str) -> Path:
    path = _beside(config, key, value)
    if path.is_dir():
        raise ConfigError(f"{key}: {path} is a folder; {mend}")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], 1)
        raise ConfigError(f"{key}: no file {path}; {f'did you mean {near[0]}?' if near else mend}")
    return path


def _model(config: Config) -> str:
    """The absolute path of a folder, or a Hugging Face id as it is."""
    value, path = config.model.path, _beside(config, "model.path", config.model.path)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ConfigError(f"model.path: {path} is a file; give the folder it lies in, or a Hugging Face id")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value):
        there = [folder.name for folder in path.parent.glob("*/")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        mend = f"did you mean {path.parent / near[0]}?" if near else "give a Hugging Face id or a folder"
        raise ConfigError(f"model.path: no folder {path}; {mend}")
    return value
