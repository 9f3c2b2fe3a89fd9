"""Number formats of weights and pages times the parts that give the same tokens: what each combination is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import Engine, LLMOptConfig, PromptCacheConfig, SpeculativeConfig, Stats, optimize
from hf_llmopt.config import KVCacheConfig, QuantizationConfig
from hf_llmopt.generation import handle_of

from . import quality
from .all_plan import FULL, PARTS, Plan, Source, cells, name_of
from .equality import Equality, compare_answers, least
from .measure import cache_bytes, generate, interleave, paired_ratio, summary
from .quantized import dequantized, held, quantize
from .requests import Job, arguments, left_padded
from .sample import Sample, Window

ALONE, PADDED = "stock", "stock, padded batch"  # a call for each request, or one call for all
# Of trained models, most times the perplexity: by weights and by pages; together at most their product.
PERPLEXITY = {FULL: 1.0, "int8": 1.003, "int4": 1.05}
PAGES_PERPLEXITY = {FULL: 1.0, "int8": 1.003}
# Of random weights, which predict nothing: most of the error of logits, in units of their standard deviation.
LOGITS = {FULL: 0.0, "int8": 0.1, "int4": 0.7}
PAGES_LOGITS = {FULL: 0.0, "int8": 0.1}


def quantized(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """The model itself, or a copy with other weights."""
    return model if weights == FULL else quantize(model, QuantizationConfig(weights))


def config_of(pages: str, parts: Sequence[str] = (), salt: str | None = None) -> LLMOptConfig:
    """What a cell asks for; its salt keeps it from finding what others computed."""
    return LLMOptConfig(
        kv_cache=KVCacheConfig(dtype="auto" if pages == FULL else pages),
        prompt_cache=PromptCacheConfig(salt=salt) if PARTS[0] in parts else None,
        speculative=SpeculativeConfig() if PARTS[1] in parts else None,
    )


# ------------------------------------------------------------------------------------------------------------- quality


def measure_quality(
    model: PreTrainedModel, full: PreTrainedModel, weights: str, pages: str, source: Source, plan: Plan
) -> dict[str, Any]:
    """What two number formats cost: perplexity on held-out text, and how far logits are from the model's own."""
    sample = _sample(full, source, plan)
    with TemporaryDirectory() as folder:
        reference = quality.recorded(quality.logits(full, sample), sample, Path(folder))
        with _reading(model, pages):
            found = quality.divergence(quality.logits(model, sample), reference, sample)
    handle_of(model).release()
    trained = source.texts is not None
    error = found.rms / found.spread
    if trained:
        bound, value = PERPLEXITY[weights] * PAGES_PERPLEXITY[pages], found.perplexity.value
    else:
        bound, value = LOGITS[weights] + PAGES_LOGITS[pages], error
    reasons = [] if value <= bound else [f"{value:.4f}, at most {bound:.4f}"]
    return {
        "name": name_of(weights, pages, source.dtype),
        "weights": weights,
        "pages": pages,
        "weight_bytes": held(model),
        "times": asdict(found.perplexity) if trained else None,
        "kl": found.kl.value,
        "same_choice": found.top1.value,
        "logit_error": error,
        "measured": "perplexity" if trained else "logits",
        "bound": bound,
        "passed": not reasons,
        "reasons": reasons,
    }


@contextmanager
def _reading(model: PreTrainedModel, pages: str) -> Iterator[None]:
    """Plain forwards of `quality` read keys from such pages."""
    former = handle_of(model).config
    optimize(model, config_of(pages))
    try:
        yield
    finally:
        handle_of(model).config = former


def _through_pages(model: PreTrainedModel, pages: str, prefix: Tensor) -> Tensor:
    """The logits `[vocabulary]` behind a prefix `[tokens]`, with keys and values from such pages."""
    window = Window(torch.cat([prefix, prefix[-1:]]).cpu(), 1)
    with _reading(model, pages):
        return next(quality.logits(model, Sample((window,), 0)))[0]


def _sample(model: PreTrainedModel, source: Source, plan: Plan) -> Sample:
    take = source.tokens(model, 4)
    windows, left = [], plan.tokens
    for text in source.texts if source.texts is not None else iter(partial(take, plan.context + 1), None):
        for start in range(0, len(text) - 1, plan.context):
            ids = text[start : start + min(plan.context, left) + 1]
            if left > 0 and len(ids) > 1:
                windows.append(Window(torch.tensor(ids), len(ids) - 1))
                left -= len(ids) - 1
        if left <= 0:
            break
    return Sample(tuple(windows), 0)


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class _Round:
    """A round of requests, answered in one way."""

    tokens: list[list[int]]
    seconds: float
    first: list[float]  # seconds to the first token, by request
    kv_bytes: int  # most bytes of keys and values at one time
    stats: list[Stats]


def measure_group(
    model: PreTrainedModel,
    full: PreTrainedModel,
    weights: str,
    pages: str,
    source: Source,
    rounds: Sequence[list[Job]],
    on_run: Callable[[str], None],
) -> dict[str, Any]:
    """All combinations of prompt cache, speculation and batching on one pair of number formats, beside stock.

    Exact parts give the tokens of the same weights and pages without them; the model's own numbers give stock's.

    Args:
        model: With its weights quantized as `weights` says.
        full: As it came.
        weights: Of `WEIGHTS`.
        pages: Of `PAGES`.
        source: Of the report's names.
        rounds: Requests of every round; the first one is not timed.
        on_run: Called after each round of a way with the way's name.
    """
    ways: dict[str, Callable[[list[Job]], _Round]] = {
        ALONE: partial(_stock_alone, full),
        PADDED: partial(_stock_padded, full),
    }
    names = {" + ".join(parts) or "none": parts for parts in cells()}
    with ExitStack() as stack:
        for name, parts in names.items():
            config = config_of(pages, parts, name)
            if PARTS[2] in parts:
                ways[name] = partial(_submitted, stack.enter_context(Engine(model, config)))
            else:
                ways[name] = partial(_one_by_one, model, config)
        first = {}
        for name, way in ways.items():  # sets everything up, and computes what all prompts begin with
            first[name] = way(rounds[0])
            on_run(name)
        turns = {name: iter(rounds[1:]) for name in ways}
        calls = {name: lambda name=name: ways[name](next(turns[name])) for name in ways}
        runs: dict[str, list[_Round]] = interleave(calls, len(rounds) - 1, on_run)
    handle_of(model).release()
    # Quantized numbers have no stock that computes with them: there the cell without parts says what is right.
    right = ALONE if weights == pages == FULL else "none"
    exact = None if weights == FULL else cache(lambda: dequantized(model, full).float())
    also = None if pages == FULL else partial(_through_pages, model, pages)
    equal = _Equal(partial(compare_answers, model, exact=exact, also=also), rounds[1:], runs[right])
    return {
        "name": name_of(weights, pages, source.dtype),
        "weights": weights,
        "pages": pages,
        "weight_bytes": held(model),
        "right": right,
        "stock": {name: _figures(runs[name], first[name], rounds[1:]) for name in (ALONE, PADDED)},
        "stock_weight_bytes": held(full),
        "cells": [_cell(name, parts, runs, first, equal, rounds[1:]) for name, parts in names.items()],
    }


def _cell(
    name: str,
    parts: Sequence[str],
    runs: Mapping[str, Sequence[_Round]],
    first: Mapping[str, _Round],
    equal: _Equal,
    rounds: Sequence[list[Job]],
) -> dict[str, Any]:
    outcome = equal(runs[name])
    reasons = [] if outcome.same else ["other tokens"]
    stats = [stats for run in runs[name] for stats in run.stats]
    reasons += sorted({f"transformers served: {each.reason}" for each in stats if each.served_by != "llmopt"})
    if PARTS[0] in parts and not sum(each.cached_tokens for each in stats):
        reasons.append("nothing was found in the prompt cache")
    over = PADDED if PARTS[2] in parts else ALONE
    seconds = {way: [run.seconds for run in runs[way]] for way in (over, name)}
    return {
        "name": name,
        "parts": list(parts),
        **_figures(runs[name], first[name], rounds),
        "cached_tokens": sum(each.cached_tokens for each in stats),
        "drafted_tokens": sum(each.drafted_tokens for each in stats),
        "accepted_tokens": sum(each.accepted_tokens for each in stats),
        "equality": outcome.to_dict(),
        "passed": not reasons,
        "reasons": reasons,
        "over": over,
        # Nothing is said about speed unless the tokens are the same.
        "ratio": None if reasons else asdict(paired_ratio(seconds[over], seconds[name])),
    }


def _figures(runs: Sequence[_Round], first: _Round, rounds: Sequence[list[Job]]) -> dict[str, Any]:
    new = [sum(job.new for job in jobs) for jobs in rounds]
    return {
        "seconds": summary(run.seconds for run in runs),
        "tokens_per_second": summary(count / run.seconds for count, run in zip(new, runs, strict=True)),
        "time_to_first_token": summary(sum(run.first) / len(run.first) for run in runs),
        "kv_bytes": max(run.kv_bytes for run in (first, *runs)),
    }


class _Equal:
    """Compares rounds with those that are right; an answer that was seen before is not compared again."""

    def __init__(
        self,
        compare: Callable[[list[int], list[int], list[int]], Equality],
        rounds: Sequence[list[Job]],
        right: Sequence[_Round],
    ) -> None:
        self._compare, self._rounds, self._right = compare, rounds, right
        self._known: dict[tuple[int, int, tuple[int, ...]], Equality] = {}

    def __call__(self, runs: Sequence[_Round]) -> Equality:
        return least(self._outcomes(runs))

    def _outcomes(self, runs: Sequence[_Round]) -> Iterator[Equality]:
        for number, (jobs, right, run) in enumerate(zip(self._rounds, self._right, runs, strict=True)):
            for place, (job, expected, got) in enumerate(zip(jobs, right.tokens, run.tokens, strict=True)):
                key = number, place, tuple(got)
                if key not in self._known:
                    self._known[key] = self._compare(job.prompt, expected, got)
                yield self._known[key]


def _inputs(model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in left_padded(prompts).items()}


def _stock_alone(model: PreTrainedModel, jobs: list[Job]) -> _Round:
    began, tokens, first, most = perf_counter(), [], [], 0
    for job in jobs:
        run = generate(model, _inputs(model, [job.prompt]), **arguments(job))
        tokens.append(run.output[0, run.prompt_length :].tolist())
        first.append(run.time_to_first_token)
        most = max(most, run.output.shape[1] - 1)  # the last token is never computed
    return _Round(tokens, perf_counter() - began, first, most * _token_bytes(model), [])


def _stock_padded(model: PreTrainedModel, jobs: list[Job]) -> _Round:
    began = perf_counter()
    longest = max(jobs, key=lambda job: job.new)
    run = generate(model, _inputs(model, [job.prompt for job in jobs]), **arguments(longest))
    rows = run.output[:, run.prompt_length :].tolist()
    tokens = [row[: job.new] for row, job in zip(rows, jobs, strict=True)]
    size = len(jobs) * (run.output.shape[1] - 1) * _token_bytes(model)
    return _Round(tokens, perf_counter() - began, [run.time_to_first_token] * len(jobs), size, [])


def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in stock's cache."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        return cache_bytes(model(ids, use_cache=True).past_key_values)


def _one_by_one(model: PreTrainedModel, config: LLMOptConfig, jobs: list[Job]) -> _Round:
    handle, tokens, stats, began = handle_of(model), [], [], perf_counter()
    for job in jobs:
        inputs = _inputs(model, [job.prompt])
        output = model.generate(**inputs, llmopt=config, **arguments(job))  # type: ignore[operator]
        tokens.append(output[0, len(job.prompt) :].tolist())
        assert handle.stats is not None
        stats.append(handle.stats)
    seconds = perf_counter() - began
    first = [each.time_to_first_token for each in stats]
    return _Round(tokens, seconds, first, max(each.page_bytes for each in stats), stats)


def _submitted(engine: Engine, jobs: list[Job]) -> _Round:
    store, most = engine.loop.store, 0

    def look(*_: object) -> None:
        nonlocal most
        held = [group.pool.used * store.page_bytes(index) for index, group in enumerate(store.groups)]
        most = max(most, sum(held))

    engine.loop.on_step = look
    began = perf_counter()
    handles = [engine.submit(job.prompt, **arguments(job)) for job in jobs]
    tokens = [handle.result() for handle in handles]
    seconds = perf_counter() - began
    engine.loop.on_step = None
    stats = [handle.stats for handle in handles]
    return _Round(tokens, seconds, [each.time_to_first_token for each in stats], most, stats)
