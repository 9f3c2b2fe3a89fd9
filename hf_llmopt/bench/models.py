"""Whether a model is served exactly: stock transformers beside llmopt, and what a served model has to do without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import KVCacheConfig, LLMOptConfig
from ..errors import LLMOptError
from ..generation.support import rope_limit
from .report import Table

EXACTLY, LIMITED, STOCK, NOT_TRIED, WRONG = "exactly", "with limits", "by transformers", "not tried", "WRONG"
NEW = 8
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
GREEDY: dict[str, Any] = {"do_sample": False}

# Watches the caches of transformers' own; gives their updates.
Updates = Callable[[], AbstractContextManager[Sequence[Any]]]


@dataclass(frozen=True)
class Trial:
    """How a model is served.

    Attributes:
        served: `EXACTLY`, `LIMITED`, `STOCK`, or `WRONG` where tokens differ: a fault of ours.
        limits: What it has to do without, each a phrase.
        reason: Why transformers serves it, or what is wrong.
    """

    served: str
    limits: tuple[str, ...] = ()
    reason: str | None = None


def tried(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor] | None = None,
    updates: Updates = lambda: nullcontext(()),
) -> Trial:
    """Generate with a model in both ways, greedy and sampled, and say how it is served.

    Args:
        model: In eval mode. Below float32 rounding may make tokens differ; compare in float32.
        inputs: Arguments of `generate` with the prompts; by default three of random tokens, padded on the left.
        updates: Entered while llmopt generates; gives the updates of transformers' own caches, of which there must be
            none, but for prompts that the model's own pass computes.

    Returns:
        The outcome. Tokens count as equal if all are, and the generator ends in the same state.

    Example:
        >>> from hf_llmopt import demo
        >>> from hf_llmopt.bench.models import tried
        >>> model, _ = demo.load()
        >>> tried(model.float()).served
        'exactly'
    """
    given = prompts(model, 5, 13, 9) if inputs is None else dict(inputs)
    limits: list[str] = []
    for sampling in (GREEDY, SAMPLED):
        trial = _both(model, given, sampling, updates)
        if trial is not None and trial.served == STOCK and inputs is None and not limits:
            alone = _both(model, prompts(model, 9), sampling, updates)
            if alone is not None:
                return trial
            given, limits, trial = prompts(model, 9), [f"rows of one length only ({trial.reason})"], None
        if trial is not None:
            return trial
    limits += _limits(model, given, inputs is None, updates)
    return Trial(LIMITED if limits else EXACTLY, tuple(limits))


def prompts(model: PreTrainedModel, *lengths: int, pad: str = "left") -> dict[str, Tensor]:
    """Random prompts of so many tokens each, padded."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(3, min(vocabulary, 90), (len(lengths), max(lengths)), generator=generator, device="cpu")
    count = torch.tensor(lengths)[:, None]
    column = torch.arange(max(lengths))
    mask = column >= max(lengths) - count if pad == "left" else column < count
    return {"input_ids": (ids * mask).to(model.device), "attention_mask": mask.long().to(model.device)}


def _generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **arguments: Any) -> tuple[Tensor, Tensor]:
    """Tokens of a call, and the generator's state behind it."""
    torch.manual_seed(0)
    never: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate: Any = model.generate
        output = generate(**inputs, **{**never, **arguments})
    return output, torch.get_rng_state()


def _both(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    sampling: dict[str, Any],
    updates: Updates,
) -> Trial | None:
    """What speaks against a call, or `None` where both ways give the same tokens."""
    with torch.random.fork_rng(devices=[]):
        try:
            theirs, state = _generate(model, inputs, llmopt=False, **sampling)
        except Exception as error:  # whatever a model raises means the same: there is nothing to compare with
            return Trial(STOCK, reason=f"transformers itself fails ({type(error).__name__}: {_line(error)})")
        try:
            with updates() as own_caches:
                found, own = _generate(
                    model, inputs, llmopt=LLMOptConfig(kv_cache=KVCacheConfig(page_size=4)), **sampling
                )
        except LLMOptError as error:
            return Trial(STOCK, reason=_line(error))
    handle = vars(model).get("llmopt")
    if handle is None or handle.stats is None:
        return Trial(STOCK, reason="it has a generate() of its own")
    if handle.stats.served_by != "llmopt":
        return Trial(STOCK, reason=handle.stats.reason)
    engine = handle.engine
    # A prompt in each layer once, and the one that a new engine proves itself with.
    most = 2 * len(engine.store.layers) if engine.runner.states else 0
    if len(own_caches) > most:
        return Trial(WRONG, reason="a cache of transformers' own was updated")
    if not torch.equal(theirs, found):
        return Trial(
            WRONG, reason=f"other tokens than transformers' ({'sampled' if sampling is SAMPLED else 'greedy'})"
        )
    if not torch.equal(state, own):
        return Trial(WRONG, reason="the random generator ends in another state")
    return None


def _limits(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    plain: bool,
    updates: Updates,
) -> Iterator[str]:
    """What a model that is served has to do without, found by trying it."""
    if (limit := rope_limit(model)) is not None:
        yield f"up to {limit} tokens (its rotary embedding depends on the longest sequence beyond)"
    if plain and (right := _both(model, prompts(model, 5, 13, 9, pad="right"), GREEDY, updates)) is not None:
        yield "padding on the right only within its window" if "window" in (right.reason or "") else "no right padding"
    with torch.random.fork_rng(devices=[]):
        for name, config in (("prompt cache", "prompt_cache"), ("speculation", "speculative")):
            try:
                for _ in range(2):
                    _generate(model, inputs, llmopt=LLMOptConfig.parse([config, "kv_cache"]), **GREEDY)
            except LLMOptError as error:
                yield f"no {name} ({_line(error)})"
                continue
            stats = vars(model)["llmopt"].stats
            if stats.served_by != "llmopt" or (config == "prompt_cache" and not stats.cached_tokens):
                yield f"no {name}"
            elif config == "speculative" and stats.undrafted is not None:
                yield f"no {name} ({stats.undrafted})"


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a sweep over architectures.

    Args:
        report: `"models"`: by title and model type, the fields of `Trial` and the class that was tried.
    """
    versions = report["environment"]["versions"]
    models: Mapping[str, Mapping[str, Any]] = report["models"]
    kinds = (EXACTLY, LIMITED, STOCK, NOT_TRIED)
    counts = [
        [title, *(str(sum(found["served"] == kind for found in of.values())) for kind in kinds), str(len(of))]
        for title, of in models.items()
    ]
    caption = f"transformers {versions['transformers']}, torch {versions['torch']}; tiny random models, float32"
    summary = Table("How many are served", ["", *kinds, "all"], counts, 1, caption)
    return [summary, *(_table(title, of) for title, of in models.items())]


def _table(title: str, models: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [f"`{name}`", found["class"], found["served"], "; ".join(found["limits"]) or found["reason"] or ""]
        for name, found in sorted(models.items())
    ]
    return Table(title, ["model type", "class", "served", "limits, or why not"], rows, 4)
