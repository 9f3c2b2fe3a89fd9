"""Attention of whole prompts over their own keys, all in one call, by kernels that others have installed.

They take part in the race of a kind of pass (`gpu.fastest_paged`). torch's `varlen_attn` and the package flash-attn
read packed spans; what they cannot say exactly (pages, windows that are passed, trees, softcaps, sinks, widths of
values that are not those of keys) they are not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import Call, StepInputs

PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}
WIDEST = 256  # head


class Packed(NamedTuple):
    """Prompts behind one another.

    Attributes:
        query: `[tokens, heads, width]`.
        key: `[tokens, kv_heads, width]`.
        value: Likewise.
        bounds: Where prompts begin, and the end, int32 `[prompts + 1]` on the device.
        longest: Tokens of the longest.
        scaling: Factor on the dot products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bounds: Tensor
    longest: int
    scaling: float


@cache
def installed() -> dict[str, Callable[[Packed], Tensor]]:
    """The kernels, by name; those that do not import, or do not take what is needed, are left out."""
    found: dict[str, Callable[[Packed], Tensor]] = {}
    varlen = _function("torch.nn.attention.varlen", "varlen_attn")
    if varlen is not None and {"scale", "window_size", "enable_gqa"} <= signature(varlen).parameters.keys():
        found["varlen"] = partial(_torchs, varlen)
    for name, module in PACKAGES.items():
        function = _function(module, "flash_attn_varlen_func")
        if function is not None:
            found[name] = partial(_package, function)
    return found


def _function(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, OSError):  # built for another torch, or for none
        return None


def _torchs(function: Any, packed: Packed) -> Tensor:
    """Causal is a window that ends at the query."""
    query, key, value, bounds, longest, scaling = packed
    found: Tensor = function(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
    )
    return found


def _package(function: Any, packed: Packed) -> Tensor:
    query, key, value, bounds, longest, scaling = packed
    found = function(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scaling, causal=True,
    )  # fmt: skip
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


def entrants(step: StepInputs, call: Call, spans: range) -> dict[str, Callable[[], Tensor]]:
    """What can compute these spans, by name; each gives `[1, tokens, heads, width]`.

    Args:
        step: The pass.
        call: The layer's attention, plain.
        spans: Neighbouring ones.
    """
    if not installed() or not _are_prompts(step, call, spans):
        return {}
    chosen = step.spans[spans.start : spans.stop]
    tokens = slice(chosen[0].offset, chosen[-1].offset + chosen[-1].length)
    query, key, value = (part[0, :, tokens].transpose(0, 1) for part in (call.query, call.key, call.value))
    longest = max(span.length for span in chosen)
    packed = Packed(query, key, value, step.bounds(spans, query.device), longest, call.scaling)

    def compute(name: str, kernel: Callable[[Packed], Tensor]) -> Tensor:
        step.note(f"prefill-{name}")
        return kernel(packed)[None]

    return {name: partial(compute, name, kernel) for name, kernel in installed().items()}


def _are_prompts(step: StepInputs, call: Call, spans: range) -> bool:
    """Whether spans see all of their own tokens and no others, as the model made them."""
    spec, group = step.store.layers[call.layer], step.group(call.layer)
    width, index = call.query.shape[3], step.store.group_of[call.layer]
    if spec.form is not None or call.query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if call.value.shape[3] != width or width % 8 or width > WIDEST:
        return False
    chosen = step.spans[spans.start : spans.stop]
    whole = all(span.end(index) == span.length and group.first_visible(span.length - 1) == 0 for span in chosen)
    return whole and not any(span.branches for span in chosen)
