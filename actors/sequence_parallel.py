"""Long sequences over several ranks: DeepSpeed's Ulysses, Jacobs et al. 2023, https://arxiv.org/abs/2309.14509.

Each of a group of `learner.sequence_parallel` ranks has an equal part of every sequence; around attention they exchange parts of
the sequence for heads. So a group works on one micro-batch of one row at a time.
"""

from __future__ import annotations

import torch

from raygent.config import LearnerSection


class SequenceParallel:
    """This rank's place in its group. Made before any model is: it puts DeepSpeed's exchange around transformers' attention."""

    def __init__(self, settings: LearnerSection, model_path: str, rank: int) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self.size = settings.sequence_parallel
        self.place = rank % self.size
        groups = UlyssesSPAttentionHF.register_with_transformers(
            model_path, settings.attention, self.size, micro_batch_size=1
        )
        self.group = groups.get_sequence_parallel_group()

    def part(self, row: torch.Tensor) -> torch.Tensor:
        """Of `row`, [1, T], this rank's columns, [1, ceil(T / size)]; behind the end it is filled up with zeros."""
        columns = self._columns(row)
        whole = torch.nn.functional.pad(row, (0, columns * self.size - row.shape[1]))
        return whole[:, self.place * columns : (self.place + 1) * columns]

    def mine(self, chosen: torch.Tensor) -> torch.Tensor:
        """Which of the tokens where `chosen`, bool [1, T], holds are this rank's: bool [chosen tokens]."""
        return chosen[0].nonzero()[:, 0] // self._columns(chosen) == self.place

    def _columns(self, row: torch.Tensor) -> int:
        """Of each rank's part of `row`, [1, T]."""
        return -(-row.shape[1] // self.size)

    def whole(self, values: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """The values of all chosen tokens, of which this rank has `mine`. What flows back through it is summed over the group,
        whose ranks all have the same loss."""
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values.new_zeros(len(mine)).masked_scatter(mine, values), group=self.group)
