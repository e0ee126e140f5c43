"""What a run tells: a plain line a step, metrics.jsonl, W&B, and at the end summary.json and curve.png."""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from raygent.actors.segments import write_atomically
from raygent.algorithms.curriculum import Groups
from raygent.algorithms.intervals import paired_gain
from raygent.cluster.alarms import ALARMS, SPAN, signs
from raygent.cluster.digests import digest, judge_digest
from raygent.cluster.task_choice import expected_by_task
from raygent.cluster.transcripts import conversations, end_of, tokenizer_of
from raygent.config import Config
from raygent.records import PROMPTS, Task, only

SHOWN = {
    "reward": "reward {:.3f}",
    "unanswered": "{:.0f} requests unanswered",
    "prompt_versions": "{:.0f} prompts",
    "rollouts": "{:.0f} rollouts",
    "turns": "turns {:.2f}",
    "loss": "loss {:+.4f}",
    "entropy": "entropy {:.3f}",
    "mismatch_mean": "mismatch {:.1e}",
    "push_bytes": "{:,.0f} bytes pushed",
    "tokens_per_s": "{:.0f} tok/s",
    "seconds/step": "{:.1f} s",
}
MOST_LOST = 0.1  # tasks of an evaluation, over those that have a reward, that is still compared with others
TABLE_ROWS = 5  # best and worst rollouts of an evaluation that W&B shows


class RunLog:
    """The files of `run.directory/run.name` and the W&B run. A resumed run goes on in the same of each."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.run_directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lines = self.directory / "metrics.jsonl"
        self.evaluations = self.directory / "evaluations.jsonl"
        self.last = time.monotonic()
        self.ends: list[dict[str, Any]] = []  # the metrics of the first SPAN steps and of the last
        self.told: set[str] = set()  # alarms that stand
        self.judge = judge_digest(config)
        self.tokenizer: Any = None  # takes seconds to import; of the first evaluation
        self.wandb = self._start_wandb()

    def _start_wandb(self) -> Any:
        import wandb

        mode = self.config.wandb.mode
        if mode == "auto":
            mode = "online" if logged_in() else "offline"
        file = self.directory / "wandb-id"
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        return wandb.init(
            project=self.config.wandb.project,
            name=self.config.run.name,
            id=file.read_text(),
            resume="allow",
            mode=mode,
            dir=str(self.directory),
            config=self.config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False
            ),
        )

    def resume(self, step: int) -> None:
        """The run goes on at `step`: what the files tell of later steps did not happen."""
        for path, last in ((self.lines, step - 1), (self.evaluations, step)):
            rows = [row for row in read_lines(path) if row["step"] <= last]
            rewrite(path, rows)
            if path == self.lines:
                self.ends = rows[:SPAN] + rows[SPAN:][-SPAN:]
        if step:
            self.note(f"going on at step {step}")
        self.last = time.monotonic()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One driver step is done."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        metrics = metrics | {"seconds/step": seconds}
        if "tokens_sampled" in metrics:
            metrics["tokens_per_s"] = metrics["tokens_sampled"] / seconds
        with self.lines.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        shown = [form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics]
        if "groups" in metrics:
            shown.append(f"{metrics['groups_flat']:.0f} of {metrics['groups']:.0f} groups without signal")
        if failed := counts_by_kind(metrics, "failed/"):
            shown.append(f"failed: {failed}")
        self.note(f"step {step + 1}/{self.config.run.steps} {', '.join(shown)}")
        if (acted := agents_in(metrics)) and not any(map(self.config.trains, acted)):
            self.note(f"agent.train: no agent that acted is trained; it names none of {', '.join(acted)}")
        self.ends.append(metrics)
        del self.ends[SPAN:-SPAN]
        found = signs(self.ends)
        for name in found.keys() - self.told:
            self.note(f"ALARM {found[name]}")
            self.wandb.alert(title=f"raygent: {name}", text=found[name])
        self.told = set(found)
        alarms = {f"alarm/{name}": float(name in found) for name in ALARMS}
        self.wandb.log({"train/" + name: value for name, value in metrics.items()} | alarms | {"step": step + 1})

    def evaluation(self, step: int, tables: dict[str, pa.Table], summary: dict[str, float]) -> None:
        """One evaluation on the held-out tasks is done."""
        rewards: dict[str, list[float]] = {}
        digests: dict[str, str] = {}  # with another question, gold or grader it is another task
        for row in tables["rollouts"].select(["task_id", "input", "private", "reward"]).to_pylist():
            if row["reward"] is not None:
                rewards.setdefault(row["task_id"], []).append(row["reward"])
                digests[row["task_id"]] = digest(row["input"], row["private"], self.judge)
        by_task = {task: sum(values) / len(values) for task, values in rewards.items()}
        if not by_task:
            self.note(
                f"evaluation at step {step}: no reward, infrastructure lost all {summary['lost']} tasks; it is not counted"
            )
            return
        trained = [row["reward"] for row in read_lines(self.lines) if row["step"] < step and "reward" in row][-SPAN:]
        if trained and not self.config.recorded:  # how much better it does on what it was trained on
            summary = summary | {"gap": sum(trained) / len(trained) - summary["reward"]}
        rows = read_lines(self.evaluations)
        # A run that had ended there evaluated all tasks; when it goes on, the same step is due for some of them again.
        partial = step not in (0, self.config.run.steps)
        if not (partial and any(row["step"] == step and row["by_task"].keys() > by_task.keys() for row in rows)):
            rows = [row for row in rows if row["step"] != step]
            rows.append({"step": step, **summary, "by_task": by_task, "digests": digests})
            rewrite(self.evaluations, sorted(rows, key=lambda row: row["step"]))
        self.note(evaluation_line(step, summary))
        table = {f"eval/{name}": value for name, value in summary.items()} | {"step": step}
        if self.config.wandb.mode != "disabled":
            table["eval/rollouts"] = self._best_and_worst(tables)
        self.wandb.log(table)
        self.last = time.monotonic()

    def best_step(self) -> int | None:
        """See best_step() below."""
        return best_step(read_lines(self.evaluations))

    def _best_and_worst(self, tables: dict[str, pa.Table]) -> Any:
        """W&B's table of the rollouts with the highest rewards and the lowest, of those that have one, and what was said in them."""
        import wandb

        rows = [row for row in tables["rollouts"].to_pylist() if row["reward"] is not None]
        rows.sort(key=lambda row: row["reward"], reverse=True)
        chosen = rows if len(rows) <= 2 * TABLE_ROWS else rows[:TABLE_ROWS] + rows[-TABLE_ROWS:]
        names = {row["rollout_id"] for row in chosen}
        calls = defaultdict(list)
        for call in only({"calls": tables["calls"]}, names)["calls"].to_pylist():
            calls[call["rollout_id"]].append(call)
        self.tokenizer = self.tokenizer or tokenizer_of(self.config)
        columns: list[str | int] = ["rollout", "reward", "outcome", "input", "transcript"]
        said = {name: end_of("\n".join(conversations(calls[name], self.tokenizer))) for name in names}
        data = [
            [row["rollout_id"], row["reward"], row["outcome"], row["input"], said[row["rollout_id"]]] for row in chosen
        ]
        return wandb.Table(columns=columns, data=data)

    def prompts(self, rows: list[dict[str, Any]]) -> None:
        """All versions of the prompts (rows of the table `prompts`), to W&B."""
        import wandb

        data = [[str(row[name]) if name == "parents" else row[name] for name in PROMPTS.names] for row in rows]
        self.wandb.log({"prompts": wandb.Table(columns=list(PROMPTS.names), data=data)})

    def finish(self, counts: dict[str, Any]) -> None:
        """Write summary.json and curve.png and print what became better."""
        steps, evaluations = read_lines(self.lines), read_lines(self.evaluations)
        summary: dict[str, Any] = {
            "steps": steps[-1]["step"] + 1 if steps else 0,
            "seed": self.config.run.seed,
        } | counts
        summary |= {"held_out": held_out(evaluations), "mismatch": mismatch(steps)}
        summary["seconds"] = seconds_by_part(steps, counts["seconds"])
        sums = ("tokens_sampled", "tokens_trained")
        if any("tokens_sampled" in row for row in steps):  # a run that changes prompts does not count them
            summary["tokens"] = {
                name.removeprefix("tokens_"): sum(row.get(name, 0.0) for row in steps) for name in sums
            }
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.wandb.summary.update(summary)
        self.wandb.finish()
        draw_curve(steps, evaluations, self.directory / "curve.png")
        rollouts = counts["rollouts"]
        failed = counts_by_kind(rollouts, "failed_")
        self.note(
            f"rollouts: {rollouts['asked']} asked, {rollouts['succeeded']} succeeded, failed: {failed or 'none'}; "
            f"{rollouts['retried']} retried, {rollouts['lost']} lost, {rollouts['trained']} trained"
        )
        if steps and "groups" in steps[0]:
            groups, flat = (sum(row[name] for row in steps) for name in ("groups", "groups_flat"))
            self.note(f"groups: {groups:.0f}, of which {flat:.0f} without signal (all their rewards alike)")
            acted = {agent for row in steps for agent in agents_in(row)}
            if acted and not any(map(self.config.trains, acted)):
                self.note(
                    f"NOTHING WAS TRAINED: agent.train names none of the agents that acted, {', '.join(sorted(acted))}"
                )
            elif not summary["tokens"]["trained"]:
                why = (
                    "no rollout succeeded; mend what the lines above say of their failures"
                    if failed and not rollouts["succeeded"]
                    else "no group had rewards that differ, or no rollout won; take tasks that the agent wins sometimes, a "
                    "reward with steps between, or a higher engine.temperature"
                )
                self.note(f"NOTHING WAS TRAINED: {why}")
        if found := summary["held_out"]:
            low, high = found["gain_ci95"]
            since = f" (at step {found['before_step']})" if found["before_step"] else ""
            self.note(
                f"held-out reward on {found['n']} tasks: {found['before']:.3f} before{since}, {found['after']:.3f} after; "
                f"gain {found['gain']:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] (paired bootstrap)"
            )
            if found["failed"]["before"] != found["failed"]["after"]:
                told = ", ".join(f"{kinds or 'none'} {when}" for when, kinds in found["failed"].items())
                self.note(
                    f"of its rollouts failed: {told}; they count with their reward, but for the lost ones, and a machine that was busier once times out more"
                )
        elif len(evaluations) > 1:
            self.note(
                "no gain to tell: the first evaluation and the last have no task in common with the same gold and grader"
            )
        self.note(f"summary {self.directory / 'summary.json'}, curve {self.directory / 'curve.png'}")


def evaluation_line(step: int, summary: dict[str, float]) -> str:
    """What an evaluation found (see summarise() in jobs/evaluate.py), means with their 95 % intervals."""
    reward = f"reward {summary['reward']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}] on {summary['n']} tasks"
    if summary["lost"]:
        reward += f", {summary['lost']} lost to infrastructure"
    several = f"{summary['several_calls_share']:.0%} of the rollouts made more than one call"
    if summary["several_calls_share"]:
        several += f", mean reward {summary['several_calls_reward']:.3f}"
    parts = [f"evaluation at step {step}: {reward}", several]
    for name, value in summary.items():
        if name.startswith("pass@") and "/" not in name:
            parts.append(f"{name} {value:.3f} [{summary[name + '/low']:.3f}, {summary[name + '/high']:.3f}]")
    if failed := counts_by_kind(summary, "failed/"):
        parts.append(f"failed: {failed}")
    return "; ".join(parts)


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, [f"{json.dumps(row)}\n".encode() for row in rows])


def counts_by_kind(counts: dict[str, float], prefix: str) -> str:
    """As "3 timeout, 1 agent_error": those of the names that begin with `prefix`; empty where none does."""
    return ", ".join(
        f"{count:.0f} {name.removeprefix(prefix)}" for name, count in counts.items() if name.startswith(prefix)
    )


def agents_in(metrics: dict[str, Any]) -> list[str]:
    """The agents, upstreams aside, that a step's metrics tell of."""
    calls = [name for name in metrics if name.startswith("agents/") and name.endswith("/calls")]
    return [name.removeprefix("agents/").removesuffix("/calls") for name in calls]


def logged_in() -> bool:
    """Whether W&B finds credentials here; asks nobody, sends nothing."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; one that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def held_out(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """First against last evaluation, paired by task; empty where there are not two with a task in common."""
    if len(evaluations) < 2:
        return {}
    first, last = evaluations[0], evaluations[-1]
    tasks = alike(first, last)
    if not tasks:
        return {}
    before, after = ({task: row["by_task"][task] for task in tasks} for row in (first, last))
    gain, interval = paired_gain(before, after)
    return {
        "n": len(tasks),
        "before_step": first["step"],
        "after_step": last["step"],
        "before": sum(before.values()) / len(tasks),
        "after": sum(after.values()) / len(tasks),
        "gain": gain,
        "gain_ci95": list(interval),
        "failed": {when: counts_by_kind(row, "failed/") for when, row in (("before", first), ("after", last))},
        **{
            name: {"before": first.get(name), "after": last.get(name)}  # not in evaluations of an older raygent
            for name in ("several_calls_share", "several_calls_reward")
        },
    }


def alike(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The tasks that two evaluations have in common, the same in question, gold and grader as far as they are known."""
    digests, others = one.get("digests", {}), other.get("digests", {})
    return {
        task
        for task in one["by_task"].keys() & other["by_task"].keys()
        if digests.get(task) == others.get(task) or task not in digests or task not in others
    }


def best_step(evaluations: list[dict[str, Any]]) -> int | None:
    """The step whose evaluation has the best mean reward on the tasks that all of them have, the first of those; None where there
    is no such task. Those that infrastructure lost much of, and those of other tasks than the last has, are left aside."""
    evaluations = [row for row in evaluations if row.get("lost", 0) <= MOST_LOST * len(row["by_task"])]
    evaluations = [row for row in evaluations if alike(row, evaluations[-1])]
    tasks = set.intersection(*(alike(row, evaluations[-1]) for row in evaluations)) if evaluations else set()
    if not tasks:
        return None
    means = {row["step"]: sum(row["by_task"][task] for task in tasks) / len(tasks) for row in evaluations}
    return max(means, key=lambda step: means[step])


def mismatch(steps: list[dict[str, Any]]) -> dict[str, float]:
    """|engine - learner| logprob over the run: mean of the means, largest p99 and maximum of a step.

    A step that trained no token of the weights it began with has none.
    """
    rows = [row for row in steps if "mismatch_mean" in row]
    if not rows:
        return {}
    return {
        "mean": sum(row["mismatch_mean"] for row in rows) / len(rows),
        "p99": max(row["mismatch_p99"] for row in rows),
        "max": max(row["mismatch_max"] for row in rows),
    }


def seconds_by_part(steps: list[dict[str, Any]], rest: dict[str, float]) -> dict[str, float]:
    """Of the run: what its steps took, whichever process did them, and `rest`. A step that was undone does not count."""
    total = dict(rest)
    for row in steps:
        for name, value in row.items():
            if name.startswith("seconds/") and name != "seconds/step":
                part = name.removeprefix("seconds/")
                total[part] = total.get(part, 0.0) + value
    return {part: round(value, 2) for part, value in total.items()}


def choice_metrics(config: Config, tasks: list[Task], rollouts: pa.Table, measured: Groups) -> dict[str, float]:
    """Of a step's `rollouts`, where data.train is a list, the mean reward and the share of each file's; and with
    data.curriculum, which chose their tasks by the rewards `measured`, whether it chose well."""
    rows = [row for row in rollouts.select(["task_id", "group_id", "reward"]).to_pylist() if row["reward"] is not None]
    told = {}
    if isinstance(config.data.train, list):
        source = {task.id: task.source for task in tasks}
        for name in dict.fromkeys(source.values()):
            rewards = [row["reward"] for row in rows if source.get(row["task_id"]) == name]
            told[f"sources/{name}/share"] = len(rewards) / len(rows) if rows else 0.0
            if rewards:
                told[f"sources/{name}/reward"] = sum(rewards) / len(rewards)
    if config.data.curriculum:
        told |= _curriculum_metrics(tasks, rows, measured)
    return told


def _curriculum_metrics(tasks: list[Task], rows: list[dict[str, Any]], measured: Groups) -> dict[str, float]:
    """`unseen`: the share of all tasks that nothing is known of. The variance that a group's rewards were expected to have, in the
    mean of all tasks and of this step's groups, and the one that these turned out to have."""
    expected = expected_by_task(tasks, measured)
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["task_id"], row["group_id"]), []).append(row["reward"])
    chosen = [expected[task] for task, _ in groups if task in expected]
    found = [statistics.variance(rewards) for rewards in groups.values() if len(rewards) > 1]
    told = {"unseen": [float(task.id not in measured) for task in tasks], "variance_of_all": list(expected.values())}
    told |= {"variance_expected": chosen, "variance_found": found}
    return {f"curriculum/{name}": statistics.fmean(values) for name, values in told.items() if values}


def draw_curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    with reward_axes(path) as axes:
        if rewarded := [row for row in steps if "reward" in row]:
            places = [row["step"] + 1 for row in rewarded]
            axes.plot(places, [row["reward"] for row in rewarded], color="0.7", label="training")
        if evaluations:
            middle = [row["reward"] for row in evaluations]
            below = [max(row["reward"] - row["low"], 0) for row in evaluations]
            above = [max(row["high"] - row["reward"], 0) for row in evaluations]
            axes.errorbar(
                [row["step"] for row in evaluations], middle, [below, above], marker="o", capsize=3, label="held out"
            )


@contextmanager
def reward_axes(path: Path) -> Iterator[Any]:
    """Matplotlib's axes of a curve of mean rewards over steps, which is saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    yield axes
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
