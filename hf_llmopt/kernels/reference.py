"""Plain-torch definitions of every kernel: slow, short, and what "correct" means.

A faster kernel has the same signature as its twin here and is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Grid, Norm, PageFormat, Product, Seen, Stage, Turns


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


def hadamard(x: Tensor) -> Tensor:
    """The last axis times a Hadamard matrix over the square root of its size (Sylvester's construction).

    The matrix is its own inverse. Where the axis is no power of two long, blocks of the largest one that divides it are
    multiplied.

    Example:
        >>> import torch
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    width = x.shape[-1] & -x.shape[-1]
    y, step = x.float().reshape(-1, width), 1
    while step < width:
        low, high = y.view(-1, width // (2 * step), 2, step).unbind(2)
        y, step = torch.stack([low + high, low - high], dim=2).view(-1, width), 2 * step
    return (y * width**-0.5).reshape(x.shape).to(x.dtype)


def pack_rows(x: Tensor, form: PageFormat, rotates: bool = False) -> Tensor:
    """What quantized pages hold of keys or values.

    Args:
        x: `[tokens, kv_heads, width]`; the width is even with 4 bits.
        form: See `PageFormat`.
        rotates: Multiply by a Hadamard matrix first.

    Returns:
        uint8 `[tokens, 1, bytes]`.
    """
    wide = hadamard(x.float()) if rotates else x.float()
    if form.bits == 4:
        low = -_rounded_up(-wide.amin(-1, keepdim=True))
        scale = _rounded_up((wide.amax(-1, keepdim=True) - low) / 15)
        codes = torch.nan_to_num(((wide - low) / scale).round()).clamp(0, 15).to(torch.uint8)
        first, second = codes.chunk(2, dim=-1)
        codes, parts = first | second << 4, torch.cat([scale, low], dim=-1)
    else:
        parts = scale = _rounded_up(wide.abs().amax(-1, keepdim=True) / (127 if form.name == "int8" else 448))
        codes = torch.nan_to_num(wide / scale)
        codes = codes.round().to(torch.int8) if form.name == "int8" else codes.to(torch.float8_e4m3fn)
    parts = parts.bfloat16().contiguous().view(torch.uint8)
    return torch.cat([codes.view(torch.uint8).flatten(1), parts.flatten(1)], dim=1)[:, None]


def _rounded_up(x: Tensor) -> Tensor:
    """To bfloat16 and back, away from zero where x is positive: codes then never exceed their range."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x > 0, bits + 0xFFFF, bits).bitwise_and(-0x10000).view(torch.float32)


def unpack_rows(
    rows: Tensor, form: PageFormat, kv_heads: int, width: int, dtype: torch.dtype, rotates: bool = False
) -> Tensor:
    """The keys or values of quantized rows.

    Args:
        rows: uint8 `[..., 1, bytes]`.
        form: See `PageFormat`.
        kv_heads: Heads of a row.
        width: Of a head.
        dtype: Of the result.
        rotates: They were multiplied by a Hadamard matrix.

    Returns:
        `[..., kv_heads, width]`.
    """
    size = kv_heads * width * form.bits // 8
    codes, parts = rows[..., 0, :size].contiguous(), rows[..., 0, size:].contiguous().view(torch.bfloat16).float()
    codes, parts = codes.unflatten(-1, (kv_heads, -1)), parts.unflatten(-1, (kv_heads, form.parts))
    if form.bits == 4:
        wide = torch.cat([codes & 15, codes >> 4], dim=-1) * parts[..., :1] + parts[..., 1:]
    else:
        wide = codes.view(torch.int8 if form.name == "int8" else torch.float8_e4m3fn).float() * parts
    return (hadamard(wide) if rotates else wide).to(dtype)


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


def dequantize(grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `[outputs, inputs]` that a grid stands for: computed in float32, rounded once.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels.arguments import Grid
        >>> dequantize(Grid(torch.tensor([[8, 9, 0, 15]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]])))
        tensor([[  0.0000,   0.5000, -16.0000,  14.0000]])
    """
    codes, scales, zeros, bits, index = grid
    if index is None:
        inputs, groups = codes.shape[1], scales.shape[1]
        index = torch.arange(inputs, device=codes.device) // (inputs // groups)
    index = index.long()
    offset = 0 if codes.is_floating_point() else 2 ** (bits - 1) if zeros is None else zeros.float()[:, index]
    return ((codes.float() - offset) * scales.float()[:, index]).to(dtype)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations as int8, a scale for each row and group of inputs: `x ~ codes * scales`, round half to even.

    Args:
        x: `[rows, inputs]`.
        group: Inputs that share a scale; divides `inputs`.

    Returns:
        int8 `[rows, inputs]` within -127 and 127, and float32 `[rows, inputs / group]`.
    """
    grouped = x.float().unflatten(-1, (-1, group))
    scales = grouped.abs().amax(-1).clamp_min(1e-9) / 127
    return torch.round(grouped / scales[..., None]).clamp(-127, 127).flatten(-2).to(torch.int8), scales


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as float8_e4m3fn, a scale for each row: `x ~ codes * scales`; 448 is the largest code.

    Args:
        x: `[rows, inputs]`.

    Returns:
        float8_e4m3fn `[rows, inputs]` and float32 `[rows, 1]`.
    """
    scales = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-9) / 448
    return (x.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def quantized_linear(
    x: Tensor, grid: Grid, bias: Tensor | None = None, residual: Tensor | None = None, group: int = 0
) -> Tensor:
    """`x @ w^T + bias`, rounded to x's dtype, plus `residual`, where a grid stands for w.

    Args:
        x: `[..., inputs]`.
        grid: The weight, `[outputs, inputs]`.
        bias: `[outputs]`, or `None`.
        residual: `[..., outputs]`, or `None`.
        group: Inputs whose activations share an int8 scale, in the order in which the grid's groups have them; 0 leaves
            activations as they are.
    """
    wide = x.float().flatten(0, -2)
    if group:
        sort = None if grid.index is None else grid.index.argsort(stable=True)
        codes, scales = quantize_rows(wide if sort is None else wide[:, sort], group)
        near = codes.float() * scales.repeat_interleave(group, -1)
        wide = near if sort is None else torch.empty_like(near).index_copy_(1, sort, near)
    y = torch.nn.functional.linear(wide, dequantize(grid), None if bias is None else bias.float())
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    return y if residual is None else y + residual


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias` with a weight kept as `[inputs, outputs]`, as GPT-2 does.

    Args:
        x: `[..., inputs]`.
        weight: `[inputs, outputs]`.
        bias: `[outputs]`, or `None`.
    """
    return torch.nn.functional.linear(x, weight.T, bias)


def norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm or RMSNorm of the last axis, `[..., width]`."""
    wide, weight = x.float(), None if norm.weight is None else norm.weight.float()
    if norm.centre:
        weight = weight + 1 if weight is not None and norm.variant == 1 else weight
        bias = None if norm.bias is None else norm.bias.float()
        return torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight, bias, norm.epsilon).to(x.dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    if weight is not None:
        wide = wide.to(x.dtype).float() * weight if norm.variant == 0 else wide * (weight + (norm.variant == 1))
    return wide.to(x.dtype)


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


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Queries or keys `[tokens, heads, width]` turned by their positions."""
    if turns.cosine is None or turns.sine is None:
        return x
    cosine, sine = turns.cosine[:, None], turns.sine[:, None]
    part, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    if turns.pairs == 2:
        cosine, sine = (t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in (cosine, sine))
    if turns.pairs:
        turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    else:
        low, high = part.chunk(2, dim=-1)
        turned = torch.cat([-high, low], dim=-1)
    return torch.cat([(part * cosine + turned * sine).to(x.dtype), rest], dim=-1)


def layer(x: Tensor, stage: Stage) -> Tensor:
    """A decoder layer on single tokens `[tokens, hidden]`, each over the pages of its own request.

    The tokens' keys and values are stored first: the queries see them too.
    """
    layer, seen, turns, heads = stage
    before, query_norm, key_norm, after, before_mlp, after_mlp = layer.norms
    query_product, key_product, value_product, output, gate, up, down = layer.products
    tokens, (kv_heads, key_dim, value_dim) = len(x), seen.shape

    def normed(x: Tensor, how: Norm | None) -> Tensor:
        return x if how is None else norm(x.reshape(*x.shape[:-1], -1, how.width), how).reshape(x.shape)

    def product(x: Tensor, of: Product) -> Tensor:
        quantized = isinstance(of.weight, Grid)
        y = quantized_linear(x, of.weight, of.bias, group=of.group) if quantized else linear(x, of.weight, of.bias)
        return y if of.factor == 1 else y * of.factor

    entry = normed(x, before)
    query = product(entry, query_product)
    if key_product is None or value_product is None:
        query, key, value = query.view(tokens, heads, -1).split([key_dim, key_dim, value_dim], dim=-1)
    else:
        key, value = product(entry, key_product), product(entry, value_product)
    query = rotate(normed(query.reshape(tokens, -1), query_norm).view(tokens, heads, key_dim), turns)
    key = rotate(normed(key.reshape(tokens, -1), key_norm).view(tokens, kv_heads, key_dim), turns)
    value = value.reshape(tokens, kv_heads, value_dim)
    if seen.form is not None:
        key, value = pack_rows(key, seen.form, seen.form.rotates), pack_rows(value, seen.form)
    seen.keys[turns.slots], seen.values[turns.slots] = key, value
    attended = normed(product(paged_attention(query, seen).reshape(tokens, -1), output), after)
    total = x + attended
    read = entry if layer.parallel == 2 else normed(x if layer.parallel else total, before_mlp)
    made = gated(product(read, gate), None if up is None else product(read, up), layer.kind)
    return total + normed(product(made, down), after_mlp)


def argmax(x: Tensor) -> Tensor:
    """The first of the largest elements of each row of `[rows, width]`, int64; -1 for a row that contains NaN."""
    return x.float().argmax(dim=-1).masked_fill(x.isnan().any(dim=-1), -1)
