"""Attention of plain forwards on a GPU, over dense keys: ours without a mask, against transformers' with one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from ..attention import NAME
from ..attention import plain as attention
from ..kernels import reference
from .measure import interleave
from .report import Table

OURS, STOCK = "llmopt", "stock"
ROUNDS, CALLS = 7, 5
CHOSEN = 64  # queries whose error is taken, at each of three places


class Case(NamedTuple):
    """Prompts of a kind.

    Attributes:
        name: Says it in a table.
        rows: Prompts.
        tokens: Of each, padding included.
        window: Of each token, or `None`.
        softcap: On the scores, or `None`.
        sinks: Whether a score without a value takes part.
        padded: Whether all rows but the last begin with padding.
    """

    name: str
    rows: int
    tokens: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    padded: bool = False


CASES = (
    Case("causal", 1, 8192),
    Case("window of 1,024", 1, 8192, window=1024),
    Case("padded rows", 4, 4096, padded=True),
    Case("softcap", 1, 4096, softcap=50.0),
    Case("sinks", 1, 4096, sinks=True),
)


class Layer(nn.Module):
    """What attention functions ask of their module."""

    def __init__(self, groups: int, sinks: Tensor | None) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True
        self.register_buffer("sinks", sinks)


def measure(case: Case, heads: tuple[int, int, int], generator: torch.Generator) -> dict[str, Any]:
    """Times and errors of a layer's attention, and what the masks take that a forward makes once.

    Args:
        case: The prompts.
        heads: Query heads, key heads, and their width.
        generator: Of the numbers, on the device.
    """
    count, kv_heads, width = heads
    device, dtype, (rows, tokens) = generator.device, torch.bfloat16, (case.rows, case.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    query, key, value = (normal(rows, tokens, n, width).transpose(1, 2) for n in (count, kv_heads, kv_heads))
    sinks = normal(count) if case.sinks else None
    real = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    for row in range(rows - 1 if case.padded else 0):
        real[row, : (rows - 1 - row) * tokens // rows] = False
    function = causal_mask_function if case.window is None else sliding_window_causal_mask_function(case.window)
    told: dict[str, Any] = {
        "batch_size": rows, "q_length": tokens, "kv_length": tokens, "mask_function": function,
        "attention_mask": real if case.padded else None, "local_size": case.window, "dtype": dtype, "device": device,
    }  # fmt: skip
    layer, scaling = Layer(count // kv_heads, sinks).eval(), width**-0.5
    seen, mask = attention.mask(**told), sdpa_mask(**told)
    square = (
        mask if mask is not None else torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]
    )
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attention.attention(layer, query, key, value, seen, scaling, 0.0, case.softcap, sinks)[0]
    }
    if case.softcap or case.sinks:  # transformers has no kernel for them, and its models write scores down
        mask = torch.zeros_like(square, dtype=dtype).masked_fill(~square, torch.finfo(dtype).min)
        options = {"softcap": case.softcap} if case.softcap else {}
        eager = (modeling_gpt_oss if case.sinks else modeling_gemma2).eager_attention_forward
        ways[STOCK] = lambda: eager(layer, query, key, value, mask, dropout=0.0, scaling=scaling, **options)[0]
    else:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ways[STOCK] = lambda: sdpa(layer, query, key, value, mask, dropout=0.0, scaling=scaling)[0]
    places = torch.cat([torch.arange(at, at + CHOSEN) for at in (tokens // 3, tokens // 2, tokens - CHOSEN)])
    index = places.to(device)
    parts = query[-1:, :, index].double(), key[-1:].double(), value[-1:].double()
    exact = reference.attention(
        *parts, square[-1:, :, index], scaling, case.softcap, None if sinks is None else sinks.double()
    ).transpose(1, 2)
    error = {name: float((way()[-1:, index].double() - exact).norm() / exact.norm()) for name, way in ways.items()}
    times = interleave({name: partial(_microseconds, way, device) for name, way in ways.items()}, ROUNDS)
    masks = {OURS: seen, STOCK: mask}
    return {
        **case._asdict(),
        "microseconds": times,
        "error": error,
        "mask_bytes": {name: 0 if found is None else found.nbytes for name, found in masks.items()},
    }


def _microseconds(way: Callable[[], Tensor], device: torch.device) -> float:
    start, end = (torch.Event(device.type, enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        way()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / CALLS


def failures(cases: list[dict[str, Any]]) -> list[str]:
    """Ours with a larger error than stock's, a line for each."""
    return [
        f"plain forward, {case['name']}: error {case['error'][OURS]:.2e}, stock's {case['error'][STOCK]:.2e}"
        for case in cases
        if case["error"][OURS] > 1.1 * case["error"][STOCK]
    ]


def table(cases: list[dict[str, Any]], caption: str) -> Table:
    """Times, errors and masks of all cases."""
    rows = []
    for case in cases:
        ours, theirs = (median(case["microseconds"][name]) for name in (OURS, STOCK))
        rows.append([case["name"], str(case["rows"]), f"{case['tokens']:,}", f"{theirs:.0f}", f"{ours:.0f}"])
        rows[-1] += [f"{theirs / ours:.2f}"]
        rows[-1] += [f"{1e3 * case['error'][name]:.2f}" for name in (STOCK, OURS)]
        rows[-1] += [f"{case['mask_bytes'][name] / 2**20:.1f}" for name in (STOCK, OURS)]
    columns = ["prompts", "rows", "tokens", "stock µs", "llmopt µs", "× stock", "stock's error", "llmopt's error"]
    columns += ["stock's mask MiB", "llmopt's"]
    return Table(f'Plain forwards, attn_implementation="{NAME}"', columns, rows, 1, caption)
