"""A call's prompts, as `generate` hands them to its decoding loop: ids or embeddings, a mask, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..engine import input_weight
from ..errors import EmptyPrompt, InvalidRequest, NotServed, TokenOutOfRange
from .prefill import media, reads_media


class Prompt:
    """The prompt's tensors, split into what a given cache holds and what is new.

    Attributes:
        past: The caller's cache, or `None`.
        past_length: Columns it holds.
        ids: New ids `[rows, new]` (arbitrary where embeddings are given).
        embeds: New embeddings `[rows, new, hidden]`, or `None`.
        mask: Bool `[rows, past_length + new]`.
        positions: Position ids of the new columns `[rows, new]`.
        media: What the prompts hold beside text, by the model's names.
        whole: The model's own pass computes them; why, the end of "a row ...", or `None`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        kwargs: dict[str, Any],
        states: bool,
    ) -> None:
        rows = input_ids.shape[0]
        self.media = media(model, kwargs)
        self.whole = "with images" if self.media else "of a model with recurrent states" if states else None
        cache = kwargs.get("past_key_values")
        self.past = cache if getattr(cache, "_is_user_defined", False) else None
        self.past_length = self.past.get_seq_length() if self.past is not None else 0
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        mask: Tensor | None = kwargs.get("attention_mask")
        given = input_ids.shape[1] if embeds is None else embeds.shape[1]
        if mask is not None:
            covered = mask.shape[1]
        else:  # 5.23 drops a mask of ones and keeps its length here; older versions never drop it
            covered = getattr(generation_config, "_mask_length", given)
        # As stock: inputs as long as the mask contain what the cache holds, shorter ones are new.
        skip = self.past_length if embeds is not None or covered == given else 0
        new = given - skip
        if new <= 0:
            raise NotServed(
                f"the cache already holds {self.past_length} tokens and the inputs have {given}: "
                "no new token to start from"
            )
        length = self.past_length + new
        if mask is None:
            self.mask = torch.ones(rows, length, dtype=torch.bool, device="cpu")
        else:
            if mask.shape != (rows, length):
                raise InvalidRequest(
                    f"attention_mask has shape {list(mask.shape)}, cache and inputs together {[rows, length]}."
                )
            self.mask = mask.to(device="cpu", dtype=torch.bool)
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is not None and not bool(self.mask.all()) and _counts_columns(model, input_ids, kwargs):
            positions = torch.arange(length, device="cpu")[None]
        if positions is None:
            positions = (self.mask.long().cumsum(-1) - 1).masked_fill(~self.mask, 0)
        if positions.dim() == 3:
            positions = _one_axis(positions, bool(self.media))
        if positions.dim() != 2:
            raise NotServed(f"position_ids have {positions.dim()} dimensions, not 2")
        if positions.shape[1] < new and covered < length:
            raise InvalidRequest(f"attention_mask has {covered} columns, cache and inputs together {length}.")
        if positions.shape[1] < new or positions.shape[0] not in (1, rows):
            raise InvalidRequest(f"position_ids has shape {list(positions.shape)}, {new} new tokens need one each.")
        self.positions = positions[:, -new:].expand(rows, -1).cpu()
        self.embeds = None if embeds is None else embeds[:, -new:]
        self._check_embeds(model)
        no_ids = torch.zeros(rows, new, dtype=torch.long, device="cpu")
        self.ids = input_ids[:, -new:].cpu() if embeds is None else no_ids
        self._check_ids(model)

    def _check_ids(self, model: PreTrainedModel) -> None:
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise InvalidRequest(f"input_ids must be int32 or int64, got {self.ids.dtype}.")
        real = self.mask[:, self.past_length :]
        empty = (~self.mask.any(dim=1)).nonzero()[:, 0].tolist()
        if empty:
            raise EmptyPrompt(
                f"Row(s) {empty} have no unmasked token. Give each at least one token (the BOS token, say)."
            )
        if self.embeds is not None:
            return
        real = real.clone()
        real[:, -1] = True  # a masked last token is computed too
        size = input_weight(model).shape[0]
        bad = ((self.ids < 0) | (self.ids >= size)) & real
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            where = "The prompt" if len(bad) == 1 else f"Row {row}"
            raise TokenOutOfRange(
                f"{where} contains token id {int(self.ids[row, column])}; the model's ids are 0 to {size - 1}. "
                "Is the tokenizer the model's own?"
            )

    def _check_embeds(self, model: PreTrainedModel) -> None:
        weight = input_weight(model)
        if self.embeds is not None and (self.embeds.shape[2], self.embeds.dtype) != (weight.shape[1], weight.dtype):
            raise InvalidRequest(
                f"inputs_embeds has width {self.embeds.shape[2]} and {self.embeds.dtype}, the model's embeddings have "
                f"width {weight.shape[1]} and {weight.dtype}."
            )

    def gaps(self) -> bool:
        """Whether a row has masked columns behind its first real one."""
        return bool((self.mask.long().diff(dim=1) < 0).any())


def _counts_columns(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the model takes columns, padded ones too, for positions, whatever `generate` found."""
    if not reads_media(model):
        return False
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[operator]
    return prepared.get("position_ids") is None


def _one_axis(positions: Tensor, images: bool) -> Tensor:
    """Of positions in time, height and width `[axes, rows, length]`, those that new tokens go on from.

    Raises:
        NotServed: They are not the same on all axes where that is needed.
    """
    axes = positions[1:] if images and positions.shape[0] > 1 else positions  # the first of four counts columns
    shown = axes[..., -1:] if images else axes
    if not bool((shown == shown[:1]).all()):
        raise NotServed("position_ids differ between time, height and width where text goes on")
    return axes[0]
