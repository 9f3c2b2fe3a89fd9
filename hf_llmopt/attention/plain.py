"""Plain forwards, `model(input_ids)`, of a model whose user chose `attn_implementation="llmopt"`.

Prompts are computed by a kernel for long spans where that wins, on the keys and values that the model hands over. On a
CPU it is the one in C. On a GPU it is one in Triton: always where torch would need a mask, by which it loses its fast
kernels, or would write the scores down (softcaps, sinks); else whichever of the two was faster when such shapes were
first met. Everything else, training above all, takes torch's attention: it has gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import cpu, reference
from ..kernels.arguments import Seen
from ..kernels.race import best_seconds
from . import gpu
from .strided import attention as strided
from .strided import items

# Measured on 2 cores of an AMD EPYC with AVX-512, all formats and shapes of heads: from here on no shape is slower than
# in torch, and few are below.
LONG = 128
LONGEST = 1024  # that the kernel is tried with on a CPU


def mask(**arguments: Any) -> Tensor | None:
    """What `attention` is to know of a pass: `None` for causality alone, `limits`, or a mask for torch.

    Args:
        arguments: Those of transformers' mask functions.
    """
    found = limits(**arguments)
    return sdpa_mask(**arguments) if found is None else found


def limits(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """What every token sees, in numbers instead of a mask; the arguments are those of transformers' mask functions.

    Windows, chunks and padding on either side can be said so. A padded token sees itself where that leaves nothing.

    Returns:
        Row, first visible token and end of the visible ones, int32 `[batch, 1, tokens, 3]`; `None` where causality says
        it all, where a first and an end cannot say it, and where no kernel would be used.
    """
    device = torch.device(device)
    if torch.is_grad_enabled() or _kernel(q_length, dtype, device) is None:
        return None
    if not allow_is_causal_skip or use_vmap:  # a mask of another kind than those below
        return None
    if isinstance(q_offset, Tensor) or (q_offset, kv_offset, kv_length) != (0, 0, q_length):
        return None
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (local_size is None or q_length < local_size):
        return None
    token = torch.arange(q_length, device=device)
    first, end = torch.zeros_like(token)[None], (token + 1)[None]
    if local_size is not None:
        kinds = (token - local_size + 1).clamp(min=0), token // local_size * local_size  # sliding, chunked
        rows = torch.arange(batch_size, device=device)[:, None]
        begins = next((kind for kind in kinds if _begins(mask_function, rows, token, kind)), None)
        if begins is None:  # chunks that count from a row's own beginning
            return None
        first = begins[None]
    if padded:
        assert attention_mask is not None
        real = attention_mask.bool()
        if real.shape[1] != q_length:
            return None
        start, count = real.int().argmax(1, keepdim=True), real.sum(1, keepdim=True)
        if not torch.equal(real, (token >= start) & (token < start + count)):
            return None
        first, end = first.maximum(start), end.minimum(start + count)
        some = first < end
        first, end = first.where(some, token), end.where(some, token + 1)
    return items(batch_size, first, end)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention on dense keys; arguments and result are those of transformers' attention functions."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    limited = attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 3
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **kwargs}
    theirs = partial(ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, **options)
    plain = softcap is None and s_aux is None
    if (
        (limited or (attention_mask is None and is_causal and query.shape[2] == key.shape[2]))
        and not (module.training or dropout or (torch.is_grad_enabled() and _learns(query, key, value, s_aux)))
        and query.dtype == key.dtype == value.dtype
        and position_bias is None
        and (kernel := _kernel(query.shape[2], query.dtype, query.device, max(query.shape[3], value.shape[3])))
    ):
        ours = partial(kernel, query, key, value, attention_mask, scaling, softcap, s_aux)
        if kernel is not strided or limited or not plain or _faster(ours, partial(theirs, None), query, value):
            return ours(), None
    if limited:
        assert attention_mask is not None
        index = torch.arange(key.shape[2], device=key.device)
        attention_mask = (index >= attention_mask[..., 1:2]) & (index < attention_mask[..., 2:])
    if plain:
        output: tuple[Tensor, None] = theirs(attention_mask)
        return output
    named = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux, **kwargs}
    named = {name: given for name, given in named.items() if given is not None}
    return _written_down(module, query, key, value, attention_mask, is_causal, named)


def _written_down(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    named: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention with a softcap or sinks, which torch has no kernel for: the model's own, which writes scores down.

    What it adds to them is finite, so that a token that sees nothing, padding, has no NaN.
    """
    if mask is None and is_causal:
        index = torch.arange(key.shape[2], device=query.device)
        mask = reference.visible(index[-query.shape[2] :], index, "full", 0)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **named)[0], None


def _begins(mask_function: Callable[..., Tensor], rows: Tensor, token: Tensor, first: Tensor) -> bool:
    """Whether the first key that each token of these rows of the batch sees is this."""
    head = token.new_zeros(())
    before = mask_function(rows, head, token, first - 1) & (first > 0)
    return bool(mask_function(rows, head, token, first).all()) and not bool(before.any())


def _learns(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _kernel(tokens: int, dtype: torch.dtype, device: torch.device, widest: int = 0) -> Callable[..., Tensor] | None:
    """What computes prompts of this length here, if it is not slower than torch.

    Args:
        tokens: Of a row.
        dtype: Of queries, keys and values.
        device: Where they lie.
        widest: Head.
    """
    if tokens < LONG or dtype not in cpu.DTYPES:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None  # they read addresses
    if device.type == "cpu":
        if widest > cpu.MAX_DIM or not cpu.available():
            return None
        length = 1 << min(tokens, LONGEST).bit_length() - 1
        return _ours if _wins(dtype, length, torch.get_num_threads(), cpu.used()) else None
    if widest > gpu.WIDEST or not _has_triton(device) or torch.cuda.is_current_stream_capturing():
        return None
    return strided


@cache
def _has_triton(device: torch.device) -> bool:
    return gpu.why_not(device) is None


def _faster(ours: Callable[[], Any], theirs: Callable[[], Any], query: Tensor, value: Tensor) -> bool:
    """Whether ours was faster on this kind of GPU when shapes like these were first met: counts are rounded up."""
    from ..kernels.triton import tuning

    (rows, heads, tokens, width), (_, kv_heads, _, value_width) = query.shape, value.shape
    counts = " ".join(str(1 << (count - 1).bit_length()) for count in (rows, tokens))
    key = f"plain {query.dtype} heads {heads}/{kv_heads} {width}/{value_width} rows, tokens {counts}"
    return tuning.raced(key, {"sdpa": theirs, "triton": ours}, query.device) == "triton"


@cache
def _wins(dtype: torch.dtype, tokens: int, threads: int, level: str) -> bool:
    """Whether the kernel is faster than torch's: measured once, for that depends on the instructions that there are."""
    query = torch.ones(1, 8, tokens, 64, dtype=dtype, device="cpu")  # no draw: the user's seed must not notice
    ours = partial(_ours, query, query, query, None, 1.0, None, None)
    first, second = best_seconds([ours, partial(scaled_dot_product_attention, query, query, query, is_causal=True)])
    return first <= second


def _ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The C kernel, as `strided.attention`: a row of the batch is a request whose tokens are one page.

    Keys and values are copied where heads lie apart, which costs a hundredth of the rest.
    """
    batch, _, tokens, _ = query.shape
    keys, values = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in (key, value))
    queries = query.transpose(1, 2).flatten(0, 1)
    queries = queries if queries.stride(2) == 1 else queries.contiguous()
    rows = torch.arange(batch, dtype=torch.int32, device="cpu")
    if seen is None:
        token = torch.arange(tokens, device="cpu")[None]
        seen = items(batch, torch.zeros_like(token), token + 1)
    pages = Seen(keys, values, rows[:, None], seen, tokens, tokens, scaling, softcap, sinks)
    return cpu.attention(queries, pages).unflatten(0, (batch, tokens))
