"""What happened: one `Stats` per `generate` call or request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Stats:
    """Figures of one `generate` call (all of its rows together).

    Attributes:
        served_by: `"llmopt"` or `"transformers"`.
        reason: Why transformers served the call, if it did.
        unfinished: Whether tokens are still to come, or never came since the call failed or was cancelled: the figures
            are those so far.
        prompt_tokens: Unmasked prompt tokens of all rows, cached ones included.
        cached_tokens: Prompt tokens whose keys and values were found instead of computed.
        evicted_tokens: Tokens whose keys and values the rows had lost to eviction in the end.
        generated_tokens: Tokens sampled for unfinished rows.
        steps: Forward passes this call took part in.
        seconds: Wall time from the call's start to its last token, or to now where that has not come.
        forward_seconds: Part of `seconds` spent inside the model's forward pass.
        time_to_first_token: Seconds from the call's start to its first sampled token.
        pages: Most pages the call held at one time, all cache groups together.
        page_bytes: Bytes of those pages.
        preemptions: How often a row gave its pages to others.
        swaps: How often its keys were saved in host memory meanwhile, instead of computed again.
        drafted_tokens: Guesses that were computed.
        accepted_tokens: Those that were right.
        undrafted: Why nothing was guessed, or nothing any more, though that was asked for, or `None`.
        attention: Names of the attention paths that ran.
        fused: Modules that C kernels stood in for, and those that were recognised and stayed eager.
        graph_steps: Steps whose pass was replayed from a CUDA graph.
        no_graphs: Why none was, or none is any longer, though `graphs=True` asked for them; else `None`.

    Example:
        >>> from hf_llmopt import Stats
        >>> Stats(generated_tokens=30, seconds=2.0).tokens_per_second
        15.0
    """

    served_by: str = "llmopt"
    reason: str | None = None
    unfinished: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evicted_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    time_to_first_token: float = 0.0
    pages: int = 0
    page_bytes: int = 0
    preemptions: int = 0
    swaps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    undrafted: str | None = None
    attention: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    graph_steps: int = 0
    no_graphs: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole call's wall time."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def overhead_ms_per_step(self) -> float:
        """Milliseconds a step spends outside the model's forward pass."""
        return 1e3 * (self.seconds - self.forward_seconds) / self.steps if self.steps else 0.0

    @property
    def usage(self) -> dict[str, Any]:
        """The token counts in the form of the field `usage` of OpenAI's API.

        Example:
            >>> from hf_llmopt import Stats
            >>> Stats(prompt_tokens=50, cached_tokens=48, generated_tokens=7).usage["prompt_tokens_details"]
            {'cached_tokens': 48}
        """
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def to_dict(self) -> dict[str, Any]:
        """All figures, the derived ones included, ready for JSON."""
        derived = {
            "tokens_per_second": self.tokens_per_second,
            "overhead_ms_per_step": self.overhead_ms_per_step,
        }
        return {**asdict(self), **derived}

    def __str__(self) -> str:
        if self.served_by != "llmopt":
            return f"served by transformers: {self.reason}"
        return (
            f"served by llmopt{', unfinished' * self.unfinished}: "
            f"{self.generated_tokens} tokens in {self.seconds:.3f} s ({self.tokens_per_second:.1f} tokens/s), "
            f"first after {self.time_to_first_token * 1e3:.1f} ms; "
            f"{self.steps} steps, {self.overhead_ms_per_step:.2f} ms each outside the model; "
            f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens reused; "
            + (f"{self.evicted_tokens} tokens evicted; " if self.evicted_tokens else "")
            + f"{self.pages} page(s) ({self.page_bytes / 2**20:.2f} MiB); attention: {', '.join(self.attention)}"
            + (f"; fused: {', '.join(self.fused)}" if self.fused else "")
            + (f"; {self.accepted_tokens} of {self.drafted_tokens} guesses right" if self.drafted_tokens else "")
            + (f"; nothing guessed: {self.undrafted}" if self.undrafted else "")
            + (f"; {self.graph_steps} steps from CUDA graphs" if self.graph_steps else "")
            + (f"; no CUDA graphs: {self.no_graphs}" if self.no_graphs else "")
        )


@dataclass
class PromptCacheStats:
    """Figures of a model's prompt cache, over all requests since its engine was made.

    Attributes:
        requests: Requests whose prompt was looked up.
        prompt_tokens: Tokens of their prompts.
        cached_tokens: Those whose keys and values were found.
        device_bytes: Bytes of pages on the model's device that can be found, held by a request or not.
        host_bytes: Bytes of pages in host memory.
        disk_bytes: Bytes of files in the folder, as of the last time they were counted.
        host_loads: Pages that came back from host memory.
        disk_loads: Pages that came back from disk.
        evictions: Pages that were given up on the device.
        invalidations: How often new weights emptied the cache.

    Example:
        >>> from hf_llmopt import PromptCacheStats
        >>> PromptCacheStats(prompt_tokens=200, cached_tokens=150).hit_rate
        0.75
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    host_loads: int = 0
    disk_loads: int = 0
    evictions: int = 0
    invalidations: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that was found."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, the hit rate included, ready for JSON."""
        return {**asdict(self), "hit_rate": self.hit_rate}
