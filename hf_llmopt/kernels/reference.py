"""Plain-torch definitions of every kernel: slow, short, and what "correct" means.

A faster kernel has the same signature as its twin here and is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible(queries: Tensor, keys: Tensor, kind: str, window: int) -> Tensor:
    """Which keys a query may see.

    Args:
        queries: Token indices of the queries, `[queries]`.
        keys: Token indices of the keys, `[keys]`.
        kind: `"full"`, `"sliding"` or `"chunked"`.
        window: Tokens of the window or chunk.

    Returns:
        Bool `[queries, keys]`.

    Example:
        >>> import torch
        >>> visible(torch.tensor([3]), torch.arange(4), "sliding", 2).tolist()
        [[False, False, True, True]]
    """
    query, key = queries[:, None], keys[None, :]
    mask = key <= query
    if kind == "sliding":
        mask = mask & (key > query - window)
    elif kind == "chunked":
        mask = mask & (key // window == query // window)
    return mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention over dense keys, grouped-query heads without repeating them.

    `softmax(softcap(query @ key^T * scaling))  @ value` (Vaswani et al. 2017, eq. 1). `softcap(x) = c * tanh(x / c)`
    (Gemma 2). A sink is a logit per head that takes part in the softmax and has no value (gpt-oss).

    Args:
        query: `[batch, heads, queries, key_dim]`.
        key: `[batch, kv_heads, keys, key_dim]`; `heads` is a multiple of `kv_heads`.
        value: `[batch, kv_heads, keys, value_dim]`.
        mask: Bool, `True` where a query sees a key, broadcastable to `[batch, 1, queries, keys]`; `None` for all.
        scaling: Factor on the dot products.
        softcap: `c`, or `None`.
        sinks: `[heads]`, or `None`.

    Returns:
        `[batch, heads, queries, value_dim]`.

    Example:
        >>> import torch
        >>> query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
        >>> attention(query, key, key, None, 8**-0.5).shape
        torch.Size([1, 4, 3, 8])
    """
    batch, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, -1)
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, value.unsqueeze(2)).reshape(batch, heads, queries, -1)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Sequence[Tensor],
    spans: Sequence[tuple[int, int, int]],
    kind: str,
    window: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every span over the pages of its own request, one span after the other.

    Args:
        query: `[tokens, heads, key_dim]`, the spans behind one another.
        keys: All slots of the layer, `[slots, kv_heads, key_dim]`.
        values: `[slots, kv_heads, value_dim]`.
        slots: Per span, the slots of its request's tokens 0 ... context - 1.
        spans: Per span (offset in `query`, queries, context): the last query sees tokens up to `context - 1`.
        kind: `"full"`, `"sliding"` or `"chunked"`.
        window: Tokens of the window or chunk.
        scaling: Factor on the dot products.
        softcap: See `attention`.
        sinks: See `attention`.

    Returns:
        `[tokens, heads, value_dim]`.
    """
    output = query.new_empty(*query.shape[:2], values.shape[2])
    for own, (offset, length, context) in zip(slots, spans, strict=True):
        index = torch.arange(context, device=query.device)
        mask = visible(index[context - length :], index, kind, window)
        own = own.to(keys.device)
        part = attention(
            query[None, offset : offset + length].transpose(1, 2),
            keys[own][None].transpose(1, 2),
            values[own][None].transpose(1, 2),
            mask,
            scaling,
            softcap,
            sinks,
        )
        output[offset : offset + length] = part[0].transpose(0, 1)
    return output
