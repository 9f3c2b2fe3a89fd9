"""The figures of one run, for people and for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_llmopt.bench import Run


def figures(run: Run) -> dict[str, Any]:
    """All figures of a run, ready for JSON; what only llmopt knows stands under `"stats"`."""
    return {
        "served_by": run.served_by,
        "prompt_tokens": run.prompt_length,
        "generated_tokens": run.new_tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "time_to_first_token": run.time_to_first_token,
        "stats": run.stats.to_dict() if run.stats is not None else None,
    }


def line(run: Run) -> str:
    """The figures of a run on one line."""
    if run.stats is not None and run.stats.served_by == "llmopt":
        return str(run.stats)
    why = f": {run.stats.reason}" if run.stats is not None else ""
    return (
        f"served by transformers{why}; {run.new_tokens} tokens in {run.seconds:.3f} s "
        f"({run.tokens_per_second:.1f} tokens/s), first after {run.time_to_first_token * 1e3:.1f} ms"
    )
