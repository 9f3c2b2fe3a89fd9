"""H2O (Zhang et al. 2023, arXiv 2306.14048): what all of the prompt attends to."""

from __future__ import annotations

from torch import Tensor

from .contract import FIRST, Scored


class H2O(Scored):
    """A slot's score is the attention that all queries of the prompt pay to it; half of what is kept is the last part.

    The paper goes on adding and evicting with each new token. Here the prompt loses its tokens once, at its end.
    """

    recent = 16  # at least

    def looks(self, prompt: int) -> range:
        """All."""
        return range(prompt)

    def fold(self, scores: Tensor, weights: Tensor) -> None:
        """Add them up."""
        scores += weights.sum(dim=(1, 2))

    def ranked(self, scores: Tensor, kept: int) -> Tensor:
        """Every token's last half of what is kept is recent."""
        scores = super().ranked(scores, kept)
        scores[:, -((kept - FIRST) // 2) :] = float("inf")
        return scores
