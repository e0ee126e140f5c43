"""pass@k: how likely at least one of k tries at a task succeeds. Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1."""

from __future__ import annotations

from math import comb

from raygent.algorithms.intervals import mean_interval


def pass_at_k(tries: int, successes: int, k: int) -> float:
    """The unbiased estimate 1 - C(tries - successes, k) / C(tries, k), for k <= tries."""
    return 1 - comb(tries - successes, k) / comb(tries, k)


def passes(by_task: dict[str, list[bool]]) -> dict[str, float]:
    """`pass@k` over the tasks, each with its tries, for k = 1, 2, 4 ... up to the fewest tries of a task; with the 95 % bootstrap
    interval over tasks as `pass@k/low` and `pass@k/high`."""
    found: dict[str, float] = {}
    most, k = min(map(len, by_task.values()), default=0), 1
    while k <= most:
        of_tasks = [pass_at_k(len(tries), sum(tries), k) for tries in by_task.values()]
        low, high = mean_interval(of_tasks)
        found |= {f"pass@{k}": sum(of_tasks) / len(of_tasks), f"pass@{k}/low": low, f"pass@{k}/high": high}
        k *= 2
    return found
