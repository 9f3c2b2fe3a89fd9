"""Products of many rows with weights of few bits on Hopper's tensor cores, which read them decoded from registers.

Activations come through the tensor memory accelerator, codes through ordinary copies ahead of time. A warp group
decodes what it multiplies next while another one multiplies; so a program is small, and two share a processor. A scale
is applied where it is cheapest: to a whole sum where an output has one, to the sums of a group where few rows are
multiplied, else to the weights.

The twin is `reference.quantized_linear`, as for `int_linear`, whose `deep` this is for more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .dependent import early, launch_next, ready
from .gated import finished, gated, part_of, put
from .int_linear import FORMATS, INTERPRETED, TOGETHER, Packed
from .layout import BLOCK, planes_of

if TYPE_CHECKING:
    from torch import Tensor

JOINED = 512  # outputs of which a program adds the parts


def serves(x: Tensor, weight: Packed) -> bool:
    """Whether `wide` can multiply: 16 bits, whole tiles of 128 inputs, groups of 32 and more, and a Hopper GPU.

    Args:
        x: `[rows, inputs]`, dense.
        weight: The weight.
    """
    tile = weight.tile
    if weight.kind == "float8" or weight.inputs % BLOCK or tile["WORDS"] * tile["PLANES"] != BLOCK or tile["SETS"] > 4:
        return False
    if INTERPRETED:
        return True
    return x.is_cuda and x.element_size() == 2 and torch.cuda.get_device_capability(x.device)[0] == 9


@triton.jit
def _beside(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, 2 * COLUMNS]`; in the layout of a tensor core's operand no number changes its thread."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 2 * COLUMNS))


@triton.jit
def _scaled(x, scale, DTYPE: tl.constexpr):
    """Codes times their scale, rounded once as if the scale were exact: it has twice the digits of a format."""
    high = scale.to(DTYPE)
    low = (scale - high.to(tl.float32)).to(DTYPE)
    return tl.fma(x, tl.broadcast_to(high[:, None], x.shape), x * low[:, None])


@triton.jit
def _numbers(x, scales, zeros, at, SCALED: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """Codes less their zeros, maybe times their scales, which lie at `at`."""
    if zeros is not None:  # whole numbers below 257: exact
        x = x - (tl.load(zeros + at).to(tl.float32) - MIDDLE).to(DTYPE)[:, None]
    if SCALED:
        x = _scaled(x, tl.load(scales + at).to(tl.float32), DTYPE)
    return x


@triton.jit
def _pair(a, b, scales, zeros, at, ROWS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    """Two planes of one group beside one another."""
    a = _numbers(a, scales, zeros, at, SCALED, 8, DTYPE)
    b = _numbers(b, scales, zeros, at, SCALED, 8, DTYPE)
    return _beside(a, b, ROWS, 16)


@triton.jit
def _decoded(
    packed, scales, zeros, at, KIND: tl.constexpr, SETS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """128 inputs of weights `[ROWS, 128]`, whose first group lies at `at`."""
    p = planes_of(packed, KIND, DTYPE, ASSEMBLY and KIND == "int4")
    if KIND == "int4":
        a = _pair(p[0], p[1], scales, zeros, at, ROWS, SCALED, DTYPE)
        b = _pair(p[2], p[3], scales, zeros, at + SETS // 4, ROWS, SCALED, DTYPE)
        c = _pair(p[4], p[5], scales, zeros, at + SETS // 2, ROWS, SCALED, DTYPE)
        d = _pair(p[6], p[7], scales, zeros, at + SETS // 2 + SETS // 4, ROWS, SCALED, DTYPE)
        return _beside(_beside(a, b, ROWS, 32), _beside(c, d, ROWS, 32), ROWS, 64)
    else:
        return _numbers(p[0], scales, zeros, at, SCALED, 128, DTYPE)


@triton.jit(do_not_specialize=["M", "SHARE"])
def _wide(
    x, first, first_scales, first_zeros, first_bias, second, second_scales, second_zeros, second_bias,
    third, third_scales, third_zeros, third_bias, residual, out, factor, M, N0, N1, N2, W, G, SHARE, TILES,
    KIND: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
    DIRECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of outputs and tokens, or with several programs for a tile, parts `[programs, M, outputs of all]`."""
    PARTS: tl.constexpr = 1 if second is None else 2 if third is None else 3
    which, tile, outputs, column = part_of(tl.program_id(1), N0, N1, N2, PARTS, BLOCK_N)
    words = first
    scales = first_scales
    zeros = first_zeros
    bias = first_bias
    width = N0
    if PARTS > 1:
        width = N0 + N1 + N2
        if which == 1:
            words = second
            scales = second_scales
            zeros = second_zeros
            bias = second_bias
    if PARTS > 2:  # noqa: SIM102 - what is not there is not compiled
        if which == 2:
            words = third
            scales = third_scales
            zeros = third_zeros
            bias = third_bias
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(output, outputs - 1)
    start = tl.program_id(0) * BLOCK_M
    place = words + rows.to(tl.int64)[:, None] * W + tl.arange(0, WORDS)[None, :]
    groups = rows * G
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin = tl.program_id(2) * SHARE
    end = tl.minimum(begin + SHARE, W // WORDS)
    ready(EARLY)
    for block in tl.range(begin, end, num_stages=STAGES):
        at = groups + block // TILES * SETS
        if not SCALED and not WHOLE:
            scale = tl.load(scales + at).to(tl.float32)
        packed = tl.load(place + block * WORDS)
        near = x.load([start, block * 128]).to(DTYPE)
        weight = _decoded(packed, scales, zeros, at, KIND, SETS, BLOCK_N, SCALED, DTYPE, ASSEMBLY)
        if SCALED or WHOLE:
            total = tl.dot(weight, near.T, total, input_precision="ieee")
            if ASSEMBLY:
                # No instruction, but a use: the compiler waits for the product before it decodes into registers that
                # the tensor cores still read, which Triton 3.6 got wrong, and ptxas else prevents product by product.
                total = tl.inline_asm_elementwise("", "=r,0", [total], dtype=tl.float32, is_pure=True, pack=1)
        else:
            total += tl.dot(weight, near.T, input_precision="ieee") * scale[:, None]
    launch_next(EARLY)
    if WHOLE:
        total *= tl.load(scales + groups).to(tl.float32)[:, None]
    token = start + tl.arange(0, BLOCK_M)
    if DIRECT:
        total = finished(total, bias, rows, factor, out.dtype.element_ty)
        put(total, out, residual, token, output, M, outputs, width, column)
    else:
        out += tl.program_id(2).to(tl.int64) * M * width
        put(total, out, None, token, output, M, outputs, width, column)


@triton.jit(do_not_specialize=["M"])
def _join(
    parts, first_bias, second_bias, third_bias, residual, out, factor, M, N0, N1, N2,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums of the parts `[SPLIT, M, outputs of all]`, first to last, and what follows a product."""
    which, tile, outputs, column = part_of(tl.program_id(0), N0, N1, N2, PARTS, BLOCK_N)
    width = N0 + N1 + N2
    bias = first_bias
    if PARTS > 1:  # noqa: SIM102 - what is not there is not compiled
        if which == 1:
            bias = second_bias
    if PARTS > 2:  # noqa: SIM102
        if which == 2:
            bias = third_bias
    token = tl.program_id(1) + tl.arange(0, 1)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(output, outputs - 1)
    place = parts + token.to(tl.int64)[None, :] * width + column + rows[:, None]
    ready(EARLY)
    y = tl.zeros([BLOCK_N, 1], tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(place + part * M.to(tl.int64) * width)
    launch_next(EARLY)
    put(finished(y, bias, rows, factor, out.dtype.element_ty), out, residual, token, output, M, outputs, width, column)


def wide(
    x: Tensor,
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    tile: Sequence[int],
    kind: str | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Products of many rows beside one another, or gate and up with the activation behind them.

    Args:
        x: `[rows, inputs]`, dense; `serves` says which.
        weights: Up to TOGETHER, alike but for their outputs.
        biases: Of each, `[outputs]`; all or none are `None`.
        tile: Rows and outputs of a tile; programs that share a tile's inputs, whose sums a second kernel adds in order;
            stages of loading; warps of a program; whether weights are scaled before they are multiplied.
        kind: As for `few.few`.
        residual: `[rows, outputs]`, dense, or `None`.
        factor: On the products.

    Returns:
        `[rows, outputs of all]`, or those of one with an activation.
    """
    rows, outputs, split, stages, warps, scaled = tile
    x = x if x.data_ptr() % 16 == 0 else x.clone()  # as the accelerator wants it
    first, missing = weights[0], TOGETHER - len(weights)
    m, counts, blocks = len(x), [len(weight.words) for weight in weights], first.inputs // BLOCK
    out = x.new_empty(m, sum(counts))
    parts = out if split == 1 else x.new_empty(split, m, sum(counts), dtype=torch.float32)
    tensors: list[Tensor | None] = []
    for weight, bias in zip(weights, biases, strict=True):
        tensors += weight.words, weight.scales, weight.zeros, bias
    groups, words, factors = first.scales.shape[1], first.tile["WORDS"], None if factor == 1 else factor
    beside = [*counts, *[0] * missing]
    _wide[(triton.cdiv(m, rows), sum(triton.cdiv(count, outputs) for count in counts), split)](
        TensorDescriptor.from_tensor(x, [rows, BLOCK]), *tensors, *[None] * (4 * missing), residual, parts, factors,
        m, *beside, first.words.shape[1], groups, triton.cdiv(blocks, split), first.tile["TILES"],
        KIND=first.kind, WORDS=words, SETS=first.tile["SETS"], SCALED=groups > 1 and bool(scaled), WHOLE=groups == 1,
        DIRECT=split == 1, BLOCK_M=rows, BLOCK_N=outputs, STAGES=stages, num_warps=warps,
        DTYPE=FORMATS[torch.float32 if INTERPRETED else x.dtype], ASSEMBLY=not INTERPRETED,
        maxnreg=128 if warps == 8 else None, **early(x.device),
    )  # fmt: skip
    if split > 1:
        _join[(sum(triton.cdiv(count, JOINED) for count in counts), m)](
            parts, *biases, *[None] * missing, residual, out, factors, m, *beside, PARTS=len(weights), SPLIT=split,
            BLOCK_N=JOINED, **early(x.device),
        )  # fmt: skip
    if kind is None:
        return out
    gate, *up = out.split(counts, dim=1)
    return gated(gate, up[0] if up else None, kind)
