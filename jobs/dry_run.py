"""`raygent train CONFIG --dry-run`: the checks, and what a run would use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from raygent.actors.grading import GraderError, grade_once
from raygent.cluster.task_choice import shares
from raygent.config import OPTIMISER, Config, ConfigError, LearnerSection
from raygent.data_files import load_tasks
from raygent.jobs.check import (
    about_model,
    check,
    cluster_resources,
    gpus_here,
    gpus_wanted,
    on_cluster,
    submits,
    template_of,
    width_of,
    without_weights,
)
from raygent.records import last_line, to_json

# Resident memory of the processes beside what is in them; measured with a small model on CPU.
LEARNER_PROCESS, ENGINE_PROCESSES, WORKER_PROCESS = 1.0 * 2**30, 1.8 * 2**30, 0.3 * 2**30
LOGITS_BYTES = (
    20  # of [tokens, vocabulary] at most: the model's logits, float32 copies, their log-softmax, the gradient
)


def dry_run(config: Config) -> None:
    """Print what a run would use; starts nothing. Raises ConfigError as check() does."""
    changed = config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude={"path"})
    check(config)
    steps, algorithm = config.run.steps, config.algorithm
    print(
        f"config   {config.path}: run {config.run.name!r}, {steps} steps of {algorithm.tasks_per_step} tasks x "
        f"{algorithm.group_size} rollouts, into {config.run_directory}; of its keys these are not the defaults:"
    )
    print("".join(f"         {line}\n" for line in tomli_w.dumps(changed).splitlines() if line), end="")
    _tell_data(config)
    _tell_agent(config)
    memory = memory_estimate(config)
    _tell_model(config, memory)
    _tell_teacher(config)
    _tell_cluster(config, memory)


def _tell_data(config: Config) -> None:
    tasks = load_tasks(config.data.train, "data.train")
    held_out = load_tasks(config.data.eval, "data.eval")
    trained_on = {to_json(task.input) for task in tasks}
    twice = sum(to_json(task.input) in trained_on for task in held_out)
    known = f"; {twice} of these have the input of a training task" if twice else ""
    print(f"data     {len(tasks)} tasks to train on, {len(held_out)} held out{known}")
    drawn = isinstance(config.data.train, list) and not config.recorded and not config.changes_prompts
    for name, share in shares(config, tasks).items() if drawn else ():
        number = sum(task.source == name for task in tasks)
        print(f"         {name}: {number} tasks, {share:.1%} of a step's")
    if config.recorded:
        print(f"         trained on what {config.data.rollouts or config.data.chats} holds")
    for task in tasks[:1]:
        print(f"task     {task.id}: {to_json(task.input)[:200]}")


def _tell_agent(config: Config) -> None:
    print(f"agent    {config.agent.run or ' '.join(config.agent.command or [])}: ready")
    for name, upstream in config.upstream.items():
        print(f"upstream {name}: {upstream.model} at {upstream.base_url} for {', '.join(upstream.agents)}")
    for name, file in config.prompts.items():
        print(f"prompt   {name}: {file}")
    if config.prompt_search and config.prompt_search.name != "bootstrap_fewshot":
        by = config.upstream_of(OPTIMISER)
        print(f"         improved by {f'upstream.{by}' if by else 'the served model'} (agent {OPTIMISER})")
    if not config.grader.run:
        print("grader   none: the agent returns the reward or emits it")
        return
    tasks = load_tasks(config.data.train, "data.train") or load_tasks(config.data.eval, "data.eval")
    if not tasks:
        return
    task = tasks[0]
    try:
        graded = grade_once(config, task.input, task.private, None)
        print(f"grader   {config.grader.run}: {graded.verdict.value:g} for no output, in {graded.seconds:.2f} s")
    except GraderError as error:
        print(f"grader   {config.grader.run}: fails on no output: {last_line(error)}")
        print("         a rollout that it fails on ends as grader_error, with grader.failed_reward")


def _tell_model(config: Config, memory: dict[str, float]) -> None:
    about = about_model(config)
    if not about:
        print(f"model    {config.model.path}: on the hub, which does not answer here")
        return
    print(
        f"model    {config.model.path}: {memory['parameters']:,.0f} parameters, vocabulary {about.get('vocab_size')}, "
        f"context {config.model.context or about.get('max_position_embeddings')}"
    )
    tell_parsers(config)
    if not template_of(config):
        print("         it has no chat template: only the Completions API will work without model.chat_template")
    if config.changes_prompts:
        print(f"memory   about {_gib(memory['engine'])} an engine")
        return
    print(
        f"memory   about {_gib(memory['learner_rank'])} a learner rank ({_gib(memory['learner_states'])} of weights, gradients "
        f"and optimiser, {_gib(memory['learner_logits'])} of logits), {_gib(memory['engine'])} an engine"
    )


def _tell_teacher(config: Config) -> None:
    if not config.algorithm.teacher_url:
        return
    if submits():
        print(f"teacher  {config.algorithm.teacher_url}: asked by the job, from where it runs")
        return
    from raygent.cluster.teacher import Teacher  # and httpx, which takes its time

    teacher = Teacher(config)
    teacher.check()
    print(f"teacher  {teacher.model} at {teacher.url}: tells the log-probabilities of tokens of the model")


def tell_parsers(config: Config) -> None:
    print(
        f"parsers  tool calls: {config.model.tool_parser}, reasoning: {config.model.reasoning_parser} (others by "
        "model.tool_parser and model.reasoning_parser)"
    )


def _tell_cluster(config: Config, memory: dict[str, float]) -> None:
    ranks = sum(learner.ranks for learner in config.learners.values())
    cpus = ranks + config.engine.replicas + config.workers.cpus * config.workers.max
    gpus = sum(gpus_wanted(config).values())
    asked = f"cluster  up to {cpus:g} CPUs and {gpus:g} GPUs asked for"
    if on_cluster():
        address = os.environ["RAY_ADDRESS"]
        there = cluster_resources(address)
        print(f"{asked}; the nodes of {address} have {there.get('CPU', 0):g} and {there.get('GPU', 0):g}")
        if cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0):
            print("         more than is there now: the run waits for its autoscaler to add nodes")
        return
    cores, free = os.cpu_count() or 1, psutil.virtual_memory().available
    print(f"{asked}; this machine has {cores} and {gpus_here()}, and {_gib(free)} of memory free")
    if cpus > cores:
        print("         more CPUs than there are: the actors share them")
    whole = WORKER_PROCESS * config.workers.max
    for name, learner in config.learners.items():
        whole += learner.ranks * (LEARNER_PROCESS if learner.gpus else memory[f"{name}_rank"])
    whole += config.engine.replicas * (ENGINE_PROCESSES if config.engine.gpus else memory["engine"])
    print(f"         about {_gib(whole)} of it needed{': MORE THAN IS FREE' if whole > free else ''}")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def memory_estimate(config: Config) -> dict[str, float]:
    """`parameters` of the model, and bytes: of a `learner_rank` (of which `learner_states`: weights, gradients and Adam's, and a
    reference's weights; `learner_logits`: those of a micro-batch), of a `critic_rank` and a `reference_rank` where these have
    their own, and of an `engine` (weights, KV cache on CPU, processes). What is offloaded is not counted.
    """
    parameters = count_parameters(config)
    states = parameters * _bytes_of_states(config.learner)
    apart = config.of_reference
    kept = config.with_reference or apart
    reference = count_parameters(config, config.algorithm.teacher) if kept and config.algorithm.teacher else parameters
    if config.with_reference:
        states += reference * _bytes_of_weights(config.learner)
    vocabulary = about_model(config).get("vocab_size") or 0
    logits = config.learner.micro_batch_tokens / config.learner.sequence_parallel * vocabulary * LOGITS_BYTES
    engine_width = width_of(config.engine.dtype or config.learner.dtype)
    of_others = {}
    if critic := config.of_critic:  # its logits are one a token
        of_others["critic_rank"] = parameters * _bytes_of_states(critic.learner) + LEARNER_PROCESS
    if apart:
        of_others["reference_rank"] = reference * _bytes_of_weights(apart.learner) + logits + LEARNER_PROCESS
    return of_others | {
        "parameters": parameters,
        "learner_states": states,
        "learner_logits": logits,
        "learner_rank": states + logits + LEARNER_PROCESS,
        "engine": parameters * engine_width + config.engine.cache_bytes + ENGINE_PROCESSES,
    }


def _bytes_of_states(learner: LearnerSection) -> float:
    """A parameter, on each rank: weights, gradients and Adam's states.

    ZeRO stage s shards what it names over the ranks: 1 the optimiser's states (float32 master copy and two moments), 2 the
    gradients too, 3 the weights too; Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3.
    """
    ranks, stage, width = learner.ranks, learner.zero_stage, width_of(learner.dtype)
    if learner.lora:  # the adapters themselves are small beside the model
        return _bytes_of_weights(learner)
    gradients = width / (ranks if stage >= 2 else 1)
    optimiser = (8 if stage == 0 and width == 4 else 12) / (ranks if stage >= 1 else 1)
    return _bytes_of_weights(learner) + gradients + (0 if learner.offload_optimiser and learner.gpus else optimiser)


def _bytes_of_weights(learner: LearnerSection) -> float:
    """A parameter, on each rank."""
    return width_of(learner.dtype) / (learner.ranks if learner.zero_stage == 3 else 1)


def count_parameters(config: Config, teacher: str | None = None) -> int:
    """From the headers of the folder's safetensors files, else from the model's config (0 where that is not at hand); of the
    model, or of a `teacher`, which counts as the model where it is no folder."""
    path = Path(teacher or config.model.path)
    files = list(path.glob("*.safetensors")) if path.is_absolute() else []
    if files:
        return sum(map(_count_in, files))
    if not about_model(config):
        return 0
    return sum(parameter.numel() for parameter in without_weights(config.model.path).parameters())


def _count_in(path: Path) -> int:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise ConfigError(f"model.path: {path} is no whole safetensors file; fetch it again (git lfs pull?)")
        header: dict[str, Any] = json.loads(file.read(size))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
    return total
