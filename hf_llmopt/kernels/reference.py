"""Plain-torch definitions of every kernel: slow, short, and what "correct" means.

A faster kernel has the same signature as its twin here and is tested against it.
"""

from __future__ import annotations

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
    table: Tensor,
    items: Tensor,
    page_size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of single query tokens, each over the pages of its own request.

    Args:
        query: `[tokens, heads, key_dim]`.
        keys: All slots of the layer, `[slots, kv_heads, key_dim]`.
        values: `[slots, kv_heads, value_dim]`.
        table: Page ids of each request, int32 `[requests, pages]`.
        items: Per query token (row of `table`, first visible token, end of the visible tokens), int32 `[tokens, 3]`.
        page_size: Tokens per page.
        scaling: Factor on the dot products.
        softcap: See `attention`.
        sinks: See `attention`.

    Returns:
        `[tokens, heads, value_dim]`.
    """
    outputs = []
    for token, (row, first, end) in zip(query, items.tolist(), strict=True):
        index = torch.arange(first, end, device="cpu")
        slots = (table[row].cpu().long()[index // page_size] * page_size + index % page_size).to(keys.device)
        seen_keys, seen_values = keys[slots][None].transpose(1, 2), values[slots][None].transpose(1, 2)
        outputs.append(attention(token[None, :, None], seen_keys, seen_values, None, scaling, softcap, sinks)[0, :, 0])
    return torch.stack(outputs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias`, rounded to the dtype, plus `residual`.

    Args:
        x: `[..., inputs]`.
        weight: `[outputs, inputs]`.
        bias: `[outputs]`, or `None`.
        residual: `[..., outputs]`, or `None`.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias` with a weight kept as `[inputs, outputs]`, as GPT-2 does.

    Args:
        x: `[..., inputs]`.
        weight: `[inputs, outputs]`.
        bias: `[outputs]`, or `None`.
    """
    return torch.nn.functional.linear(x, weight.T, bias)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variant: int = 0) -> Tensor:
    """Root mean square normalisation of the last axis (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: `[..., width]`.
        weight: `[width]`, or `None` for none.
        epsilon: Added to the mean square.
        variant: Where models round: 0 weight times the rounded quotient (Llama), 1 one plus weight, in float32 (Gemma),
            2 weight in float32 (OLMo 2, gpt-oss).
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight is None:
        return wide.to(x.dtype)
    if variant == 0:
        return weight * wide.to(x.dtype)
    return (wide * (weight.float() + (variant == 1))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer normalisation of the last axis (Ba et al. 2016)."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)` where `up` is `None` (Shazeer 2020).

    Args:
        gate: `[..., width]`.
        up: `[..., width]`, or `None`.
        kind: `"silu"`, `"gelu_tanh"`, `"gelu"`, `"relu"` or `"relu2"`.
    """
    functional = torch.nn.functional
    act = {
        "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu": functional.gelu,
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }[kind](gate)
    return act if up is None else act * up


def rotary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    interleaved: bool = False,
) -> None:
    """Turn queries and keys by their positions, in place (Su et al. 2021, eq. 34), and store keys and values.

    Args:
        query: `[tokens, heads, key_dim]`, changed.
        key: `[tokens, kv_heads, key_dim]`, changed.
        value: `[tokens, kv_heads, value_dim]`.
        cosine: `[tokens, rotated]`, `rotated <= key_dim`, or `None` for no rotation.
        sine: Like `cosine`.
        slots: Where each token goes, int64 `[tokens]`.
        keys: `[slots, kv_heads, key_dim]`, changed.
        values: `[slots, kv_heads, value_dim]`, changed.
        interleaved: Pairs are neighbours (2i, 2i + 1) instead of halves (i, i + rotated / 2).
    """
    if cosine is not None and sine is not None:
        for x in (query, key):
            part = x[..., : cosine.shape[-1]]
            if interleaved:
                turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
            else:
                low, high = part.chunk(2, dim=-1)
                turned = torch.cat([-high, low], dim=-1)
            part.copy_(part * cosine[:, None] + turned * sine[:, None])
    keys[slots], values[slots] = key, value
