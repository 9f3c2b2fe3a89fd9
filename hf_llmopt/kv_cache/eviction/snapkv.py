"""SnapKV (Li et al. 2024, arXiv 2404.14469): what the end of the prompt attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Scored

POOLED = 7  # neighbouring slots that share the best of their scores: what is found is kept with what stands around it


class SnapKV(Scored):
    """A slot's score is the attention that the last queries of the prompt pay to it and to its neighbours."""

    recent = 32

    def looks(self, prompt: int) -> range:
        """The last ones."""
        return range(max(0, prompt - self.recent), prompt)

    def fold(self, scores: Tensor, weights: Tensor) -> None:
        """Add them up."""
        scores += weights.sum(dim=(1, 2))

    def ranked(self, scores: Tensor, kept: int) -> Tensor:
        """Pooled before the queries' own slots, which pay much attention to one another."""
        before = scores[:, : -self.recent]
        pooled = torch.nn.functional.max_pool1d(before, POOLED, 1, POOLED // 2)
        return super().ranked(torch.cat([pooled, scores[:, -self.recent :]], dim=1), kept)
