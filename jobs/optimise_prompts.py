"""What changes prompts: the driver of a run that changes no weights (`raygent train` where algorithm.name is apo, gepa or
bootstrap_fewshot), and the prompts' turn in one that trains weights too (algorithm.prompts).

Candidates are tried by rollouts of mode "score" on training tasks, and the optimiser's model is asked by rollouts of mode "ask":
both go through the store, the workers and the gateway as all others do. Their ids tell step, task and prompts, so given again
the same command does the same steps again with the rollouts that the store has, and goes on behind them.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from raygent.algorithms.prompt_search import Candidate, Prompts, Search, Tree, Trial, split
from raygent.callables import read_verdict
from raygent.cluster.digests import digest
from raygent.cluster.metrics import RunLog
from raygent.cluster.prompt_table import note_begun, read_prompts, steps_done, write_prompts
from raygent.cluster.transcripts import conversations, end_of, tokenizer_of
from raygent.config import Algorithm, Config, PromptTurns
from raygent.data_files import load_tasks
from raygent.jobs.evaluate import evaluate
from raygent.records import Rollout, Task, only

if TYPE_CHECKING:
    from raygent.cluster.parts import Parts

Row = dict[str, Any]
UNREAD = {"prompt_token_ids", "logprobs", "policy_versions", "input", "private"}  # large, and nothing here reads them


def optimise_prompts(config: Config) -> None:
    from raygent.cluster.parts import Parts

    settings, seed = config.algorithm, config.run.seed
    tasks = load_tasks(config.data.train, "data.train")
    feedback, selection = split(tasks, settings.selection_tasks, seed)
    held_out = load_tasks(config.data.eval, "data.eval")
    log = RunLog(config)
    done = steps_done(config.run_directory)
    log.resume(done)
    with Parts(config, learn=False) as parts:
        note_begun(config, tasks)
        trials = Trials(parts, settings.group_size)

        def told(search: Search) -> None:
            if search.step >= done:  # else a step of before, done again
                write_prompts(config.run_directory, search.tree.rows(search.best))
                log.step(search.step, progress(search) | parts.taken_seconds())

        tree = Tree(config.first_prompts())
        number = len(tree)
        search = Search(
            tree, trials.run, trials.ask, told, config.run.steps, settings.max_rollouts, settings.group_size
        )
        parts.step, parts.prompts = 0, search.tree.prompts(search.tree.first)
        if held_out:
            log.evaluation(0, *evaluate(parts, held_out))
        best = searched(search, feedback, selection, settings, seed)
        parts.step, parts.prompts = search.step, search.tree.prompts(best)
        if held_out and search.step:
            log.evaluation(search.step, *evaluate(parts, held_out))
        counts = parts.counts()
    if search.step and len(tree) == number:
        log.note(
            f"NO PROMPT WAS MADE: {settings.name} found nothing to make one of; bootstrap_fewshot shows what agents return, so "
            "set grader.run where an agent returns its reward, and let the others' optimiser say the new prompt"
        )
    log.prompts(search.tree.rows(best))
    log.finish(counts)
    for name, text in search.tree.texts(best).items():
        log.note(f"prompt {name}, version {best[name]}, in {config.run_directory / 'prompts'}:\n{text}")


def take_turn(parts: Parts, tasks: list[Task], log: RunLog) -> dict[str, float]:
    """Where it is the prompts' turn before the step to come: find better ones for the weights of now, which are in force from then
    on. Returns what the step's metrics tell of it, as `prompts/...`.

    A run that is gone on with has its last turn once more, from the checkpoint before it: with the same rollouts and replies it
    finds the same.
    """
    config, settings, step = parts.config, parts.config.algorithm.prompts, parts.step
    if not settings or step % settings.every:
        return {}
    if step:
        parts.checkpoint()
    feedback, selection = split(tasks, settings.selection_tasks, config.run.seed)
    rows = read_prompts(config.run_directory)
    tree = Tree({name: prompt["text"] for name, prompt in parts.prompts.items()}, rows)
    trials = Trials(parts, settings.group_size, turn=step)

    def told(search: Search) -> None:
        log.note(
            f"prompts before step {step + 1}: {settings.name} {search.step + 1}/{settings.steps}, {len(tree)} versions, the "
            f"best scores {search.best_score:.3f}"
        )

    search = Search(tree, trials.run, trials.ask, told, settings.steps, settings.max_rollouts, settings.group_size)
    best = searched(search, feedback, selection, settings, config.run.seed + step)
    parts.prompts = tree.prompts(best)
    known = {(row["name"], row["version"]) for row in rows}
    new = {"step": step}  # of the run; the search counts its own
    table = [row if (row["name"], row["version"]) in known else row | new for row in tree.rows(best)]
    write_prompts(config.run_directory, table)
    log.prompts(table)
    told_of = {"score": search.best_score, "versions": len(tree)} | counts(search)
    return {f"prompts/{name}": value for name, value in told_of.items()}


def searched(
    search: Search, feedback: list[Task], selection: list[Task], settings: Algorithm | PromptTurns, seed: int
) -> Candidate:
    """What the algorithm of that name finds."""
    module = importlib.import_module(f"raygent.algorithms.{settings.name}")
    return module.optimise(search, feedback, selection, settings, seed)


def progress(search: Search) -> dict[str, float]:
    """A row of metrics.jsonl. `reward`: the best score on the selection tasks until now."""
    return {"reward": search.best_score, "prompt_versions": len(search.tree)} | counts(search)


def counts(search: Search) -> dict[str, float]:
    return {"rollouts": search.rollouts, "asked": search.asked, "unanswered": search.unanswered}


class Trials:
    """Rollouts of the run `parts` for a Search, whose steps are the run's but where it is a turn."""

    def __init__(self, parts: Parts, samples: int, turn: int | None = None) -> None:
        """samples: rollouts of each trial. turn: the run's step, where it trains weights too: its rollouts are of that."""
        self.parts, self.config, self.samples, self.turn = parts, parts.config, samples, turn
        self.tokenizer = tokenizer_of(parts.config)

    def run(self, step: int, pairs: list[tuple[Prompts, Task]]) -> list[Trial]:
        """One trial a pair, of so many `samples` each; those of one pair that stands there twice are the same."""
        groups, rollouts = [], {}
        for prompts, task in pairs:
            of_prompts = digest({name: prompt["text"] for name, prompt in prompts.items()}, self.parts.depends_on)
            groups.append(f"score-{self._place(step)}-{of_prompts}-{digest(task.id, task.input, task.private)}")
            for index in range(self.samples):
                name, version = f"{groups[-1]}-{index}", self.parts.version
                rollouts[name] = Rollout(
                    name,
                    task.id,
                    groups[-1],
                    "score",
                    self._step(step),
                    index,
                    task.input,
                    task.private,
                    version,
                    prompts,
                )
        tables = self._collect("score", rollouts)
        by_group: dict[str, list[Row]] = defaultdict(list)
        for row in tables["rollouts"]:
            by_group[row["group_id"]].append(row)
        if lost := sum(row["reward"] is None for row in tables["rollouts"]):
            raise RuntimeError(
                f"infrastructure lost {lost} of {len(rollouts)} trials, and candidates are compared by all; the same command "
                "tries these again"
            )
        of = {table: by_rollout(tables[table]) for table in ("attempts", "calls", "rewards", "spans")}
        return [self._trial(task, by_group[group], of) for (_, task), group in zip(pairs, groups, strict=True)]

    def ask(self, step: int, texts: list[str]) -> list[str]:
        """What the agent "optimiser" has for a model says to each text; "" where it said nothing."""
        rollouts = []
        for place, text in enumerate(texts):
            again = texts[:place].count(text)  # asked twice, it may say two things
            name = f"ask-{self._place(step)}-{digest(text)}-{again}"
            rollouts.append(Rollout(name, "ask", name, "ask", self._step(step), 0, text, None, self.parts.version))
        tables = self._collect("ask", {rollout.rollout_id: rollout for rollout in rollouts})
        lost = [row["rollout_id"] for row in tables["rollouts"] if row["status"] == "lost"]
        if lost:
            raise RuntimeError(
                f"the optimiser's model gave no reply to {len(lost)} of {len(texts)} requests; the same command asks again"
            )
        said = {row["rollout_id"]: as_text(value_of([row])) for row in tables["spans"] if row["name"] == "output"}
        return [said.get(rollout.rollout_id) or "" for rollout in rollouts]

    def _step(self, step: int) -> int:
        """Of the run, at step `step` of the search."""
        return step if self.turn is None else self.turn

    def _place(self, step: int) -> str:
        return f"{step:06d}" if self.turn is None else f"{self.turn:06d}-{step:03d}"

    def _collect(self, mode: str, rollouts: dict[str, Rollout]) -> dict[str, list[Row]]:
        (step,) = {rollout.step for rollout in rollouts.values()}
        self.parts.queue(list(rollouts.values()))
        with self.parts.clock(mode):
            tables = only(self.parts.collect(step, mode, spans=True), set(rollouts))
        told = {name: table.drop_columns(list(UNREAD & set(table.column_names))) for name, table in tables.items()}
        return {name: table.to_pylist() for name, table in told.items()}

    def _trial(self, task: Task, rows: list[Row], of: dict[str, dict[str, list[Row]]]) -> Trial:
        scores = [row["reward"] for row in rows]
        worst, best = (rows[scores.index(end)]["rollout_id"] for end in (min(scores), max(scores)))
        records = {table: rows_of[worst] for table, rows_of in of.items()}
        given = given_by(value_of(of["spans"][best]), graded=self.config.grader.run is not None)
        return Trial(task, sum(scores) / len(scores), self._transcript(min(scores), records), given)

    def _transcript(self, reward: float, records: dict[str, list[Row]]) -> str:
        """The conversation of each agent, what came of it, and the reward. What `private` holds is not in it."""
        lines = conversations(records["calls"], self.tokenizer)
        lines.append(f"[output] {as_text(value_of(records['spans']))}")
        for attempt in records["attempts"]:
            if attempt["outcome"] == "grader_error":
                lines.append("[error] the grader failed")  # what it says may tell what the agent is not to know
            elif attempt["error"]:
                lines.append(f"[error] {attempt['error']}")
        parts = {
            name: value for row in records["rewards"] for name, value in json.loads(row["components"] or "{}").items()
        }
        lines.append(f"[reward] {reward:g}" + "".join(f", {name} {value:g}" for name, value in parts.items()))
        return end_of("\n".join(lines))


def by_rollout(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["rollout_id"]].append(row)
    return found


def value_of(spans: list[Row]) -> Any:
    """What the agent returned; None where it returned nothing."""
    values = [json.loads(span["attributes"]).get("value") for span in spans if span["name"] == "output"]
    return values[-1] if values else None


def given_by(value: Any, graded: bool) -> str:
    """What there is to show of what an agent returned: nothing, where no grader judges and so it is the reward."""
    return "" if not graded and read_verdict(value, "the agent") else as_text(value)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
