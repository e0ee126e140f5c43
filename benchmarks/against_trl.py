"""Does GRPO here learn as TRL's GRPOTrainer does? The same model, tasks, seeds and hyperparameters.

    uv run --with trl==1.16.0 --with scipy python benchmarks/against_trl.py [--seeds N] [--steps N]

The task is the one-turn string of known_optimum/agent.py, on a model of 0.1M random weights; a step is 16 tasks x 8 rollouts.
Tells the mean training reward of each tenth of the run, over the seeds, side by side, and the difference of the mean over the
whole run, and over its last tenth, with 95 % intervals (Welch's t). The curves agree where both intervals lie within MARGIN: an
interval that holds 0 and is wider shows too few seeds, not agreement. Puts the figures into benchmarks/results/against_trl.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import known_optimum
import numpy as np
from scipy.stats import ttest_ind
from whole_runs import RESULTS, ROOT, save

RUNS = ROOT / "runs" / "against_trl"
sys.path.insert(0, str(known_optimum.HERE))

from agent import LENGTH, asked, share  # noqa: E402

TASKS, GROUP, RATE, BETAS, CLIP = 16, 8, 1e-3, (0.9, 0.95), 0.2
MARGIN = 0.1  # of a mean reward, whose optimum is 1


def ours(seed: int, steps: int) -> list[float]:
    overrides = [
        f"run.steps={steps}", f"algorithm.tasks_per_step={TASKS}", f"algorithm.group_size={GROUP}",
        f"algorithm.clip_low={CLIP}", f"algorithm.clip_high={CLIP}", "algorithm.drop_flat_groups=false",
        "algorithm.entropy=0.0", f"learner.learning_rate={RATE}", f"learner.betas=[{BETAS[0]}, {BETAS[1]}]", "learner.clip_gradient=1.0",
        "evaluate.samples=1",
    ]  # fmt: skip
    return known_optimum.run("grpo", seed, overrides, runs=RUNS)["rewards"]


def theirs(seed: int, steps: int) -> list[float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
        return [share(completion[0]["content"], "lower") for completion in completions]

    prompts = [{"prompt": [asked(word, "lower")]} for word in range(TASKS)]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, seed=seed, max_steps=steps, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
            per_device_train_batch_size=TASKS * GROUP, num_generations=GROUP, max_completion_length=LENGTH,
            learning_rate=RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0,
            max_grad_norm=1.0, beta=0.0, epsilon=CLIP, loss_type="grpo", scale_rewards="group", temperature=1.0,
            gradient_checkpointing=False, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            str(known_optimum.HERE / "model"), reward, args=settings, train_dataset=Dataset.from_list(prompts)
        )
        trainer.train()
        return [row["reward"] for row in trainer.state.log_history if "reward" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    known_optimum.prepare(known_optimum.HERE, ("string",))
    curves = {"raygent": [], "trl": []}
    for seed in range(given.seeds):
        curves["trl"].append(theirs(seed, given.steps))
        curves["raygent"].append(ours(seed, given.steps))
    means = {name: np.array(found).mean(0) for name, found in curves.items()}
    for part in np.array_split(np.arange(given.steps), 10):
        print(
            f"steps {part[0] + 1:3}-{part[-1] + 1:3}  "
            + "  ".join(f"{name} {mean[part].mean():.3f}" for name, mean in means.items())
        )
    told = {"steps": given.steps, "margin": MARGIN}
    for name, first in (("run", 0), ("last tenth", given.steps - max(given.steps // 10, 1))):
        difference, low, high = compared(*(np.array(curves[one])[:, first:].mean(1) for one in ("raygent", "trl")))
        agree = "agree" if low > -MARGIN and high < MARGIN else "not shown to agree"
        print(
            f"raygent - trl, mean reward over the {name}: {difference:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]: {agree}"
        )
        told[name] = {"difference": difference, "interval95": [low, high]}
    curves = {name: [[round(value, 4) for value in curve] for curve in found] for name, found in curves.items()}
    save(RESULTS / "against_trl.json", told | curves)


def compared(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """The difference of the means of the seeds' values, and its 95 % interval."""
    low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return float(ours.mean() - theirs.mean()), float(low), float(high)


if __name__ == "__main__":
    main()
