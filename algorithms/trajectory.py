"""From the calls of an attempt to trajectories (a tree by token prefix) and their paths.

A call hangs under the call whose tokens (prompt + response) its prompt extends, the longest such; else it starts a branch.
So a conversation that is only appended to is one path, however many calls it took, and each sampled token stands in the
tree once. What a framework re-tokenised, edited or left out starts a branch, which is counted and never patched up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Node:
    """One call in the tree. `tokens` are prompt and response; they begin with the parent's."""

    call: dict[str, Any]
    tokens: np.ndarray  # int32
    prompt_length: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass
class Trajectory:
    """The calls that one agent made in one attempt."""

    rollout_id: str
    agent: str
    nodes: list[Node]

    @property
    def branches(self) -> int:
        """How many paths there are beyond the first: how often a call did not go on where the last one had ended."""
        return len(self.leaves()) - 1

    @property
    def trainable(self) -> list[Node]:
        """Those whose tokens may be trained, in the order of the calls."""
        return [node for node in self.nodes if node.call["trainable"]]

    def leaves(self) -> list[Node]:
        return [node for node in self.nodes if not node.children]


def build(calls: list[dict[str, Any]]) -> list[Trajectory]:
    """The trajectories of one attempt, one an agent, in order of first call. `calls` are rows of the calls table.

    The order is the store's (`sequence`): a call is recorded before its reply is handed on, so it stands before every
    call that could extend it, whatever the clocks of the engines say. A call of which nothing was sampled (refused,
    aborted at once) is no part of a trajectory.
    """
    by_agent: dict[str, list[Node]] = {}
    for call in sorted(calls, key=lambda call: call["sequence"]):
        if not len(call["response_token_ids"]):
            continue
        prompt = np.asarray(call["prompt_token_ids"], np.int32)
        response = np.asarray(call["response_token_ids"], np.int32)
        nodes = by_agent.setdefault(call["agent"], [])
        node = Node(call, np.concatenate([prompt, response]), len(prompt), _extended(nodes, prompt))
        if node.parent:
            node.parent.children.append(node)
        nodes.append(node)
    return [Trajectory(nodes[0].call["rollout_id"], agent, nodes) for agent, nodes in by_agent.items()]


def _extended(nodes: list[Node], prompt: np.ndarray) -> Node | None:
    """The longest of `nodes` whose tokens `prompt` begins with, of equal ones the first."""
    longest: Node | None = None
    for node in reversed(nodes):  # mostly it is the last, and the others are shorter
        size = len(node.tokens)
        if size > len(prompt) or (longest and size < len(longest.tokens)) or prompt[size - 1] != node.tokens[-1]:
            continue
        if np.array_equal(prompt[:size], node.tokens):
            longest = node
    return longest


def paths(trajectory: Trajectory) -> list[list[tuple[Node, bool]]]:
    """From root to each leaf; the flag is True where this path is the one that trains the node's sampled tokens.

    A node that lies on several paths is trained in the first of them alone.
    """
    seen: set[int] = set()
    found = []
    for leaf in trajectory.leaves():
        path: list[Node] = []
        node: Node | None = leaf
        while node is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        found.append([(node, id(node) not in seen) for node in path])
        seen.update(id(node) for node in path)
    return found
