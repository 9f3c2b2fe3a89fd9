"""Expected attention (Devoto et al. 2025, arXiv 2510.00636): what queries like those of the prompt will attend to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .contract import FIRST, Scored


class ExpectedAttention(Scored):
    """A slot's score is the attention that a query drawn from a normal distribution pays to it, times its value's norm.

    For `q ~ N(mu, S)`, already scaled, `E[exp(q k)] = exp(mu k + k S k / 2)`. No query that comes is guessed: mean and
    covariance are those of the last queries of the prompt, as they are, with their rotary positions. The paper takes
    all queries, before their rotation, and turns mean and covariance by the mean rotation of the next 512 positions; an
    attention function is not told how queries turn, and the last ones have been turned by nearly the same.
    """

    recent = 32
    weighs = False
    queries = 512  # whose moments are taken

    def looks(self, prompt: int) -> range:
        """The last ones."""
        return range(max(0, prompt - self.queries), prompt)

    def fold(self, scores: Tensor, seen: Tensor) -> None:
        """Add up the products of queries, a 1 behind each: sums of products, sums, and how many."""
        seen = torch.nn.functional.pad(seen, (0, 1), value=1.0)
        scores += seen.transpose(1, 2) @ seen

    def score(self, seen: Tensor, read: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """By the formula, head by head; first slots, which are kept, take no part in its softmax."""
        keys, values = (part.float().transpose(0, 1) for part in read())  # [kv_heads, slots, width]
        scores = torch.zeros(keys.shape[:2], device=keys.device)
        share = len(seen) // len(keys)
        for head, moments in enumerate(seen / seen[:, -1:, -1:]):
            mean, own = moments[-1, :-1], keys[head // share]
            covariance = moments[:-1, :-1] - mean.outer(mean)
            expected = own @ mean + ((own @ covariance) * own).sum(1) / 2
            expected[:FIRST] = float("-inf")
            scores[head // share] += expected.softmax(0)
        return scores * values.norm(dim=2)
