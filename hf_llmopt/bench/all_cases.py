"""Calls of `generate` in every way, against stock: each part that such a call can have, and the presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import LLMOptConfig
from hf_llmopt.generation import handle_of

from .all_plan import Case, Source
from .equality import compare, least
from .measure import Run, cache_bytes, generate, interleave, paired_ratio, summary
from .requests import left_padded

STOCK, AUTOMATIC = "stock", "True"
WAYS: dict[str, Any] = {
    STOCK: False,
    AUTOMATIC: True,
    "latency": "latency",
    "memory": "memory",
    "kv_cache": "kv_cache",
    "speculative": "speculative",
}
"""What `generate` is told. The preset for throughput differs from `True` only in what a pipeline does."""


def measure(
    model: PreTrainedModel, case: Case, source: Source, repeats: int, on_run: Callable[[str], None]
) -> dict[str, Any]:
    """One case in all ways, interleaved; the tokens of every round compared with stock's.

    Args:
        model: The model.
        case: What is generated.
        source: Of prompts.
        repeats: Timed rounds.
        on_run: Called after each call with the way's name.
    """
    given = list(_prompts(model, case, source, repeats + 1))
    held = {name: _held(model, given[0], case, way) for name, way in WAYS.items()}
    calls = {name: _Way(model, iter(given), case, way) for name, way in WAYS.items()}
    for name, call in calls.items():  # sets everything up
        call()
        on_run(name)
    runs = interleave(calls, repeats, on_run)
    handle_of(model).release()
    exact = {name: (LLMOptConfig.parse(way) or LLMOptConfig()).exact for name, way in WAYS.items()}
    equality = {
        name: least(
            compare(model, inputs, stock.output, run.output)
            for inputs, stock, run in zip(given[1:], runs[STOCK], found, strict=True)
        )
        for name, found in runs.items()
        if exact[name]
    }
    reasons = [f"{name} gave other tokens than stock" for name, outcome in equality.items() if not outcome.same]
    reasons += _objections(case, runs)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    ratios = {name: paired_ratio(seconds[STOCK], found) for name, found in seconds.items() if name != STOCK}
    return {
        "name": case.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": case.rows,
        "prompt": list(case.prompt),
        "new_tokens": case.new_tokens,
        "sampled": case.sampled,
        "ways": {
            name: {"exact": exact[name], "kv_bytes": held[name], **_figures(found)} for name, found in runs.items()
        },
        "equality": {name: outcome.to_dict() for name, outcome in equality.items()},
        "passed": not reasons,
        "reasons": reasons,
        # Nothing is said about speed unless the tokens are the same.
        "ratios": {}
        if reasons
        else {name: {**asdict(ratio), "not_slower": ratio.not_slower} for name, ratio in ratios.items()},
    }


class _Way:
    """Calls `generate` in one way, each time with the next prompts."""

    def __init__(self, model: PreTrainedModel, given: Iterator[Mapping[str, Tensor]], case: Case, way: Any) -> None:
        self._model, self._given, self._case, self._way = model, enumerate(given), case, way

    def __call__(self) -> Run:
        number, inputs = next(self._given)
        torch.manual_seed(number)
        if self._way is False:
            return generate(self._model, inputs, **_arguments(self._case))
        # Without a streamer, as most calls are: rows that speculate then go their own ways.
        began = perf_counter()
        output = self._model.generate(**inputs, llmopt=self._way, **_arguments(self._case))  # type: ignore[operator]
        seconds = perf_counter() - began
        stats, steps = handle_of(self._model).stats, self._case.new_tokens - 1
        assert stats is not None
        first = stats.time_to_first_token
        mean = 1e3 * (seconds - first) / steps if steps else 0.0
        return Run(output.cpu(), inputs["input_ids"].shape[1], seconds, first, mean, stats)


def _arguments(case: Case) -> dict[str, Any]:
    how = {"do_sample": True, "temperature": 1.0, "top_k": 50} if case.sampled else {"do_sample": False}
    return {"max_new_tokens": case.new_tokens, "eos_token_id": None, "pad_token_id": 0, **how}


def _prompts(model: PreTrainedModel, case: Case, source: Source, rounds: int) -> Iterator[dict[str, Tensor]]:
    take = source.tokens(model, 3, case.rows, *case.prompt, case.new_tokens)
    low, high = case.prompt
    lengths = [low + (high - low) * row // max(1, case.rows - 1) for row in range(case.rows)]
    first = None
    for _ in range(rounds):
        if first is None or not case.again:
            padded = left_padded([take(length) for length in lengths])
            first = {name: tensor.to(model.device) for name, tensor in padded.items()}
        yield first


def _held(model: PreTrainedModel, inputs: Mapping[str, Tensor], case: Case, way: Any) -> int:
    """Bytes of the keys and values that the call holds at its end."""
    call = partial(cast(Any, model.generate), **inputs, **_arguments(case), llmopt=way)
    if way is False:
        return cache_bytes(call(return_dict_in_generate=True).past_key_values)
    call()
    stats = handle_of(model).stats
    return stats.page_bytes if stats is not None else 0


def _objections(case: Case, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Why the times must not be compared."""
    reasons = []
    for name, found in runs.items():
        if any(run.output.shape[1] - run.prompt_length != case.new_tokens for run in found):
            reasons.append(f"{name}: not {case.new_tokens} new tokens")
        stats = [run.stats for run in found if run.stats is not None]
        reasons += sorted({f"{name}: transformers served: {s.reason}" for s in stats if s.served_by != "llmopt"})
    return reasons


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    stats = [run.stats for run in runs if run.stats is not None]
    return {
        "seconds": summary(run.seconds for run in runs),
        "tokens_per_second": summary(run.tokens_per_second for run in runs),
        "time_to_first_token": summary(run.time_to_first_token for run in runs),
        "drafted_tokens": sum(each.drafted_tokens for each in stats),
        "accepted_tokens": sum(each.accepted_tokens for each in stats),
        "cached_tokens": sum(each.cached_tokens for each in stats),
        "attention": list(stats[-1].attention) if stats else None,
    }
