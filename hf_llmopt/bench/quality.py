"""How well a model predicts text, and how far its logits are from another model's: perplexity and divergence.

Both are means over the same `Sample`, with a bootstrap interval over the windows (Efron 1979).
Two models on one sample are compared window by window, which gives a far narrower interval than either has alone.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_llmopt.config import LLMOptConfig
from hf_llmopt.errors import InvalidLogits, InvalidOption

from .sample import Sample

RESAMPLES = 2000
_ROWS = 256  # tokens whose logits are widened to float32 at a time: a vocabulary of 150,000 makes 150 MB of them


@dataclass(frozen=True)
class Estimate:
    """A mean with the 95 % interval of a bootstrap over windows.

    Attributes:
        value: The mean over all tokens.
        low: Lower end of the interval; `None` for a single window, which has none.
        high: Its upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the mean."""
        return Estimate(*(None if end is None else function(end) for end in (self.value, self.low, self.high)))  # type: ignore[arg-type]

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


# ---------------------------------------------------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a sample.

    Attributes:
        nats: The summed negative log-likelihood of each window.
        counts: Predicted tokens of each window.
        bytes: Of the text.
    """

    nats: tuple[float, ...]
    counts: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        """A line to print; the windows' figures would fill the screen."""
        return f"{self.estimate} on {self.tokens:,} tokens"

    @property
    def estimate(self) -> Estimate:
        """The perplexity per token."""
        return _mean(self.nats, self.counts).map(math.exp)

    @property
    def value(self) -> float:
        """The perplexity per token, without its interval."""
        return math.exp(sum(self.nats) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer."""
        return sum(self.nats) / math.log(2) / self.bytes

    @property
    def tokens(self) -> int:
        """How many were predicted."""
        return sum(self.counts)

    def over(self, other: Perplexity) -> Estimate:
        """How many times as large as another model's perplexity on the same sample; the windows are paired.

        Args:
            other: Made from the same `Sample`.
        """
        if self.counts != other.counts:
            raise InvalidOption("The two perplexities are of other windows; measure both on one Sample.")
        return _mean(np.subtract(self.nats, other.nats), self.counts).map(math.exp)

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        found = self.estimate
        return {
            "perplexity": found.value,
            "low": found.low,
            "high": found.high,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "windows": len(self.counts),
        }


def perplexity(
    model: PreTrainedModel, sample: Sample, on_window: Callable[[str], None] = lambda done: None
) -> Perplexity:
    r"""Measure the perplexity of a model.

    Args:
        model: A causal language model in evaluation mode.
        sample: Of its tokenizer.
        on_window: Called after each window with what is done.

    Raises:
        InvalidLogits: The model's logits contain NaN.
        InvalidOption: The model's default config evicts.

    Example:
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> found = perplexity(model, Sample.cut(model, tokenizer, ["import os\n"]))
        >>> found.tokens, 1 < found.value < 500
        (3, True)
    """
    nats = []
    for window, rows in zip(sample.windows, logits(model, sample), strict=True):
        targets = window.ids[-window.counted :].to(rows.device)
        parts = zip(rows.split(_ROWS), targets.split(_ROWS), strict=True)
        nats.append(sum(float(F.cross_entropy(part.float(), ids, reduction="sum")) for part, ids in parts))
        on_window(f"perplexity {math.exp(sum(nats) / sum(w.counted for w in sample.windows[: len(nats)])):.3f}")
    return Perplexity(tuple(nats), tuple(window.counted for window in sample.windows), sample.bytes)


def logits(model: PreTrainedModel, sample: Sample) -> Iterator[Tensor]:
    """The logits of the predictions that count, window by window: `[counted, vocabulary]` in the model's type.

    Where the model's default config has quantized pages (`KVCacheConfig(dtype=...)`), keys and values come from such.

    Raises:
        InvalidLogits: They contain NaN.
        InvalidOption: The model's default config evicts, which a pass over a whole text does not.
        NotServed: The model is not served, so that there are no pages.
    """
    handle = vars(model).get("llmopt")
    config = None if handle is None else handle.config
    if config is not None and config.kv_cache.eviction is not None:
        raise InvalidOption(
            f"eviction={config.kv_cache.eviction!r} gives up tokens while text is generated; the passes measured here "
            "see all of them. Leave it out; `hf-llmopt bench kv_cache --long --eviction` measures what it costs."
        )
    cache = None
    if config is not None and config.kv_cache.dtype != "auto":
        cache = _paged_cache(model, config, sample.windows[0].ids[:1])
    for number, window in enumerate(sample.windows):
        with torch.no_grad():
            if cache is not None:
                cache.reset()
            ids = window.ids[None, :-1].to(model.device)
            found = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits
        rows: Tensor = found[0, -window.counted :]
        if rows.isnan().any():
            raise InvalidLogits(f"The model's logits contain NaN, in window {number} of {len(sample.windows)}.")
        yield rows


def _paged_cache(model: Any, config: LLMOptConfig, ids: Tensor) -> Any:
    """A cache whose `update` stores in pages and gives back what is stored."""
    pages = LLMOptConfig(kv_cache=config.kv_cache, attention=config.attention, strict=True)
    once = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
    first = ids[None].to(model.device)
    return model.generate(first, attention_mask=torch.ones_like(first), **once, llmopt=pages).past_key_values


# ---------------------------------------------------------------------------------------------------------- divergence


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the one it should be like.

    Attributes:
        perplexity: How many times as large the model's perplexity is.
        kl: Mean Kullback-Leibler divergence of the model's distribution from the reference's, nats per token.
        kl_99: Its 99 % quantile over tokens.
        top1: Share of tokens at which both prefer the same: greedy acceptance of one drafted token.
        overlap: Mean of `sum(min(p, q))`: acceptance of one sampled token (arXiv 2211.17192).
        rms: Root mean square of the differences of logits.
        largest: The largest difference.
        spread: Standard deviation of the reference's logits over the vocabulary, to compare `rms` with.
        tokens: How many were compared.
    """

    perplexity: Estimate
    kl: Estimate
    kl_99: float
    top1: Estimate
    overlap: float
    rms: float
    largest: float
    spread: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return asdict(self)


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    sample: Sample,
    on_window: Callable[[str], None] = lambda done: None,
) -> Divergence:
    r"""Compare two models that are in memory.

    Args:
        model: The model to judge, as a quantized one.
        reference: The model that it should be like.
        sample: Of the tokenizer of both.
        on_window: Called after each window with what is done.

    Example:
        >>> from hf_llmopt import demo
        >>> (model, tokenizer), (draft, _) = demo.load(), demo.load(draft=True)
        >>> sample = Sample.cut(model, tokenizer, ["import os\nimport sys\n"])
        >>> compare(model, model, sample).kl.value, compare(draft, model, sample).kl.value > 0.01
        (0.0, True)
    """
    return divergence(logits(model, sample), logits(reference, sample), sample, on_window)


def divergence(
    rows: Iterable[Tensor],
    reference: Iterable[Tensor],
    sample: Sample,
    on_window: Callable[[str], None] = lambda done: None,
) -> Divergence:
    """Compare two models' logits.

    Args:
        rows: Of the model to judge, as `logits` gives them.
        reference: Of the model that it should be like, perhaps `recorded`.
        sample: What both are of.
        on_window: Called after each window with what is done.

    Raises:
        InvalidOption: The vocabularies are not of one size.
    """
    kl: list[Tensor] = []
    same: list[float] = []
    worse: list[float] = []
    overlap = squares = largest = spread = 0.0
    numbers = 0
    for window, ours, theirs in zip(sample.windows, rows, reference, strict=True):
        if ours.shape != theirs.shape:
            raise InvalidOption(
                f"The models have vocabularies of {ours.shape[1]} and {theirs.shape[1]} tokens; only models with one "
                "tokenizer can be compared."
            )
        parts, agreed, lost = [], 0.0, 0.0
        targets = window.ids[-window.counted :, None].to(ours.device)
        for a, b, ids in zip(ours.split(_ROWS), theirs.split(_ROWS), targets.split(_ROWS), strict=True):
            q, p = a.float(), b.float().to(a.device)
            log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
            lost += float((log_p - log_q).gather(-1, ids).sum(dtype=torch.float64))
            agreed += float((q.argmax(-1) == p.argmax(-1)).sum())
            overlap += float(torch.minimum(log_p.exp(), log_q.exp()).sum())
            squares += float((q - p).square().sum(dtype=torch.float64))
            largest = max(largest, float((q - p).abs().max()))
            spread += float(p.std(-1).sum())
            numbers += q.numel()
        kl.append(torch.cat(parts))
        same.append(agreed)
        worse.append(lost)
        on_window(f"window of {window.counted} tokens")
    counts = [window.counted for window in sample.windows]
    return Divergence(
        perplexity=_mean(worse, counts).map(math.exp),
        kl=_mean([float(part.sum()) for part in kl], counts),
        kl_99=float(np.quantile(torch.cat(kl).numpy(), 0.99)),
        top1=_mean(same, counts),
        overlap=overlap / sample.tokens,
        rms=math.sqrt(squares / numbers),
        largest=largest,
        spread=spread / sample.tokens,
        tokens=sample.tokens,
    )


def recorded(rows: Iterable[Tensor], sample: Sample, folder: Path) -> Iterator[Tensor]:
    """Write logits to files and give them back one by one, so that two models need not be in memory at once.

    Args:
        rows: As `logits` gives them; all are taken at once.
        sample: What they are of.
        folder: Where to write.

    Raises:
        OSError: The folder has no room for them.
    """
    for number, window_rows in enumerate(rows):
        if number == 0:
            need = window_rows.element_size() * window_rows.shape[1] * sample.tokens
            if need > shutil.disk_usage(folder).free:
                raise OSError(
                    errno.ENOSPC, f"{need / 1e9:.1f} GB of logits do not fit; compare fewer tokens", str(folder)
                )
        torch.save(window_rows.contiguous().cpu(), folder / f"{number}.pt")
    return (torch.load(folder / f"{number}.pt") for number in range(len(sample.windows)))


def _mean(sums: Sequence[float] | np.ndarray[Any, Any], counts: Sequence[int]) -> Estimate:
    """The mean over all tokens, from the windows' sums; windows are drawn again with replacement for the interval."""
    total, tokens = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    value = float(total.sum() / tokens.sum())
    if len(tokens) < 2:
        return Estimate(value)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(tokens), size=len(tokens)) for _ in range(RESAMPLES))
    low, high = np.quantile([total[i].sum() / tokens[i].sum() for i in drawn], [0.025, 0.975])
    return Estimate(value, float(low), float(high))
