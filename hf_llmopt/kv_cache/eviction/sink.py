"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first tokens and the last ones."""

from __future__ import annotations

from ...config import KVCacheConfig
from .contract import FIRST, Eviction


class Sink(Eviction):
    """Keep the first page or pages, and the most recent ones: memory does not grow, however long a text becomes.

    Whole pages are dropped from the middle of the block table, so that nothing is copied.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        super().__init__(config)
        self.tokens = config.keep_tokens or 1024  # at most, between passes
        self.chunk = max(256, self.tokens)

    def room(self, prompt: int, total: int, span: int) -> int:
        """The tokens that are kept, and those of a pass."""
        return min(total, self.tokens + min(span, prompt, max(256, self.tokens)))

    def excess(self, slots: int) -> tuple[int, int]:
        """Pages behind the first ones."""
        size = self.config.page_size
        return -(-FIRST // size), -(-max(0, slots - self.tokens) // size)
