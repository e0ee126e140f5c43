"""Samples dealt to ranks and cut into padded micro-batches, the same number of them on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raygent.records import Sample


@dataclass
class MicroBatch:
    """Padded on the right. All tensors [B, T] but `lengths`; `places` are the rows' indices in the batch, -1 for a filler.

    There is no attention mask: attention is causal, so no token sees the padding behind it.
    """

    token_ids: torch.Tensor  # int64
    mask: torch.Tensor  # bool
    logprobs: torch.Tensor  # float32, the engine's
    advantages: torch.Tensor  # float32
    weights: torch.Tensor  # float32, of each masked token
    versions: torch.Tensor  # int32, the policy version that sampled each masked token
    temperature: torch.Tensor  # float32
    places: list[int]
    lengths: torch.Tensor  # int64 [B], tokens of each row without its padding
    values: torch.Tensor | None = None  # float32, with a critic
    returns: torch.Tensor | None = None  # float32, with a critic
    reference: torch.Tensor | None = None  # float32, with a KL in the loss

    @property
    def real(self) -> torch.Tensor:
        """Where there is a token and no padding: bool [B, T]."""
        return torch.arange(self.token_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> MicroBatch:
        if device.type != "cpu":
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.to(device))
        return self


Share = list[tuple[int, Sample]]  # each with its place in the batch


def deal(samples: Share, ranks: int) -> list[Share]:
    """Longest first, in turn and back again, so that ranks have about the same work; deterministic."""
    shares: list[Share] = [[] for _ in range(ranks)]
    for turn, entry in enumerate(sorted(samples, key=lambda entry: (-len(entry[1]), entry[0]))):
        row, column = divmod(turn, ranks)
        shares[column if row % 2 == 0 else ranks - 1 - column].append(entry)
    return shares


def micro_batches(shares: list[Share], rank: int, tokens: int, packed: bool = False) -> list[MicroBatch]:
    """The micro-batches of `rank`: at most `tokens` tokens each (one sample always fits), padding among them unless `packed`.

    Every rank gets as many as the one with most, fillers of weight zero among them: ZeRO-3 gathers parameters in each
    forward pass, so a rank with fewer would leave the others waiting.
    """
    cut = [_cut(share, tokens, packed) for share in shares]
    most = max(map(len, cut))
    batches = [to_micro_batch(share) for share in cut[rank]]
    return batches + [filler() for _ in range(most - len(batches))]


def _cut(share: Share, tokens: int, packed: bool) -> list[Share]:
    """`share` is sorted, longest first."""
    pieces: list[Share] = []
    size = 0
    for entry in share:
        longest = len(pieces[-1][0][1]) if pieces and not packed else len(entry[1])
        if pieces and size + longest <= tokens:
            pieces[-1].append(entry)
            size += longest
        else:
            pieces.append([entry])
            size = len(entry[1])
    return pieces


def to_micro_batch(entries: Share) -> MicroBatch:
    longest = max(len(sample) for _, sample in entries)

    def padded(arrays: list[np.ndarray], fill: float = 0) -> torch.Tensor:
        whole = np.full((len(arrays), longest), fill, arrays[0].dtype)
        for row, array in enumerate(arrays):
            whole[row, : len(array)] = array
        return torch.from_numpy(whole)

    def optional(arrays: list[np.ndarray | None]) -> torch.Tensor | None:
        there = [array for array in arrays if array is not None]
        return padded(there) if there else None

    samples = [sample for _, sample in entries]
    return MicroBatch(
        token_ids=padded([sample.token_ids for sample in samples]).long(),
        mask=padded([sample.loss_mask for sample in samples]),
        logprobs=padded([sample.logprobs for sample in samples]),
        advantages=padded([sample.advantages for sample in samples]),
        weights=padded([sample.loss_mask * np.float32(sample.weight) for sample in samples]),
        versions=padded([sample.policy_versions for sample in samples]),
        temperature=padded([sample.temperature for sample in samples], 1),
        places=[place for place, _ in entries],
        lengths=torch.tensor([len(sample) for sample in samples]),
        values=optional([sample.values for sample in samples]),
        returns=optional([sample.returns for sample in samples]),
        reference=optional([sample.reference for sample in samples]),
    )


def filler() -> MicroBatch:
    ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    two = torch.tensor([2])
    return MicroBatch(
        zeros.long(), zeros.bool(), zeros, zeros, zeros, zeros.int(), ones, [-1], two, zeros, zeros, zeros
    )
