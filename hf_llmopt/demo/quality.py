"""How good the pair is on texts it has not seen: perplexity, bits per byte, and how often draft and target agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quality:
    """What a model makes of some texts.

    Attributes:
        perplexity: Per token.
        bits_per_byte: Independent of the tokenizer.
        tokens: How many were predicted.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """How well a draft model foresees its target.

    Attributes:
        top1: The share of positions at which both prefer the same token: greedy acceptance of one drafted token.
        overlap: The mean of `sum(min(p, q))`: acceptance of one sampled token (arXiv 2211.17192, equation 4).
    """

    top1: float
    overlap: float


def measure(model: PreTrainedModel, tokenizer: Any, texts: Iterable[str], context: int = 1024) -> Quality:
    r"""Measures the perplexity of a model on whole texts.

    Each text is cut into windows that do not overlap, so the first tokens of a window are predicted from little: the
    number is a little higher than with a sliding window, and comparable between runs that use the same `context`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: The texts.
        context: Tokens in a window.

    Returns:
        The mean over all tokens of all texts.

    Example:
        >>> from hf_llmopt import demo
        >>> measure(*demo.load(), ["import os\n"]).tokens
        3
    """
    texts = list(texts)
    total, tokens = 0.0, 0
    for ids in windows(tokenizer, texts, context):
        loss = F.cross_entropy(_logits(model, ids), ids[1:].to(model.device), reduction="sum")
        total, tokens = total + loss.item(), tokens + len(ids) - 1
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return Quality(math.exp(total / tokens), total / math.log(2) / size, tokens)


def agree(
    draft: PreTrainedModel, target: PreTrainedModel, tokenizer: Any, texts: Iterable[str], context: int = 1024
) -> Agreement:
    """Measures how well a draft model foresees its target on given texts.

    Args:
        draft: The small model.
        target: The model it drafts for, with the same tokenizer.
        tokenizer: The tokenizer of both.
        texts: The texts.
        context: Tokens in a window.

    Returns:
        The mean over all tokens of all texts.
    """
    same, overlap, tokens = 0.0, 0.0, 0
    for ids in windows(tokenizer, texts, context):
        guess, truth = _logits(draft, ids), _logits(target, ids)
        same += (guess.argmax(-1) == truth.argmax(-1)).sum().item()
        overlap += torch.minimum(guess.softmax(-1), truth.softmax(-1)).sum().item()
        tokens += len(ids) - 1
    return Agreement(same / tokens, overlap / tokens)


def windows(tokenizer: Any, texts: Iterable[str], context: int = 1024) -> Iterator[torch.Tensor]:
    """Cuts texts as `measure` does.

    Args:
        tokenizer: The tokenizer; its `eos_token` opens each text, as it did in training.
        texts: The texts.
        context: Tokens in a window.

    Yields:
        Token ids `[n]`, `2 <= n <= context + 1`; neighbouring windows share one token, so each is predicted once.
    """
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([tokenizer.eos_token_id, *encoded])
        for start in range(0, len(ids) - 1, context):
            yield ids[start : start + context + 1]


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Predicts `ids[1:]`: float32 logits `[n - 1, vocabulary]`."""
    logits: torch.Tensor = model(input_ids=ids[None, :-1].to(model.device), use_cache=False).logits
    return logits[0].float()
