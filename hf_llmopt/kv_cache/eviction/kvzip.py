"""KVzip (Kim et al. 2025, arXiv 2505.23416): what the prompt attends to when it is repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Scored


class KVzip(Scored):
    """A slot's score is the most attention that any query pays to it while the model reads the prompt once more.

    What is needed to say the prompt again is kept, whatever will be asked about it. That costs a second pass over the
    prompt, in pieces of `replayed` tokens whose own keys are given up again.
    """

    recent = 8
    replayed = 256

    def looks(self, prompt: int) -> range:
        """None: queries of the second pass are looked at, not the prompt's own."""
        return range(0)

    def fold(self, scores: Tensor, weights: Tensor) -> None:
        """The largest."""
        torch.maximum(scores, weights.amax(dim=(1, 2)), out=scores)
