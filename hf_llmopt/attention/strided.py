"""Prompts of a plain forward by the Triton kernels, which read dense keys as pages of one token.

Token t of row b lies in slot `b * apart + t`, and heads lie wherever they lie: `[batch, tokens, heads, width]` and
`[batch, heads, tokens, width]` are both read where the model left them. All that is made is linear in the tokens.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from ..kernels.arguments import Seen
from . import gpu

KEPT = 8  # lists of the last passes: layers of a pass ask for the same


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What every token of a batch attends to among its row's.

    Args:
        query: `[batch, heads, tokens, key_dim]`; copied where tokens do not follow one another with all heads.
        key: `[batch, kv_heads, tokens, key_dim]`; see `as_slots`.
        value: `[batch, kv_heads, tokens, value_dim]`; likewise.
        seen: As `items` gives it; `None` for causality alone.
        scaling: Factor on the dot products.
        softcap: `c` in `c * tanh(score / c)`, or `None`.
        sinks: `[heads]`, or `None`.

    Returns:
        `[batch, tokens, heads, value_dim]`.
    """
    batch, _, tokens, _ = query.shape
    stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
    where = batch, tokens, query.device, stream  # what one stream has made may not be ready in another
    keys, values, apart = as_slots(key, value)
    every = _causal(*where) if seen is None else seen
    pages = Seen(keys, values, _table(apart, *where), every.reshape(-1, 3), 1, tokens, scaling, softcap, sinks)
    queries = query.transpose(1, 2).contiguous().flatten(0, 1)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        found, _ = gpu.prefill(queries, pages, partial(_tiles, *where), seen is not None)
    return found.unflatten(0, (batch, tokens))


def as_slots(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Dense keys and values as slots.

    Args:
        key: `[batch, kv_heads, tokens, key_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`. Both are copied where rows of the batch do not lie equally many
            tokens apart.

    Returns:
        Views `[slots, kv_heads, key_dim]` and `[slots, kv_heads, value_dim]`, and the slots from a row to the next.
    """
    if (apart := _apart(key)) is None or apart != _apart(value):
        key, value = key.contiguous(), value.contiguous()
        apart = _apart(key)
    assert apart is not None
    slots = (len(key) - 1) * apart + key.shape[2]
    keys, values = (
        part.as_strided((slots, part.shape[1], part.shape[3]), (part.stride(2), part.stride(1), 1))
        for part in (key, value)
    )
    return keys, values, apart


def items(batch: int, first: Tensor, end: Tensor) -> Tensor:
    """`Seen.items` of rows of equally many tokens, int32 `[batch, 1, tokens, 3]`.

    Args:
        batch: Rows.
        first: First token of its row that a token sees, `[batch or 1, tokens]`.
        end: End of those, likewise.
    """
    row = torch.arange(batch, device=end.device)[:, None]
    return torch.stack(torch.broadcast_tensors(row, first, end), -1).int()[:, None]


def _apart(part: Tensor) -> int | None:
    """Slots from a row of the batch to the next; `None` where no whole number of tokens lies between them."""
    row, _, token, element = part.stride()
    if element != 1 or token < part.shape[3]:
        return None
    if len(part) == 1:
        return 0
    return None if row % token else row // token


@lru_cache(KEPT)
def _table(apart: int, batch: int, tokens: int, device: torch.device, stream: int) -> Tensor:
    row, token = (torch.arange(count, dtype=torch.int32, device=device) for count in (batch, tokens))
    return row[:, None] * apart + token


@lru_cache(KEPT)
def _causal(batch: int, tokens: int, device: torch.device, stream: int) -> Tensor:
    token = torch.arange(tokens, device=device)[None]
    return items(batch, torch.zeros_like(token), token + 1)


@lru_cache(KEPT)
def _tiles(batch: int, tokens: int, device: torch.device, stream: int, size: int) -> Tensor:
    """As `extend.extend` takes them, a row's last first."""
    start = torch.arange((tokens - 1) // size * size, -1, -size, device=device)
    row = torch.arange(0, batch * tokens, tokens, device=device)[:, None]
    parts = row + start, (tokens - start).clamp(max=size), torch.full_like(start, tokens)
    return torch.stack(torch.broadcast_tensors(*parts), -1).flatten(0, 1).int()
