"""The learners: a DeepSpeed group, one Ray actor a rank, and the driver's end of it, LearnerGroup.

A rank owns its shard of the weights and of the optimiser. It may be asked: `step`, `measure`, `push`, `save`.
Gradients: with a batch's weights summing to 1, the loss is a sum over tokens, micro-batches and ranks. DeepSpeed divides
by the gradient-accumulation steps, which is off here, and takes the mean over ranks, which `backward` makes up for.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raygent.actors import adapters
from raygent.actors.checkpoint import BEST, CRITIC, Checkpoint, laid_out
from raygent.actors.environment import NO_TELEMETRY, free_port, offline
from raygent.actors.micro_batches import MicroBatch, Share, deal, micro_batches
from raygent.actors.sequence_parallel import SequenceParallel
from raygent.actors.working_folder import localised, working_folder
from raygent.algorithms.loss import kl_loss
from raygent.config import POLICY, Config
from raygent.records import PromptVersion, Sample

logger = logging.getLogger("raygent")
PLACEMENT_DEADLINE_S = 1800.0
DEATH_S = 15.0  # within which Ray tells of a dead actor
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LearnerLost(RuntimeError):
    """A rank died: the group is of no more use, the last checkpoint is."""


class Learner:
    """One rank. `start` once, after all ranks are there."""

    MEANS: tuple[str, ...] = (
        "entropy",
        "clip_fraction",
        "kl_old",
        "kl_reference",
    )  # over the tokens, of what _loss sums up

    def __init__(self, config: Config, rank: int, root: str) -> None:
        """`root` is the driver's working folder: on another node the same files lie in this one's."""
        self.config, self.rank, self.ranks = localised(config, root), rank, config.learner.ranks

    def address(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    def pid(self) -> int:
        return os.getpid()

    def start(self, host: str, port: int, checkpoint: Checkpoint | None) -> None:
        """Join the group and load the weights: the checkpoint's with its optimiser, else model.path."""
        import deepspeed

        self._join(host, port)
        settings = self.config.learner
        path = str(checkpoint.path) if checkpoint and not settings.lora else self.config.model.path
        model = self._load(path)
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        groups = [{"params": list(model.parameters())}]
        if settings.lora:
            if settings.gradient_checkpointing:
                model.enable_input_require_grads()  # or nothing in a layer whose own weights are frozen has a gradient
            model = adapters.add_adapters(model, self.config)
            groups = [{"params": adapters.parameters_of(model, name)} for name in self.config.adapters]
        optimiser = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=self._deepspeed_config())
        self.reference = self._load_reference() if self.config.with_reference else None
        if checkpoint:
            whole = settings.lora is None
            loaded, _ = self.engine.load_checkpoint(str(checkpoint.path), tag="optimiser", load_module_strict=whole)
            if loaded is None:
                raise RuntimeError(f"{checkpoint.path}/optimiser does not load")
            for group in self.engine.optimizer.param_groups:  # of now, not of when it was saved
                group.update(betas=settings.betas, weight_decay=settings.weight_decay)
        self.version = checkpoint.version if checkpoint else 0  # of the weights, as the engines have them
        self._note(start=checkpoint.step if checkpoint else 0)

    def _join(self, host: str, port: int) -> None:
        import deepspeed
        import deepspeed.ops

        settings = self.config.learner
        torch.set_num_threads(settings.threads)
        torch.manual_seed(self.config.run.seed)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for a minute
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(self.rank), WORLD_SIZE=str(self.ranks), LOCAL_RANK="0"
        )
        self.device = torch.device("cuda", 0) if settings.gpus else torch.device("cpu")
        deepspeed.init_distributed("nccl" if settings.gpus else "gloo", auto_mpi_discovery=False, verbose=False)
        several = settings.sequence_parallel > 1
        self.sequence = SequenceParallel(settings, self.config.model.path, self.rank) if several else None

    def _load(self, path: str) -> Any:
        from transformers import AutoModelForCausalLM

        settings = self.config.learner
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[settings.dtype], attn_implementation=settings.attention
        )

    def _load_reference(self) -> Any:
        """The first weights, or the teacher: frozen, and under ZeRO-3 sharded as the policy is."""
        import deepspeed

        reference = self._load(self.config.algorithm.teacher or self.config.model.path).eval().requires_grad_(False)
        if self.config.learner.zero_stage == 3:
            return deepspeed.initialize(model=reference, config=self._deepspeed_config())[0]
        torch.nn.Module.to(reference, self.device)
        return reference

    def policy_of(self, sample: Sample) -> str:
        """The weights that `sample` trains."""
        return self.config.policy_of(sample.agent)

    @property
    def first_step(self) -> int:
        """The driver step from which on it learns: not while a critic learns alone."""
        return self.config.critic.warmup_steps if self.config.of_critic else 0

    def _note(self, **fields: Any) -> None:
        """A line in the run's `learner.jsonl`, by rank 0: each start and the step it goes on from, each step applied."""
        if self.rank == 0:
            self.config.run_directory.mkdir(parents=True, exist_ok=True)
            with (self.config.run_directory / "learner.jsonl").open("a") as file:
                file.write(json.dumps(fields) + "\n")

    def _deepspeed_config(self) -> dict[str, Any]:
        settings = self.config.learner
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "prescale_gradients": False,
            "gradient_clipping": settings.clip_gradient,
            "zero_optimization": {
                "stage": settings.zero_stage,
                "stage3_param_persistence_threshold": 0,
                "offload_optimizer": {"device": "cpu" if settings.offload_optimiser else "none"},
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.dtype == "bfloat16"},
            # ZeRO-0 knows no other accumulation than in the weights' own dtype
            "data_types": {"grad_accum_dtype": "fp32" if settings.zero_stage else None},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    def step(self, samples: list[Sample], step: int) -> dict[str, float]:
        """`algorithm.epochs` x `algorithm.mini_batches` optimiser steps on this rank's share of `samples` (every rank gets them
        all).

        Returns the metrics of the whole group, the same on each rank. The first mini-batch is seen before any update, so
        `mismatch_*`, of its tokens that were sampled from the weights of now, is |engine - learner| logprob under equal
        weights. Where there are none (no samples, or all from older weights) it is left out.
        """
        started = time.monotonic()
        sums: dict[str, float] = {}
        gaps: list[np.ndarray] = []
        norms: list[float] = []
        rate = self._learning_rate(step)
        algorithm = self.config.algorithm
        parts = _mini_batches(samples, algorithm.mini_batches) * algorithm.epochs
        for number, part in enumerate(parts):
            self._set_learning_rates(part, rate)
            self.backward(part, sums, gaps if number == 0 else None)
            norms.append(self._update())
        self._note(step=step, rollouts=sorted({sample.rollout_id for sample in samples}))
        applied = [norm for norm in norms if np.isfinite(norm)]
        metrics = {name: value for name, value in self._reduced(sums, len(parts)).items() if np.isfinite(value)}
        metrics |= self._mismatch(gaps)
        metrics |= {
            "gradient_norm": float(np.mean(applied)) if applied else 0.0,
            "updates_skipped": float(len(norms) - len(applied)),
            "learning_rate": rate,
            "learn_tokens_per_s": float(sum(map(len, samples))) * algorithm.epochs / (time.monotonic() - started),
        }
        return metrics

    def backward(self, samples: list[Sample], sums: dict[str, float], gaps: list[np.ndarray] | None = None) -> None:
        """Accumulate the gradient of the loss over all of `samples` (a policy's shares sum to 1 after this scales them)."""
        if self.config.learner.lora and self.config.learner.zero_stage == 3:
            # DeepSpeed sets it in the first backward pass, of the parameters that this one reaches, and then adds to it
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        mine = self._mine(samples)
        totals: dict[str, float] = {}
        for sample in samples:
            add(totals, self.policy_of(sample), sample.share)
        for place, (policy, batch) in enumerate(mine):
            self._use(policy)
            self.engine.set_gradient_accumulation_boundary(place == len(mine) - 1)
            scale = 1.0 / totals[policy] if totals[policy] > 0 else 0.0
            told = (sums, gaps) if self._is_first else ({}, None)
            loss = self._loss(batch.to(self.device), scale, *told)
            # DeepSpeed takes the mean over the ranks; a group that shares sequences sums up its own (SequenceParallel.whole)
            self.engine.backward(loss * (self.ranks / self.config.learner.sequence_parallel), scale_wrt_gas=False)

    @property
    def _is_first(self) -> bool:
        """Of those that share sequences, who all find the same: whether this rank is the one that tells of it."""
        return self.sequence is None or self.sequence.place == 0

    def _mine(self, samples: list[Sample]) -> list[tuple[str, MicroBatch]]:
        """This rank's micro-batches, each of one policy; as many and in the same order of policies on every rank."""
        settings, parts = self.config.learner, dict[str, Share]()
        shared = settings.sequence_parallel
        most = settings.micro_batch_tokens if shared == 1 or settings.packed else 1  # a sample each
        for place, sample in enumerate(samples):
            parts.setdefault(self.policy_of(sample), []).append((place, sample))
        return [
            (policy, batch)
            for policy, part in sorted(parts.items())
            for batch in micro_batches(deal(part, self.ranks // shared), self.rank // shared, most, settings.packed)
        ]

    def _use(self, policy: str) -> None:
        if self.config.learner.lora:
            adapters.use(self.engine.module, policy)

    def _update(self) -> float:
        """The optimiser's step. Returns the norm of the whole gradient before clipping; where that is not finite, as DeepSpeed's
        ZeRO has it, the step is left out and no weight changes."""
        # DeepSpeed tells the norm only where an optimiser of its own stands around torch's
        plain = [parameter.grad for parameter in self.engine.module.parameters() if parameter.grad is not None]
        norm = None if hasattr(self.engine.optimizer, "_global_grad_norm") else torch.nn.utils.get_total_norm(plain)
        if norm is not None and not norm.isfinite():
            self.engine.optimizer.zero_grad()
            return float(norm)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _loss(
        self, batch: MicroBatch, scale: float, sums: dict[str, float], gaps: list[np.ndarray] | None
    ) -> torch.Tensor:
        algorithm = self.config.algorithm
        logprobs, entropy = self._token_logprobs(self.engine, batch)
        weights = batch.weights * scale
        loss, told = self.config.named_algorithm.loss(
            logprobs, batch.logprobs, batch.advantages, batch.mask, weights, algorithm
        )
        mask = batch.mask
        with torch.no_grad():
            count = float(mask.sum())
            difference = (logprobs - batch.logprobs)[mask]
            add(sums, "loss", float(loss))
            add(sums, "tokens", count)
            add(sums, "entropy", float(entropy[mask].sum()))
            add(sums, "clip_fraction", told.get("actor/pg_clipfrac", 0.0) * count)
            known = difference[batch.versions[mask] >= 0]  # not so the log-probabilities of what was recorded elsewhere
            add(sums, "kl_old", float((known.exp() - 1 - known).sum()))
            if gaps is not None:
                current = batch.versions[mask] == self.version
                gaps.append(difference[current].abs().float().cpu().numpy())
        if algorithm.entropy:
            loss = loss - algorithm.entropy * (entropy * mask * weights).sum()
        if algorithm.kl_in_loss:
            assert batch.reference is not None
            penalty = kl_loss(logprobs, batch.reference, mask, weights, algorithm.kl_kind)
            add(sums, "kl_reference", float((logprobs - batch.reference).detach()[mask].sum()))
            loss = loss + algorithm.kl * penalty
        return loss

    def _token_logprobs(self, model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each masked token given those before it, and the entropy there: float32 [B, T], else 0.

        At the temperature each token was sampled at, as the engine's processed logprobs are. The float32 copies of the
        logits are as large as the vocabulary, so they are made of the masked tokens alone.
        """
        chosen = batch.mask[:, 1:]
        logits, mine = self._logits_before(model, batch)
        temperature, token_ids = batch.temperature[:, 1:][chosen][mine], batch.token_ids[:, 1:][chosen][mine]
        normalised = (logits.float() / temperature[:, None]).log_softmax(-1)
        picked = normalised.gather(-1, token_ids[:, None])[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.algorithm.entropy != 0):
            entropy = -(normalised.exp() * normalised).sum(-1)
        return self._spread(picked, mine, batch), self._spread(entropy, mine, batch)

    def _logits_before(self, model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What `model` makes of all up to the token before each masked one that is this rank's: [its tokens, logits]; and which
        of the masked tokens are: bool [masked tokens].

        Packed, all rows are one, and their positions tell transformers where each begins, beyond which none of them sees.
        """
        token_ids, before = batch.token_ids, torch.nn.functional.pad(batch.mask[:, 1:], (0, 1))
        mine = torch.ones(int(before.sum()), dtype=torch.bool, device=before.device)
        if not (self.config.learner.packed or self.sequence):
            return model(input_ids=token_ids, use_cache=False).logits[before], mine
        positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand(token_ids.shape)
        if self.config.learner.packed:
            token_ids, positions, before = (row[batch.real][None] for row in (token_ids, positions, before))
        if self.sequence:
            mine = self.sequence.mine(before)
            token_ids, positions, before = map(self.sequence.part, (token_ids, positions, before))
        return model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[before], mine

    def _spread(self, values: torch.Tensor, mine: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """The masked tokens' values, of which this rank has `mine`, at their places: float32 [B, T], else 0."""
        whole = self.sequence.whole(values, mine) if self.sequence else values
        nothing = torch.zeros_like(batch.logprobs[:, 1:])
        return torch.nn.functional.pad(nothing.masked_scatter(batch.mask[:, 1:], whole), (1, 0))

    @torch.no_grad()
    def measure(self, what: str, samples: list[Sample]) -> list[tuple[int, np.ndarray]]:
        """This rank's share: each sample's place in `samples` and what was measured of it, float32 [T], 0 where not masked."""
        found = []
        for policy, batch in self._mine(samples):
            self._use(policy)
            values = self._measured(what, batch.to(self.device))
            for row, place in enumerate(batch.places):
                if place >= 0 and self._is_first:
                    found.append((place, values[row, : len(samples[place])].cpu().numpy()))
        return found

    def _measured(self, what: str, batch: MicroBatch) -> torch.Tensor:
        """The log-probabilities under the weights of now ("current") or the "reference"."""
        if what == "current":
            return self._token_logprobs(self.engine, batch)[0]
        if self.reference is not None:
            return self._token_logprobs(self.reference, batch)[0]
        with self.engine.module.disable_adapter():
            found = self._token_logprobs(self.engine, batch)[0]
        self._use(self.config.adapters[0])  # peft has frozen all others
        return found

    def _learning_rate(self, step: int) -> float:
        settings, steps = self.config.learner, max(self.config.run.steps - self.first_step, 1)
        step = max(step - self.first_step, 0)
        rate = settings.learning_rate * (1 - step / steps if settings.decay == "linear" else 1.0)
        rate *= min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return rate

    def _set_learning_rates(self, samples: list[Sample], rate: float) -> None:
        """`rate` for what `samples` train. An adapter that they do not train stays as it is to the bit: none."""
        trained = {self.policy_of(sample) for sample in samples if sample.loss_mask.any()}
        names = self.config.adapters or [POLICY]
        for name, group in zip(names, self.engine.optimizer.param_groups, strict=True):
            group["lr"] = rate if name in trained else 0.0

    def _reduced(self, sums: dict[str, float], updates: int) -> dict[str, float]:
        names = ["loss", "tokens", *self.MEANS]
        values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        total = dict(zip(names, values.tolist(), strict=True))
        tokens, loss = total.pop("tokens"), total.pop("loss")
        means = {name: value / tokens for name, value in total.items()} if tokens else {}
        return {"loss": loss / max(updates, 1)} | means

    def _mismatch(self, gaps: list[np.ndarray]) -> dict[str, float]:
        every: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(every, np.concatenate(gaps) if gaps else np.zeros(0, np.float32))
        gap = np.concatenate(every)
        if not len(gap):
            return {}
        return {
            "mismatch_mean": float(gap.mean()),
            "mismatch_p99": float(np.quantile(gap, 0.99)),
            "mismatch_max": float(gap.max()),
        }

    def push(self, engine: Any, version: int) -> dict[str, float]:
        """This rank's part in sending the weights to the engines as `version`."""
        from raygent.actors.weight_transfer import push_cpu, push_nccl

        self.version = version
        if self.config.learner.lora:
            return adapters.push_adapters(self.engine.module, self.config, self.rank, engine, version)
        push = push_nccl if self.config.nccl else push_cpu
        return push(self.engine.module, self.config.learner.zero_stage, self.rank, engine, version)

    def save(self, folder: str) -> None:
        """Write the rank's part of a checkpoint into `folder`; rank 0 the weights as transformers and vLLM load them, or the
        adapters as peft and vLLM do."""
        from transformers import AutoTokenizer

        from raygent.actors.weight_transfer import full_parameters

        lora, stage = self.config.learner.lora, self.config.learner.zero_stage
        self.engine.save_checkpoint(
            folder, tag="optimiser", save_latest=False, exclude_frozen_parameters=lora is not None
        )
        if lora:
            for name in self.config.adapters:
                if files := adapters.files_of(self.engine.module, name, stage, self.rank == 0):
                    adapters.write_files(files, Path(folder) / adapters.FOLDER / name)
            return
        state = {
            name: tensor.to("cpu", copy=True) if self.rank == 0 else None
            for name, tensor in full_parameters(self.engine.module.named_parameters(), stage)
        }
        if self.rank == 0:
            model = self.engine.module
            tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
            model.save_pretrained(
                folder, state_dict={name: tensor for name, tensor in state.items() if name not in tied}
            )
            source = Path(self.config.model.path)
            if source.is_dir() and not any(source.glob("tokenizer*")):
                return
            tokenizer = AutoTokenizer.from_pretrained(self.config.model.path)
            if template := self.config.model.chat_template:  # what the policy was trained with
                tokenizer.chat_template = Path(template).read_text()
            tokenizer.save_pretrained(folder)


def checkpoint_activations(model: Any) -> None:
    """Keep no activations within the layers of a transformers model. That is done only in training mode: without dropout,
    since the policy that is trained is the one that sampled."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable()


def add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def _mini_batches(samples: list[Sample], number: int) -> list[list[Sample]]:
    """Whole rollouts dealt in turn to `number` mini-batches (fewer where there are not enough)."""
    if not samples:
        return []
    rollouts = list(dict.fromkeys(sample.rollout_id for sample in samples))
    place = {rollout: index % min(number, len(rollouts)) for index, rollout in enumerate(rollouts)}
    return [
        [sample for sample in samples if place[sample.rollout_id] == part] for part in range(min(number, len(rollouts)))
    ]


class LearnerGroup:
    """The driver's end: every method asks all ranks at once. Raises LearnerLost where one of them died."""

    def __init__(self, config: Config, kind: type[Learner] = Learner) -> None:
        self.config, self.kind = config, kind
        self.directory = config.run_directory
        self.ranks: list[Any] = []
        self.group: PlacementGroup | None = None

    def start(self, checkpoint: Checkpoint | None) -> None:
        settings = self.config.learner
        need: dict[str, float] = {"CPU": 1, "GPU": settings.gpus} if settings.gpus else {"CPU": 1}
        self.group = placement_group([need] * settings.ranks, strategy="PACK")
        _wait_for(self.group, need, settings.ranks)
        teacher = self.config.algorithm.teacher if self.config.with_reference else None
        environment = NO_TELEMETRY | offline(*filter(None, [self.config.model.path, teacher]))
        environment |= {"OMP_NUM_THREADS": str(settings.threads)}
        self.ranks = [
            ray.remote(self.kind)
            .options(
                num_cpus=1,
                num_gpus=settings.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
                runtime_env={"env_vars": environment},
            )
            .remote(self.config, rank, str(working_folder()))
            for rank in range(settings.ranks)
        ]
        host, port = self._all("address")[0]
        self._all("start", host, port, checkpoint)

    def step(self, samples: list[Sample], step: int) -> dict[str, float]:
        return self._all("step", ray.put(samples), step)[0]

    def measure(self, what: str, samples: list[Sample]) -> list[np.ndarray]:
        """Of each masked token of each sample its log-probability under the weights of now ("current") or the "reference", or
        the critic's "values" before it: float32 [T], else 0."""
        found = dict(entry for share in self._all("measure", what, ray.put(samples)) for entry in share)
        return [found[place] for place in range(len(samples))]

    def push(self, engine: Any, version: int) -> dict[str, float]:
        return self._all("push", engine, version)[0]

    def save(
        self,
        step: int,
        version: int,
        critic: LearnerGroup | None = None,
        prompts: dict[str, PromptVersion] | None = None,
    ) -> Checkpoint:
        """A checkpoint `checkpoints/step-NNNNNN/`, complete once it has that name, with the critic's in `critic/`; older ones beyond
        keep_checkpoints go. `prompts`: see Checkpoint."""
        root = self.directory / "checkpoints"
        final, partial = root / f"step-{step:06d}", root / f".step-{step:06d}.partial"
        for left in root.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left)
        if not final.exists():
            partial.mkdir(parents=True)
            self._all("save", str(partial))
            if critic:
                critic._all("save", str(partial / CRITIC))
            about = {"step": step, "version": version, "laid_out": laid_out(self.config), "prompts": prompts or {}}
            (partial / "raygent.json").write_text(json.dumps(about) + "\n")
            os.sync()
            partial.rename(final)
        best = (root / BEST).resolve()
        for old in sorted(root.glob("step-*"))[: -self.config.run.keep_checkpoints]:
            if old.resolve() == best:
                continue
            gone = old.rename(root / f".{old.name}.gone")  # so that no half of it passes for a checkpoint
            shutil.rmtree(gone)
        return Checkpoint(final, step, version)

    def mark_best(self, step: int | None) -> None:
        """Let `checkpoints/best` lead to the checkpoint of `step`, which is kept from now on; where there is none, all stays as it
        is."""
        root = self.directory / "checkpoints"
        target, beside = root / f"step-{step or 0:06d}", root / f".{BEST}"
        if target.is_dir():
            beside.unlink(missing_ok=True)
            beside.symlink_to(target.name)
            beside.replace(root / BEST)

    def restart(self, checkpoint: Checkpoint | None) -> None:
        self.stop()
        self.start(checkpoint)

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Every rank's answer; the first death ends the wait, since the others would wait for the dead one for ever. A rank that
        raises may do so because another died, of which Ray tells later: that is waited for a while."""
        refs = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done[0])
            except RayActorError as error:
                raise LearnerLost(f"a learner rank died in {method}: {_first_line(error)}") from error
            except RayTaskError as error:
                if death := _death_among(self.ranks):
                    raise LearnerLost(f"a learner rank died in {method}: {_first_line(death)}") from error
                raise
        return ray.get(refs)


def _death_among(ranks: list[Any]) -> RayActorError | None:
    """Of a rank that is dead, or is found to be within DEATH_S; a rank that is at work answers no sooner than it is done."""
    waiting, deadline = [rank.pid.remote() for rank in ranks], time.monotonic() + DEATH_S
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        for ref in done:
            try:
                ray.get(ref)
            except RayActorError as error:
                return error
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _wait_for(group: PlacementGroup, need: dict[str, float], ranks: int) -> None:
    started = time.monotonic()
    while not group.wait(timeout_seconds=15):
        waited = time.monotonic() - started
        if waited > PLACEMENT_DEADLINE_S:
            raise TimeoutError(
                f"learner.ranks: no room for {ranks} ranks of {need} within {waited:.0f} s; add nodes or lower it"
            )
        print(f"waiting for {ranks} x {need} for the learners: {waited:.0f} s", flush=True)
