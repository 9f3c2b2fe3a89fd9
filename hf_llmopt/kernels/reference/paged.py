"""Attention: over dense keys, and over the pages of each query's own request."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Seen
from .rows import unpack_rows


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

    `softmax(softcap(query @ key^T * scaling))  @ value` (Vaswani et al. 2017). `softcap(x) = c * tanh(x / c)`
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


def paged_attention(query: Tensor, seen: Seen) -> Tensor:
    """Attention of single query tokens, each over the pages of its own request.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to.

    Returns:
        `[tokens, heads, value_dim]`.
    """
    outputs = []
    size, form, (kv_heads, *widths) = seen.page_size, seen.form, seen.shape
    branches = [-1] * len(query) if seen.tree is None else seen.tree.tolist()
    for token, (row, first, end), branch in zip(query, seen.items.tolist(), branches, strict=True):
        index = torch.arange(first, end, device="cpu")
        back = end - 1 - index
        index = index[(back >= 32) | (branch >> back.clamp(max=31) & 1).bool()]
        slots = (seen.table[row].cpu().long()[index // size] * size + index % size).to(seen.keys.device)
        keys, values = seen.keys[slots], seen.values[slots]
        if form is not None:
            keys = unpack_rows(keys, form, kv_heads, widths[0], query.dtype, form.rotates)
            values = unpack_rows(values, form, kv_heads, widths[1], query.dtype)
        keys, values = (rows[None].transpose(1, 2) for rows in (keys, values))
        output = attention(token[None, :, None], keys, values, None, seen.scaling, seen.softcap, seen.sinks)
        outputs.append(output[0, :, 0])
    return torch.stack(outputs)
