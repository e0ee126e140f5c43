"""Signs that a policy is collapsing rather than learning, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SPAN = 5  # steps that a mean is of: the first ones against the last
Row = dict[str, Any]

# What is watched: of the first steps' mean and the last ones', whether it is a sign, and of what.
SIGNS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "entropy": (
        lambda first, last: last < 0.1 * first,
        "the policy has almost stopped to vary, so that groups tell nothing more; raise algorithm.entropy or "
        "algorithm.kl, or lower learner.learning_rate",
    ),
    "response_length": (
        lambda first, last: last > 3 * first or last < first / 3,
        "replies have become much longer or shorter; look whether the reward asks for that, see algorithm.overlong_tokens",
    ),
    "repetition": (
        lambda first, last: last > max(0.3, 2 * first),
        "replies repeat themselves; look at the best rollouts of the last evaluation, raise algorithm.kl",
    ),
    "branch_rate": (
        lambda first, last: last > max(0.3, 2 * first),
        "calls no longer extend the ones before, so tokens are trained out of their context; see engine.continuation",
    ),
}
SKIPPED = "updates_skipped"
ALARMS = (SKIPPED, *SIGNS)


def signs(rows: list[Row]) -> dict[str, str]:
    """By name what the last SPAN rows show against the first, once there are twice as many; and whether the last step's
    updates were left out."""
    found = {}
    if skipped := sum(rows[-1].get(name, 0.0) for name in (SKIPPED, f"critic/{SKIPPED}")) if rows else 0.0:
        found[SKIPPED] = (
            f"{skipped:.0f} updates of this step were left out, since their gradients were not finite; "
            'look at the rewards and losses, lower learner.learning_rate, or use learner.dtype = "float32"'
        )
    if len(rows) < 2 * SPAN:
        return found
    for name, (is_sign, words) in SIGNS.items():
        first, last = (_mean(name, part) for part in (rows[:SPAN], rows[-SPAN:]))
        if first is not None and last is not None and is_sign(first, last):
            found[name] = f"{name} was {first:.3g} and is {last:.3g}: {words}"
    return found


def _mean(name: str, rows: list[Row]) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None
