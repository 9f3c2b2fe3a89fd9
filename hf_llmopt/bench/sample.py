"""Texts cut into windows, of which every token is predicted once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt.errors import InvalidOption, InvalidText

CONTEXT = 1024  # tokens of a window, where the model has as many positions


@dataclass(frozen=True)
class Window:
    """A run of a text. The model reads all but the last token and predicts all but the first.

    Attributes:
        ids: `[n]`.
        counted: How many of the `n - 1` predictions count, the last ones; those before counted in an earlier window.
    """

    ids: Tensor
    counted: int


@dataclass(frozen=True)
class Sample:
    """Texts cut into windows; every token is predicted once.

    Attributes:
        windows: In the order of the texts.
        bytes: UTF-8 bytes of the text that is predicted.
    """

    windows: tuple[Window, ...]
    bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(window.counted for window in self.windows)

    @classmethod
    def cut(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        context: int | None = None,
        stride: int | None = None,
        tokens: int | None = None,
    ) -> Sample:
        r"""Cut texts into windows that slide by `stride` tokens.

        A token is predicted from at least `context - stride` tokens before it, where its text has as many. Each text is
        opened by the tokenizer's BOS token, else by its EOS token; with neither, a text's first token is not predicted.

        Args:
            model: Whose positions limit the windows.
            tokenizer: Its tokenizer.
            texts: The texts.
            context: Tokens that the model reads in a window; `None` for 1,024, or what the model has positions for.
            stride: From 1, slow and exact, to `context`, windows that share nothing; `None` for half of `context`.
            tokens: Stop after so many predictions; `None` for all.

        Raises:
            InvalidOption: The model has fewer positions, or stride and context do not fit together.
            InvalidText: There is no token to predict.

        Example:
            >>> from hf_llmopt import demo
            >>> sample = Sample.cut(*demo.load(), ["import os\n"])
            >>> sample.tokens, sample.bytes
            (3, 10)
        """
        context, stride = _checked(model, context, stride, tokens)
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        windows: list[Window] = []
        size, left = 0, math.inf if tokens is None else tokens
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids if opening is None else [opening, *ids]
            if len(ids) - 1 > left:
                ids = ids[: int(left) + 1]
                text = tokenizer.decode(ids if opening is None else ids[1:], clean_up_tokenization_spaces=False)
            size += len(text.encode("utf-8", "surrogatepass"))
            windows += slide(torch.tensor(ids, dtype=torch.long), context, stride)
            left -= max(0, len(ids) - 1)
            if left <= 0:
                break
        if not windows:
            raise InvalidText("There is no token to predict: the text is empty or too short. Give a longer text.")
        return cls(tuple(windows), size)


def _checked(model: PreTrainedModel, context: int | None, stride: int | None, tokens: int | None) -> tuple[int, int]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(CONTEXT, positions or CONTEXT)
    elif positions is not None and context > positions:
        raise InvalidOption(
            f"A context of {context} tokens is more than the model's {positions} positions; give at most {positions}."
        )
    stride = max(1, context // 2) if stride is None else stride
    for name, value in (("context", context), ("stride", stride), ("tokens", tokens)):
        if value is not None and value < 1:
            raise InvalidOption(f"{name} must be at least 1, got {value}.")
    if stride > context:
        raise InvalidOption(
            f"A stride of {stride} tokens is more than the context of {context}: tokens would be left out. "
            f"Give a stride of at most {context}."
        )
    return context, stride


def slide(ids: Tensor, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text, `[tokens]`; whatever an earlier one predicted does not count again."""
    done = 0  # predictions, the first of which is of ids[1]
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids) - 1)
        if end > done:
            yield Window(ids[start : end + 1], end - done)
        done = max(done, end)
