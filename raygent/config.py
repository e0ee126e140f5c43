"""The run's configuration: one typed TOML beside the user's agent, with `section.key=value` overrides.

`load(path, overrides)` returns a `Config` or raises `ConfigError` with one line that names the key and the mend.
Paths in the file are relative to it; after loading they are absolute. Every key is explained in docs/config.md.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raygent.algorithms.named import MEASURES, NAMES, PROMPT_NAMES, Named, algorithm
from raygent.algorithms.verl_names import ADVANTAGES, NO_ADVANTAGES, SOUND_LOSSES, UNSOUND_LOSSES

PATH_BYTES = 4096  # Linux's longest path, with the NUL at its end


class ConfigError(Exception):
    """What is wrong with the configuration, in one line: the key, and what to write instead."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


Text = Annotated[str, Field(min_length=1)]
PromptName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
PolicyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
POLICY = "policy"  # the one that all agents share, and the model name under which the engine serves
BASE = "base"  # the model as it is, of agents that have no policy
OPTIMISER = "optimiser"  # the agent as which prompts are improved: it has the policy, or the upstream that names it


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class RunSection(Section):
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
    policies: dict[PolicyName, Annotated[list[Text], Field(min_length=1)]] = {}  # an adapter's name: patterns of agents
    timeout_s: float = Field(300.0, gt=0)
    max_calls: int = Field(50, ge=1)
    in_: Literal["process", "subprocess"] = Field("process", alias="in")
    memory_mb: int | None = Field(None, ge=1)  # MiB of all processes of one rollout's agent; None: no limit
    processes: int | None = Field(None, ge=1)  # of one rollout's agent
    persistent: bool = False  # its process has one rollout after the other: see actors/persistent_agent.py

    @model_validator(mode="after")
    def one_way_to_run(self) -> Agent:
        if (self.run is None) == (self.command is None):
            raise ValueError(
                f"agent.run: {'missing' if self.run is None else 'given beside agent.command'}; give either "
                'agent.run = "file.py:function" or agent.command = ["program", ...]'
            )
        return self

    @model_validator(mode="after")
    def limits_of_a_process(self) -> Agent:
        for key in ("memory_mb", "processes", "persistent"):
            if getattr(self, key) and self.command is None and self.in_ == "process":
                raise ValueError(
                    f'agent.{key}: it is of processes, and the agent is in the workers\' own; set agent.in = "subprocess", or leave '
                    f"{key} out"
                )
        return self


class GraderSection(Section):
    run: Text | None = None  # "grade.py:rows_equal"; None: the agent gives the reward
    timeout_s: float = Field(30.0, gt=0)
    failed_reward: float = 0.0  # of a rollout whose agent or grader failed


class Data(Section):
    train: Text | list[Text] | None = None  # may be missing where rollouts or chats are given
    # Of the files of train; None: the numbers of their tasks.
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    curriculum: bool = False  # tasks are drawn by the measured variance of their rewards
    eval: Text | None = None
    rollouts: Text | None = None  # the folder of a run whose rollouts are trained on, in place of the policy's own
    chats: Text | None = None  # JSONL or Parquet of conversations that sft trains on

    @field_validator("train", mode="before")
    @classmethod
    def paths(cls, value: Any) -> Any:
        some = value if isinstance(value, list) and value else [value]
        if value is not None and not all(isinstance(path, str) and path for path in some):
            raise ValueError(f"data.train: should be a path, or a list of paths, not {_shown(value)}")
        return value

    @property
    def train_files(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train or []

    @model_validator(mode="after")
    def a_weight_a_file(self) -> Data:
        if self.weights and not isinstance(self.train, list):
            raise ValueError(
                'data.weights: there are no files to weigh; write train = ["a.jsonl", "b.jsonl"], or leave weights out'
            )
        if self.weights is not None and len(self.weights) != len(self.train_files):
            raise ValueError(
                f"data.weights: {len(self.weights)} for the {len(self.train_files)} files of data.train; give each file one"
            )
        named: dict[str, str] = {}
        for path in self.train_files:
            if other := named.get(source_name(path)):
                raise ValueError(
                    f"data.train: {other} and {path} have one name, {source_name(path)!r}, by which metrics tell them apart; "
                    "rename one, or leave it out"
                )
            named[source_name(path)] = path
        return self

    @model_validator(mode="after")
    def one_source(self) -> Data:
        if not (self.train or self.rollouts or self.chats):
            raise ValueError('data.train: missing; write train = "train.jsonl"')
        if self.rollouts and self.chats:
            raise ValueError("data.chats: given beside data.rollouts; one of them is trained on")
        return self


def source_name(path: str | Path) -> str:
    """What the tasks of a file of data.train are called in metrics."""
    return Path(path).stem


class PromptSearch(Section):
    """What the algorithms that change prompts go by."""

    selection_tasks: int = Field(100, ge=1)  # of data.train, on which candidates are scored; the others are learnt from
    beam: int = Field(4, ge=1)  # candidates that apo keeps from step to step
    edits: int = Field(4, ge=1)  # new candidates a step: of apo for each of the beam, of bootstrap_fewshot in all
    demonstrations: int = Field(4, ge=1)  # of bootstrap_fewshot, in a prompt at most
    max_rollouts: int = Field(0, ge=0)  # of training tasks, after which no step begins; 0: no limit


class PromptTurns(PromptSearch):
    """Prompts that are improved in turn with the weights: before step 0, `every`, 2 x `every`, ... `steps` of that algorithm."""

    name: Literal["apo", "gepa", "bootstrap_fewshot"]
    every: int = Field(ge=1)
    steps: int = Field(1, ge=1)
    group_size: int = Field(1, ge=1)
    tasks_per_step: int = Field(16, ge=1)


class Algorithm(PromptSearch):
    name: Text = "grpo"  # one of algorithms.named.NAMES, or a file of the user's own
    group_size: int = Field(8, ge=1)
    tasks_per_step: int = Field(16, ge=1)
    staleness: int = Field(0, ge=0)  # policy versions a sampled token may lag behind the step that trains it
    min_group: int = Field(2, ge=2)  # a group with fewer valid rollouts is dropped
    clip_low: float = Field(0.2, ge=0)
    clip_high: float = Field(0.2, ge=0)
    loss: str = "vanilla"  # the name of a policy loss verl registers
    advantage: str | None = None  # the name of an estimator verl registers, in place of the algorithm's own
    aggregation: Literal["rollout", "token", "constant"] = "rollout"  # what each token counts: see batch.weigh
    horizon: int | None = Field(None, ge=1)  # tokens, of aggregation "constant"; None: model.max_tokens
    credit: Literal["rollout", "turn"] = "rollout"  # turn: rewards of single calls count from that call on
    discount: float = Field(1.0, gt=0, le=1)  # of credit by turn, a turn; of reinforce_plus_plus and ppo, a token
    gae_lambda: float = Field(1.0, ge=0, le=1)  # of ppo
    refills: int = Field(0, ge=0)  # how often groups without signal are replaced by others within a step
    overlong_tokens: int = Field(0, ge=0)  # sampled in a rollout from which on its reward is 1 less; 0: no punishment
    overlong_buffer: int = Field(0, ge=0)  # tokens before that in which the punishment grows
    normalise_std: bool = True
    drop_flat_groups: bool = True  # groups without signal are left out of the loss
    mini_batches: int = Field(1, ge=1)  # into which a step's rollouts are cut, an optimiser step each
    epochs: int = Field(1, ge=1)  # how often a step goes through them all
    kl: float = Field(0.0, ge=0)  # weight of the KL to the reference (the first weights)
    kl_in: Literal["loss", "reward"] = "loss"
    kl_kind: Literal["k1", "k2", "k3"] = "k3"  # in the reward: "k1"
    entropy: float = Field(0.0, ge=0)  # weight of the entropy bonus
    threshold: float | None = None  # of sft: the reward a winner has at least; None: the best of its task's rollouts
    beta: float = Field(0.1, gt=0)  # of dpo
    teacher: Text | None = None  # of distill: a model with the tokenizer of model.path, or the base_url of its endpoint
    teacher_model: Text | None = None  # its name at the endpoint; None: the one that is served there
    teacher_api_key_env: Text | None = None  # the environment variable that holds the key; None: it asks for none
    prompts: PromptTurns | None = None  # None: they stay as they are

    @model_validator(mode="before")
    @classmethod
    def kl_has_its_kind(cls, tree: Any) -> Any:
        return {"kl_kind": "k1"} | tree if isinstance(tree, dict) and tree.get("kl_in") == "reward" else tree

    @field_validator("loss")
    @classmethod
    def loss_is_sound(cls, loss: str) -> str:
        if loss not in SOUND_LOSSES:
            why = UNSOUND_LOSSES.get(loss)
            wrong = f"{loss} can't weight tokens: {why}" if why else f"no loss {loss!r} in verl 0.9.1"
            raise ValueError(f"algorithm.loss: {wrong}; use one of {', '.join(SOUND_LOSSES)}")
        return loss

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has the KL to the reference in it."""
        return self.kl > 0 and self.kl_in == "loss"

    @property
    def teacher_url(self) -> str | None:
        """Where the teacher is an endpoint, its base_url."""
        return self.teacher if self.teacher and "://" in self.teacher else None

    @model_validator(mode="after")
    def teacher_fits(self) -> Algorithm:
        if self.teacher_url:
            _check_url(self.teacher_url, "algorithm.teacher", "algorithm.teacher_api_key_env", "http://HOST:8000/v1")
            if self.kl:
                raise ValueError(
                    "algorithm.kl: the learners keep no model beside an endpoint to compare with; leave it out, or give "
                    "algorithm.teacher as a folder"
                )
        for key in ("teacher_model", "teacher_api_key_env"):
            if getattr(self, key) and not self.teacher_url:
                raise ValueError(
                    f"algorithm.{key}: algorithm.teacher is no endpoint; leave it out, or give the endpoint's base_url"
                )
        return self

    @model_validator(mode="after")
    def groups_compare(self) -> Algorithm:
        if self.min_group > self.group_size > 1:
            raise ValueError(
                f"algorithm.min_group: {self.min_group} is more than algorithm.group_size = {self.group_size}, so every "
                "group would be dropped; lower it"
            )
        if self.overlong_tokens and not 0 < self.overlong_buffer <= self.overlong_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer: {self.overlong_buffer} is not within 1 and algorithm.overlong_tokens = "
                f"{self.overlong_tokens}; a fifth of it is usual"
            )
        if self.kl_kind == "k1" and self.kl and self.kl_in == "loss":
            raise ValueError('algorithm.kl_kind: k1 has no gradient of use in a loss; use "k3", or kl_in = "reward"')
        if self.kl_kind in ("k2", "k3") and self.kl and self.kl_in == "reward":
            raise ValueError(
                f"algorithm.kl_kind: {self.kl_kind} in the reward has not the KL's gradient (near the reference it points away "
                'from it); use "k1", or kl_in = "loss"'
            )
        if self.tasks_per_step * self.group_size % self.mini_batches:
            raise ValueError(
                f"algorithm.mini_batches: {self.tasks_per_step} tasks x {self.group_size} rollouts do not divide into "
                f"{self.mini_batches} mini-batches; choose a divisor of {self.tasks_per_step * self.group_size}"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Lora(Section):
    """Low-rank adapters in place of all weights (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32.0, gt=0)  # the adapter counts alpha / rank times
    targets: list[Text] | None = Field(None, min_length=1)  # names of linear layers; None: all but the head


class LearnerSection(Section):
    ranks: int = Field(2, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    learning_rate: float = Field(1e-6, ge=0)
    decay: Literal["constant", "linear"] = "constant"  # over run.steps
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    clip_gradient: float = Field(1.0, ge=0)  # global norm; 0: none
    dtype: Literal["float32", "bfloat16"] = "float32"
    sequence_parallel: int = Field(1, ge=1)  # ranks that share each sequence (DeepSpeed's Ulysses); divides ranks
    micro_batch_tokens: int = Field(16384, ge=1)  # tokens a forward pass takes at most (one sample always fits)
    packed: bool = False  # the samples of a forward pass one behind the other, not padded
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"  # as transformers names them
    gradient_checkpointing: bool = False
    offload_optimiser: bool = False  # its state in the node's memory, not the GPU's
    lora: Lora | None = None  # None: all weights are trained
    gpus: float = Field(0, ge=0, le=1)  # a rank; a part of one, as 0.5, shares it with an engine
    threads: int = Field(1, ge=1)  # a rank, on CPU
    gate: float = Field(0.02, gt=0)  # the start gate's bound on the mean |engine - learner| logprob difference


class CriticSection(Section):
    """Of ppo: what it has otherwise than [learner]."""

    learning_rate: float = Field(1e-5, ge=0)
    ranks: int | None = Field(None, ge=1)  # None: as many as the learner
    gpus: float | None = Field(None, ge=0, le=1)  # a rank; None: as the learner
    clip: float = Field(0.5, gt=0)  # how far a value may move in one step
    warmup_steps: int = Field(0, ge=0)  # steps in which it alone learns


class ReferenceSection(Section):
    """A place of its own for the frozen model that KL and distillation compare with; without it the learners keep it."""

    ranks: int | None = Field(None, ge=1)  # None: as many as the learner
    gpus: float | None = Field(None, ge=0, le=1)  # a rank; None: as the learner


CPU_CACHE_BYTES = 256 * 2**20


class EngineSection(BaseModel):
    """Besides these keys any argument of vLLM's engine by its name (`gpu_memory_utilization = 0.8`)."""

    model_config = ConfigDict(extra="allow", strict=True, validate_default=True, allow_inf_nan=False)
    replicas: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)  # of train rollouts, whatever the framework asks for
    gpus: float = Field(0, ge=0)  # a replica; a part of one, as 0.5, shares it with a learner
    dtype: Literal["float32", "bfloat16"] | None = None  # None: learner.dtype
    threads: int = Field(2, ge=1)  # a replica, on CPU
    host: Text = "127.0.0.1"  # "0.0.0.0" on a cluster of several machines
    port: int = Field(0, ge=0, le=65535)  # 0: Serve's running port, or a free one
    silent_s: float = Field(300.0, gt=0)  # an EngineCore that answers nothing for so long is killed and replaced
    continuation: Literal["template", "exact"] = "template"  # where a conversation's earlier tokens come from
    grammar: Literal["mask", "refuse"] = "mask"  # train mode: tokens sampled under a grammar, penalties or logit_bias

    def vllm_arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def cache_bytes(self) -> int:
        """Of a replica's KV cache; 0 on a GPU, of which vLLM takes what is free, unless it is given."""
        return self.vllm_arguments().get("kv_cache_memory_bytes", 0 if self.gpus else CPU_CACHE_BYTES)


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
    checkpoint: Annotated[int, Field(ge=0)] | Literal["best"] | None = (
        None  # of `raygent evaluate`, by its steps; None: last
    )

    @field_validator("checkpoint", mode="wrap")
    @classmethod
    def one_checkpoint(cls, value: Any, read: Callable[[Any], Any]) -> Any:
        try:
            return read(value)
        except ValidationError:
            raise ValueError(
                'evaluate.checkpoint: the steps that one of the checkpoints has done, as 100, or "best", not '
                f"{_shown(value)}"
            ) from None


class Upstream(Section):
    """An endpoint of somebody else's that agents have for a model: a judge, a frozen planner, a vendor's model."""

    agents: list[Text] = Field(min_length=1)  # patterns of the names of agents that have it
    base_url: Text  # as a client gets it: most end with /v1
    model: Text
    api_key_env: Text | None = None  # the environment variable that holds the key; None: it asks for none
    max_parallel: int = Field(8, ge=1)  # requests at once, of the run
    requests_per_minute: float = Field(0.0, ge=0)  # of the run; 0: as many as there are
    price_input: float = Field(0.0, ge=0)  # US dollars per million tokens
    price_output: float = Field(0.0, ge=0)
    max_cost: float = Field(0.0, ge=0)  # dollars of the run; 0: no limit
    timeout_s: float = Field(120.0, gt=0)  # of one call with all its tries, from its turn on

    @property
    def priced(self) -> bool:
        return self.price_input > 0 or self.price_output > 0


class Wandb(Section):
    project: Text = "raygent"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online where logged in, else offline


class Config(Section):
    run: RunSection = RunSection()
    model: Model
    agent: Agent
    grader: GraderSection = GraderSection()
    data: Data
    algorithm: Algorithm = Algorithm()
    learner: LearnerSection = LearnerSection()
    critic: CriticSection = CriticSection()
    reference: ReferenceSection = ReferenceSection()
    engine: EngineSection = EngineSection()
    workers: Workers = Workers()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    prompts: dict[PromptName, Text] = {}  # by name, the file of its first version
    upstream: dict[str, Upstream] = {}  # by name
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

    def upstream_of(self, agent: str) -> str | None:
        """The upstream that the agent of that name has for a model, the first that fits; None: it has the policy."""
        return _first(agent, {name: upstream.agents for name, upstream in self.upstream.items()})

    def upstream_keys(self) -> dict[str, str]:
        """The upstreams' API keys, by name, from this process's environment. Raises ConfigError where one is not set."""
        return {
            name: key_in(upstream.api_key_env, f"upstream.{name}.api_key_env")
            for name, upstream in self.upstream.items()
            if upstream.api_key_env
        }

    @model_validator(mode="before")
    @classmethod
    def algorithms_own_defaults(cls, tree: Any) -> Any:
        """What the algorithm's file has for keys that are not given."""
        section = tree.get("algorithm", {}) if isinstance(tree, dict) else None
        if not isinstance(section, dict) or not isinstance(name := section.get("name", "grpo"), str):
            return tree
        named = algorithm(name, Path(str(tree.get("path", ""))).parent)
        if isinstance(turns := section.get("prompts"), dict) and turns.get("name") in PROMPT_NAMES:
            section = section | {"prompts": algorithm(turns["name"], Path()).defaults | turns}
        of_chats = {"threshold": 1.0} if isinstance(data := tree.get("data"), dict) and data.get("chats") else {}
        own = _with_clip_range(named.defaults, section.get("loss"))
        return tree | {"algorithm": own | of_chats | section}

    @property
    def named_algorithm(self) -> Named:
        return algorithm(self.algorithm.name, self.folder)

    @property
    def measures(self) -> list[str]:
        """What the learners measure of a batch before its advantages are known."""
        return sorted({*self.named_algorithm.measures} | ({"reference"} if self.algorithm.kl else set()))

    @property
    def with_reference(self) -> bool:
        """Whether the learners keep a frozen model beside the policy: the first weights, or a teacher that is no endpoint. With
        adapters the first weights are the policy's own model without them."""
        return self._compares and self.of_reference is None and not (self.learner.lora and not self.algorithm.teacher)

    @property
    def _compares(self) -> bool:
        return "reference" in self.measures and not self.algorithm.teacher_url

    @property
    def of_critic(self) -> Config | None:
        """The same with the critic's settings in [learner]; None where the algorithm has no critic."""
        if "values" not in self.measures:
            return None
        return self._with_learner(self.critic, learning_rate=self.critic.learning_rate, lora=None)

    @property
    def of_reference(self) -> Config | None:
        """The same with the settings in [learner] of a reference that has a place of its own; None where it has none."""
        if not self._compares or self.reference == ReferenceSection():
            return None
        return self._with_learner(self.reference, lora=None)

    def _with_learner(self, section: CriticSection | ReferenceSection, **own: Any) -> Config:
        own |= {key: value for key in ("ranks", "gpus") if (value := getattr(section, key)) is not None}
        learner = self.learner.model_copy(update=own)
        return self.model_copy(update={"learner": learner, "reference": ReferenceSection()})

    @property
    def learners(self) -> dict[str, LearnerSection]:
        """By section the settings of the policy's learners, of the critic's and of the reference's where these have their own; none
        where only prompts change."""
        if self.changes_prompts:
            return {}
        others = {"critic": self.of_critic, "reference": self.of_reference}
        return {"learner": self.learner} | {name: one.learner for name, one in others.items() if one}

    @property
    def recorded(self) -> bool:
        """Whether what is trained on was recorded before, so that nothing is sampled but in evaluations."""
        return bool(self.data.rollouts or self.data.chats)

    @property
    def changes_prompts(self) -> bool:
        """Whether the run changes prompts, and no weights."""
        return self.algorithm.name in PROMPT_NAMES

    @property
    def prompt_search(self) -> Algorithm | PromptTurns | None:
        """The settings by which prompts are changed, alone or in turn with the weights; None where they stay as they are."""
        return self.algorithm if self.changes_prompts else self.algorithm.prompts

    def first_prompts(self) -> dict[str, str]:
        """The first version of each prompt, by name, without the white space around it. Raises ConfigError."""
        texts = {}
        for name, file in self.prompts.items():
            key, mend = f"prompts.{name}", "give a text file in UTF-8"
            path = _file(self, key, file, mend)
            try:
                texts[name] = path.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ConfigError(f"{key}: {path} is not UTF-8 at byte {error.start}; {mend}") from error
            except OSError as error:
                raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}; {mend}") from error
            if not texts[name]:
                raise ConfigError(f"{key}: {path} is empty; write the first version into it")
        return texts

    @model_validator(mode="after")
    def prompts_fit(self) -> Config:
        if self.prompt_search and not self.prompts:
            key = "algorithm.name" if self.changes_prompts else "algorithm.prompts.name"
            raise ValueError(
                f'prompts: missing, and {key} = "{self.prompt_search.name}" improves them; add [prompts] with a name and the '
                'file of the first version, as writer = "writer.txt"'
            )
        if self.algorithm.prompts and self.changes_prompts:
            raise ValueError(
                f"algorithm.prompts: {self.algorithm.name} changes prompts alone, in turn with no weights; leave it out, or set "
                'algorithm.name = "grpo"'
            )
        if self.algorithm.prompts and self.recorded:
            raise ValueError(
                "algorithm.prompts: what is trained on was recorded with prompts that no search changes; leave it out"
            )
        return self

    @model_validator(mode="after")
    def algorithm_is_whole(self) -> Config:
        settings, named = self.algorithm, self.named_algorithm
        if named.check:
            named.check(settings)
        if unknown := set(named.measures) - MEASURES:
            raise ValueError(
                f"algorithm.name: {settings.name} has MEASURES {min(unknown)!r}; there are {', '.join(sorted(MEASURES))}"
            )
        if "values" in named.measures and not named.returns:
            raise ValueError(
                f"algorithm.name: {settings.name} measures values and has no function returns for the critic"
            )
        if named.returns and not settings.drop_flat_groups:
            raise ValueError(
                f"algorithm.drop_flat_groups: false leaves the critic of {settings.name} without returns for some; leave it out"
            )
        if named.returns and self.critic.warmup_steps >= self.run.steps:
            raise ValueError(
                f"critic.warmup_steps: {self.critic.warmup_steps} of run.steps = {self.run.steps} leave none in which the policy "
                "learns; lower it"
            )
        return self

    @model_validator(mode="after")
    def algorithm_has_its_data(self) -> Config:
        settings, named = self.algorithm, self.named_algorithm
        if settings.teacher and settings.name in NAMES and settings.name != "distill":
            raise ValueError(f"algorithm.teacher: {settings.name} has none; leave it out, or use distill")
        if settings.teacher_url and self.engine.temperature != 1:
            raise ValueError(
                f"engine.temperature: {self.engine.temperature:g}, and the endpoint of algorithm.teacher tells what tokens "
                "are worth at 1; leave it out, or give algorithm.teacher as a folder"
            )
        if self.data.rollouts and not named.off_policy:
            raise ValueError(
                f"data.rollouts: {settings.name} learns from what its own policy samples; use sft or dpo, or leave it out"
            )
        if self.data.chats and settings.name != "sft":
            raise ValueError(
                f'data.chats: {settings.name} needs rewards, which chats have not; use algorithm.name = "sft"'
            )
        if self.data.chats and (settings.threshold or 0) > 1:
            raise ValueError(f"algorithm.threshold: {settings.threshold:g}, and chats count as reward 1; leave it out")
        if self.data.chats and settings.overlong_tokens:
            raise ValueError("algorithm.overlong_tokens: chats have no reward to lower; leave it out")
        if self.recorded and settings.refills:
            raise ValueError("algorithm.refills: recorded rollouts cannot be replaced by others; leave refills out")
        if settings.max_rollouts and not self.changes_prompts:
            raise ValueError(
                f"algorithm.max_rollouts: {settings.name} takes as many as run.steps x tasks_per_step x group_size; set run.steps"
            )
        return self

    @model_validator(mode="after")
    def advantages_fit(self) -> Config:
        settings, named = self.algorithm, self.named_algorithm
        if settings.advantage is not None and settings.advantage not in ADVANTAGES:
            why = NO_ADVANTAGES.get(settings.advantage, "verl 0.9.1 has none of that name")
            raise ValueError(
                f"algorithm.advantage: {settings.advantage}: {why}; use one of {', '.join(ADVANTAGES)}, or leave it out"
            )
        if settings.advantage and (named.measures or named.off_policy or named.needs_greedy):
            raise ValueError(
                f"algorithm.advantage: {settings.name} has its own, by which its loss is made; leave it out"
            )
        compares = ADVANTAGES[settings.advantage] if settings.advantage else named.compares_groups
        if compares and settings.group_size < 2:
            raise ValueError(
                f"algorithm.group_size: {settings.advantage or settings.name} compares the rollouts of a group; use 2 or more "
                "(8 is usual)"
            )
        if settings.refills and not compares:
            raise ValueError(
                f"algorithm.refills: {settings.advantage or settings.name} compares no groups, so none is without signal; set "
                "algorithm.refills=0"
            )
        if settings.credit == "turn" and settings.advantage:
            raise ValueError(
                f"algorithm.credit: what verl registers as {settings.advantage} weighs whole rollouts; leave algorithm.advantage out, "
                'or use credit = "rollout"'
            )
        if settings.credit == "turn" and not named.credits_turns:
            raise ValueError(
                f'algorithm.credit: {settings.name} weighs whole rollouts; use credit = "rollout", or '
                "grpo, one of its kind, reinforce_plus_plus or ppo"
            )
        return self

    @model_validator(mode="after")
    def loss_fits(self) -> Config:
        settings, named = self.algorithm, self.named_algorithm
        for key, right in (("mini_batches", 1), ("epochs", 1), ("staleness", 0)):
            if getattr(settings, key) == right:
                continue
            if settings.loss == "gpg" and not named.off_policy:
                why = "the loss gpg has no ratio to correct for tokens that other weights sampled"
                raise ValueError(f"algorithm.{key}: {why}; set algorithm.{key}={right}")
            if (settings.advantage or settings.name) == "opo":
                raise ValueError(
                    f"algorithm.{key}: the baseline of opo is the best exactly on policy alone; set algorithm.{key}={right}, or use grpo"
                )
        if settings.kl and settings.kl_in == "reward" and settings.credit == "turn" and "values" not in named.measures:
            raise ValueError(
                'algorithm.kl_in: credit = "turn" compares the rewards of turns; use kl_in = "loss", or algorithm.name = "ppo"'
            )
        if settings.kl and settings.kl_in == "reward" and (named.off_policy or settings.teacher):
            raise ValueError(f'algorithm.kl_in: {settings.name} is not made of rewards alone; use kl_in = "loss"')
        if settings.aggregation == "constant" and not (settings.horizon or self.model.max_tokens):
            raise ValueError(
                'algorithm.horizon: aggregation = "constant" divides by it; set it to the tokens a rollout may sample, or set '
                "model.max_tokens"
            )
        return self

    @model_validator(mode="after")
    def tasks_are_drawn(self) -> Config:
        settings = self.algorithm
        for key in ("weights", "curriculum"):
            if getattr(self.data, key) and self.recorded:
                raise ValueError(
                    f"data.{key}: what is trained on was recorded before, so no tasks are drawn; leave {key} out"
                )
            if getattr(self.data, key) and self.changes_prompts:
                raise ValueError(f"data.{key}: {settings.name} draws its tasks by itself; leave {key} out")
        if self.data.curriculum and settings.name == "distill":
            raise ValueError("data.curriculum: distill learns from a teacher and not by rewards; leave curriculum out")
        if self.data.curriculum and settings.group_size < 2:
            raise ValueError(
                "data.curriculum: it measures how the rewards of a task's group vary, and algorithm.group_size = 1; use 2 or "
                "more (8 is usual), or leave curriculum out"
            )
        return self

    @model_validator(mode="after")
    def upstreams_fit(self) -> Config:
        for agent in self.agent.train:
            name = self.upstream_of(agent)
            if name is not None and not re.search(r"[*?\[]", agent):
                raise ValueError(
                    f"agent.train: {agent!r} has upstream.{name} for a model, which is not trained; take it out of "
                    f"agent.train or of upstream.{name}.agents"
                )
        for name, upstream in self.upstream.items():
            _check_url(upstream.base_url, f"upstream.{name}.base_url", f"upstream.{name}.api_key_env")
            if upstream.max_parallel < self.engine.replicas:
                raise ValueError(
                    f"upstream.{name}.max_parallel: {upstream.max_parallel} is less than engine.replicas = "
                    f"{self.engine.replicas}, each of which takes its share; raise it"
                )
            if upstream.max_cost and not upstream.priced:
                raise ValueError(
                    f"upstream.{name}.max_cost: nothing is known to cost anything; set upstream.{name}.price_input and "
                    "price_output, in dollars per million tokens"
                )
        return self

    @model_validator(mode="after")
    def whole(self) -> Config:
        rollouts = self.algorithm.tasks_per_step * self.algorithm.group_size
        for section, learner in self.learners.items():
            self._check_sequence_parallel(section, learner)
        if self.learners and rollouts % (apart := self.learner.ranks // self.learner.sequence_parallel):
            raise ValueError(
                f"learner.ranks: {rollouts} rollouts a step (algorithm.tasks_per_step x algorithm.group_size) do not "
                f"divide over {apart} ranks that have sequences of their own; choose a divisor of {rollouts}"
            )
        if self.engine.gpus and self.learners and not self.learner.gpus:
            raise ValueError(
                "learner.gpus: engines on GPUs take their weights from learners on GPUs; set learner.gpus = 1"
            )
        if self.engine.gpus > 1 and self.engine.gpus % 1:
            raise ValueError(
                f"engine.gpus: {self.engine.gpus} is neither a whole number nor a part of one; choose {self.engine.gpus:.0f}"
            )
        if self.agent.policies and not self.learner.lora:
            raise ValueError(
                "agent.policies: a policy of an agent's own is a LoRA adapter; add [learner.lora] with rank = 16, or leave "
                "agent.policies out"
            )
        if self.learner.lora and self.engine.gpus and (self.engine.dtype or self.learner.dtype) == "float32":
            raise ValueError(
                'engine.dtype: on GPUs vLLM runs LoRA adapters in half precision alone; set engine.dtype = "bfloat16"'
            )
        if reserved := {POLICY, BASE} & self.agent.policies.keys():
            raise ValueError(f"agent.policies: the name {min(reserved)} means another thing; take another")
        for name in self.agent.train:
            if not set(name) & set("*?[") and self.policy_of(name) == BASE:
                raise ValueError(
                    f"agent.train: {name} has no policy to train; add it to one in agent.policies, or leave it out of agent.train"
                )
        if 0 < self.engine.gpus < 1 < self.engine.replicas:
            raise ValueError("engine.gpus: replicas do not share a GPU; set engine.gpus = 1, or engine.replicas = 1")
        for section, learner in self.learners.items():
            if learner.attention.startswith("flash") and not (learner.gpus and learner.dtype == "bfloat16"):
                raise ValueError(
                    f"learner.attention: {learner.attention} is for GPUs and half precision; set {section}.gpus and "
                    'learner.dtype = "bfloat16", or learner.attention = "sdpa"'
                )
            if learner.offload_optimiser and learner.zero_stage == 0:
                raise ValueError(
                    "learner.offload_optimiser: ZeRO-0 keeps the optimiser where the weights are; set learner.zero_stage = 2"
                )
            if 0 < learner.gpus < 1 < learner.ranks:
                raise ValueError(
                    f"{section}.gpus: ranks cannot share a GPU; set {section}.gpus = 1, or {section}.ranks = 1"
                )
        return self

    def _check_sequence_parallel(self, section: str, learner: LearnerSection) -> None:
        size, key = learner.sequence_parallel, "learner.sequence_parallel"
        if size == 1:
            return
        if learner.ranks % size:
            raise ValueError(f"{key}: {size} does not divide {section}.ranks = {learner.ranks}; choose a divisor of it")
        if learner.attention == "eager":
            raise ValueError(f'{key}: eager attention cannot be shared out; set learner.attention = "sdpa"')
        if learner.packed and not learner.attention.startswith("flash"):
            raise ValueError(
                f"{key}: {learner.attention} would see beyond a packed sample; leave learner.packed out, or set "
                'learner.attention = "flash_attention_2"'
            )
        if self.algorithm.teacher and not self.algorithm.teacher_url:
            raise ValueError(
                f"{key}: the learners share out sequences for the policy's own model alone; give algorithm.teacher as an endpoint, "
                "or leave it out"
            )

    @property
    def nccl(self) -> bool:
        """Whether weights go from GPU to GPU; processes that share one GPU cannot, their weights go through memory. Adapters
        are small and go as bytes."""
        return self.learner.gpus == 1 and self.engine.gpus >= 1 and not self.learner.lora

    @property
    def adapters(self) -> list[str]:
        """The policies that are LoRA adapters; none where all weights are trained."""
        return (sorted(self.agent.policies) or [POLICY]) if self.learner.lora else []

    def policy_of(self, agent: str) -> str:
        """The policy that samples the calls of the agent of that name: with agent.policies the first with a pattern that
        fits, or the model as it is."""
        if not self.agent.policies:
            return POLICY
        return _first(agent, self.agent.policies) or BASE

    def trains(self, agent: str) -> bool:
        """Whether the calls of the agent of that name are trained."""
        own = self.upstream_of(agent) is None and self.policy_of(agent) != BASE
        return own and _fits(agent, self.agent.train)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"\s", text)
        )
    except ValueError:  # a port beyond all ports, a bracket too many
        return False


def key_in(variable: str, key: str) -> str:
    """The API key that the environment variable holds, which the config's `key` names. Raises ConfigError where it is not set."""
    if not os.environ.get(variable):
        raise ConfigError(
            f"{key}: the environment variable {variable} is not set; set it to the key, or leave {key.rpartition('.')[2]} out "
            "where none is asked for"
        )
    return os.environ[variable]


def _check_url(url: str, key: str, key_env: str, example: str = "https://api.openai.com/v1") -> None:
    """Raises ValueError where the config's `key` is no URL to ask under; `key_env` names the API key's variable."""
    if re.match(r"(\w+://)?[^/?#]*@", url):
        raise ValueError(
            f"{key}: has a user or a password before its host, which logs would show; take them out, and name the "
            f"environment variable that holds the key in {key_env}"
        )
    if not _is_url(url):
        raise ValueError(f'{key}: {url!r} is no URL; write it as a client gets it, as "{example}"')


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _first(agent: str, owners: dict[str, list[str]]) -> str | None:
    """The first of `owners` with a pattern that fits the agent's name."""
    return next((owner for owner, patterns in owners.items() if _fits(agent, patterns)), None)


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
    return _absolute(config)


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
    if kind == "model_type" and loc[0] == "upstream":
        return f"{key}: a value, and not an upstream; each has a name: write [upstream.NAME] and its keys below it"
    if kind == "model_type":
        return f"{key}: a section, not the value {given}; {_MISSING.get(key, f'write [{key}] and its keys below it')}"
    if kind == "list_type" and isinstance(first["input"], str):
        return f"{key}: should be a list; write [{given}]"
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
}
_MENDS = {
    "run.name": "a name of at most 64 letters, digits and . _ - that begins with a letter or digit",
    "upstream": "each has a name, [upstream.NAME] and its keys below it",
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
    named = {"upstream": ["upstream", "NAME"]}
    sections = [named.get(section, [section]) for section in keys_of([]) if section != "prompts"]
    return [".".join(section) for section in sections if name in keys_of(section)]


def keys_of(loc: list[str]) -> list[str]:
    """The keys of the section at `loc`, as the TOML has them; of the whole file for []."""
    model: Any = Config
    for part in loc:
        if get_origin(model) is dict:
            model = get_args(model)[1]
            continue
        found = model.model_fields[part].annotation
        sections = (one for one in get_args(found) if hasattr(one, "model_fields"))
        model = found if get_origin(found) in (dict, None) else next(sections, found)
    return [info.alias or name for name, info in model.model_fields.items() if loc or name != "path"]


def _absolute(config: Config) -> Config:
    config.run.directory = str(_beside(config, "run.directory", config.run.directory))
    mend = "give a JSONL or Parquet file of tasks"
    train = [str(_file(config, "data.train", file, mend)) for file in config.data.train_files]
    if config.data.train is not None:
        config.data.train = train if isinstance(config.data.train, list) else train[0]
    if config.data.eval:
        config.data.eval = str(_file(config, "data.eval", config.data.eval, mend))
    if config.data.rollouts:
        config.data.rollouts = str(_run_folder(config, config.data.rollouts))
    if config.data.chats:
        config.data.chats = str(_file(config, "data.chats", config.data.chats, "give a JSONL or Parquet file of chats"))
    config.model.path = _model(config, "model.path", config.model.path)
    if config.algorithm.teacher and not config.algorithm.teacher_url:
        config.algorithm.teacher = _model(config, "algorithm.teacher", config.algorithm.teacher)
    config.prompts = {name: str(_beside(config, f"prompts.{name}", file)) for name, file in config.prompts.items()}
    config.first_prompts()
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


def _run_folder(config: Config, value: str) -> Path:
    path = _beside(config, "data.rollouts", value)
    if not (path / "store").is_dir():
        raise ConfigError(f"data.rollouts: {path} is no run, with a folder store in it; give the folder of one")
    return path


def _model(config: Config, key: str, value: str) -> str:
    """The absolute path of a folder, or a Hugging Face id as it is."""
    path = _beside(config, key, value)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ConfigError(f"{key}: {path} is a file; give the folder it lies in, or a Hugging Face id")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value):
        there = [folder.name for folder in path.parent.glob("*/")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        mend = f"did you mean {path.parent / near[0]}?" if near else "give a Hugging Face id or a folder"
        raise ConfigError(f"{key}: no folder {path}; {mend}")
    return value


def _with_clip_range(defaults: dict[str, Any], loss: Any) -> dict[str, Any]:
    """An algorithm's `defaults` where the TOML gives it `loss`: one that is not its own brings its own clip range."""
    if loss in (None, defaults.get("loss", "vanilla")):
        return defaults
    of_loss = algorithm(loss, Path()).defaults if loss in NAMES else {}
    clips = ("clip_low", "clip_high")
    rest = {key: value for key, value in defaults.items() if key not in clips}
    return rest | {key: of_loss[key] for key in clips if key in of_loss}
