"""Products with weights of few bits: few rows, tiles of rows, and the weight itself for cuBLAS.

Weights are the left operand: they reach the tensor cores from registers, where they were decoded, and one row of
activations is read into registers too. Even one row is fastest on the tensor cores, whose other columns idle: without
them, the conversion to float32 and the additions alone take longer than the memory.

The twin of all is `reference.quantized_linear` (and `reference.dequantize`). Sums are float32; their order depends on
the configuration alone, so that the same product gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dependent import early, launch_next, ready
from .gated import activated, finished, part_of, put
from .layout import PLANES, WORDS, number, planes_of

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TOGETHER = 3  # weights of a launch, at most
INTERPRETED = not isinstance(number, triton.JITFunction)  # TRITON_INTERPRET=1: no assembly


class Packed(NamedTuple):
    """A weight in the layout of `layout.py`.

    Attributes:
        words: int32 `[outputs, blocks * 16]` or int8 `[outputs, inputs]`.
        scales: `[outputs, groups]`, any floating-point format.
        zeros: uint8 `[outputs, groups]`, or `None`.
        inputs: Of the product; rows of `words` may hold more.
        kind: `"int4"`, `"int8"` or `"float8"`.
        tile: What kernels must know of the layout, see `tile_of`.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    inputs: int
    kind: str
    tile: dict[str, int]


def tile_of(kind: str, inputs: int, groups: int) -> dict[str, int] | None:
    """Planes and words of a tile, the groups in it (`SETS`) or the tiles of a group (`TILES`).

    `None` if groups cross tiles.

    Example:
        >>> tile_of("int4", 4096, 64)
        {'PLANES': 8, 'WORDS': 16, 'SETS': 2, 'TILES': 1}
    """
    planes, words = (PLANES, WORDS) if kind == "int4" else (1, 128)
    group = inputs // groups
    if groups == 1:
        return {"PLANES": planes, "WORDS": words, "SETS": 1, "TILES": inputs}
    if kind != "int4":
        words = min(words, group & -group)  # the largest power of two that divides a group
    deep = words * planes
    if inputs % groups or group % 16 or (group % deep and deep % group):
        return None
    return {"PLANES": planes, "WORDS": words, "SETS": max(1, deep // group), "TILES": max(1, group // deep)}


@triton.jit
def _deep_product(
    x, words, scales, zeros, rows, token, M, K, W, G, TILES,
    KIND: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Outputs `rows` of tokens `token`, float32 `[BLOCK_N, BLOCK_M]`.

    `DEPTH` warps share the inputs of an output: few rows need many warps that read, and no second kernel.
    """
    EACH: tl.constexpr = PLANES // SETS
    rows = rows.to(tl.int64)[None, :]
    tokens = token[None, :, None]
    column = tl.arange(0, WORDS)[None, None, :]
    total = tl.zeros([DEPTH, BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(0, tl.cdiv(W, WORDS), DEPTH, num_stages=STAGES):
        tile = (first + tl.arange(0, DEPTH))[:, None]
        word = tile[:, :, None] * WORDS + column  # [DEPTH, 1, WORDS]
        if EVEN:
            packed = tl.load(words + rows[:, :, None] * W + word)
        else:
            packed = tl.load(words + rows[:, :, None] * W + word, mask=word < W, other=0)
        planes = planes_of(packed, KIND, DTYPE, ASSEMBLY)
        for s in tl.static_range(SETS):
            part = tl.zeros([DEPTH, BLOCK_N, BLOCK_M], tl.float32)
            at = rows * G + tl.minimum(tile // TILES * SETS + s, G - 1)
            if zeros is not None:
                zero = tl.load(zeros + at).to(tl.float32) - (8 if KIND == "int4" else 128)
            for p in tl.static_range(EACH):
                k = tile[:, :, None] * (WORDS * PLANES) + WORDS * (s * EACH + p) + column
                seen = tokens < M
                if not EVEN:
                    seen = seen & (k < K)
                near = tl.load(x + tokens * K + k, mask=seen, other=0.0).to(DTYPE)
                plane = planes[s * EACH + p]
                if zeros is not None:  # whole numbers below 257: exact
                    plane = plane - zero[:, :, None].to(DTYPE)
                part = tl.dot(plane, tl.trans(near, 0, 2, 1), part, input_precision="ieee")
            total += part * tl.load(scales + at).to(tl.float32)[:, :, None]
    return tl.sum(total, 0)


@triton.jit
def _deep(
    x, first, first_scales, first_zeros, first_bias, second, second_scales, second_zeros, second_bias,
    third, third_scales, third_zeros, third_bias, residual, out, factor, M, N0, N1, N2, K, W, G, TILES,
    ACTIVATION: tl.constexpr, KIND: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `few._few` does for dense weights."""
    launch_next(EARLY and BLOCK_M == 1)
    PARTS: tl.constexpr = 1 if ACTIVATION is not None or second is None else 2 if third is None else 3
    which, tile, outputs, column = part_of(tl.program_id(0), N0, N1, N2, PARTS, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = out.dtype.element_ty
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
    ready(EARLY)
    y = _deep_product(
        x, words, scales, zeros, rows, token, M, K, W, G, TILES, KIND, PLANES, WORDS, SETS, EVEN,
        BLOCK_M, BLOCK_N, DEPTH, STAGES, DTYPE, ASSEMBLY,
    )  # fmt: skip
    y = finished(y, bias, rows, factor, dtype)
    if ACTIVATION is not None:
        y = activated(y, ACTIVATION).to(dtype).to(tl.float32)
        if second is not None:
            up = _deep_product(
                x, second, second_scales, second_zeros, rows, token, M, K, W, G, TILES, KIND, PLANES, WORDS, SETS,
                EVEN, BLOCK_M, BLOCK_N, DEPTH, STAGES, DTYPE, ASSEMBLY,
            )  # fmt: skip
            y = y * finished(up, second_bias, rows, factor, dtype)
    launch_next(EARLY and BLOCK_M > 1)
    put(y, out, residual, token, output, M, outputs, width, column)


@triton.jit
def _tiles(
    x, words, scales, zeros, bias, out, M, N, K, W, G, TILES,
    KIND: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = PLANES // SETS
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(outputs, N - 1).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WORDS)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    tiles = tl.cdiv(W, WORDS)
    share = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(2) * share
    ready(EARLY)
    for tile in tl.range(first, tl.minimum(first + share, tiles), num_stages=STAGES):
        word = tile * WORDS + column
        if EVEN:
            packed = tl.load(words + rows[:, None] * W + word[None, :])
        else:
            packed = tl.load(words + rows[:, None] * W + word[None, :], mask=word[None, :] < W, other=0)
        planes = planes_of(packed, KIND, DTYPE, ASSEMBLY)
        for s in tl.static_range(SETS):
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            at = rows * G + tl.minimum(tile // TILES * SETS + s, G - 1)
            if zeros is not None:
                zero = tl.load(zeros + at).to(tl.float32) - (8 if KIND == "int4" else 128)
            for p in tl.static_range(EACH):
                k = tile * (WORDS * PLANES) + WORDS * (s * EACH + p) + column
                seen = tokens[:, None] < M
                if not EVEN:
                    seen = seen & (k[None, :] < K)
                near = tl.load(x + tokens[:, None] * K + k[None, :], mask=seen, other=0.0).to(DTYPE)
                plane = planes[s * EACH + p]
                if zeros is not None:  # whole numbers below 257: exact
                    plane = plane - zero[:, None].to(DTYPE)
                part = tl.dot(plane, tl.trans(near), part, input_precision="ieee")
            total += part * tl.load(scales + at).to(tl.float32)[:, None]
    launch_next(EARLY)
    if SPLIT == 1 and bias is not None:
        total += tl.load(bias + rows).to(tl.float32)[:, None]
    place = (tl.program_id(2) * M + tokens[None, :]).to(tl.int64) * N + outputs[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(tokens[None, :] < M) & (outputs[:, None] < N))


@triton.jit
def _sum(parts, bias, out, N, SIZE, SPLIT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Sums of the parts `[SPLIT, SIZE]`, first to last."""
    ready(EARLY)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * SIZE + place, mask=place < SIZE, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % N, mask=place < SIZE, other=0.0).to(tl.float32)
    launch_next(EARLY)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < SIZE)


@triton.jit
def _dequantize(
    words, scales, zeros, out, FIRST, LAST, K, W, G, TILES,
    KIND: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, SETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = PLANES // SETS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rows = tl.minimum(FIRST + row, LAST - 1).to(tl.int64)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    packed = tl.load(words + rows * W + word, mask=word < W, other=0)
    first = word // WORDS * (WORDS * PLANES) + word % WORDS
    for s in tl.static_range(SETS):
        at = rows * G + tl.minimum(word // WORDS // TILES * SETS + s, G - 1)
        scale = tl.load(scales + at).to(tl.float32)
        for p in tl.static_range(EACH):
            y = number(packed, s * EACH + p, KIND)
            if zeros is not None:
                y -= tl.load(zeros + at).to(tl.float32) - (8 if KIND == "int4" else 128)
            k = first + WORDS * (s * EACH + p)
            seen = (FIRST + row < LAST) & (k < K) & (word < W)
            tl.store(out + row.to(tl.int64) * K + k, (y * scale).to(out.dtype.element_ty), mask=seen)


def deep(
    x: Tensor,
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    tile: Sequence[int],
    kind: str | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Products of few rows beside one another, or gate and up with the activation between them.

    Args:
        x: `[rows, inputs]`.
        weights: Up to TOGETHER, alike but for their outputs.
        biases: Of each, `[outputs]`; all or none are `None`.
        tile: Rows and outputs of a tile; parts that a program's inputs are split into; stages of loading; warps of a
            program, at least as many as parts.
        kind: As for `few.few`.
        residual: `[rows, outputs]`, dense, or `None`.
        factor: On the products.

    Returns:
        `[rows, outputs of all]`, or those of one with an activation.
    """
    rows, outputs, depth, stages, warps = tile
    first, missing = weights[0], TOGETHER - len(weights)
    m, counts = len(x), [len(weight.words) for weight in weights]
    shown = counts[:1] if kind else counts
    out = x.new_empty(m, sum(shown))
    parts: list[Tensor | None] = []
    for weight, bias in zip(weights, biases, strict=True):
        parts += weight.words, weight.scales, weight.zeros, bias
    _deep[(sum(triton.cdiv(count, outputs) for count in shown), triton.cdiv(m, rows))](
        x, *parts, *[None] * (4 * missing), residual, out, None if factor == 1 else factor, m, *counts, *[0] * missing,
        first.inputs, first.words.shape[1], first.scales.shape[1], ACTIVATION=kind,
        BLOCK_M=rows, BLOCK_N=outputs, DEPTH=depth, STAGES=stages, num_warps=warps, **_constants(x, first, depth),
        **early(x.device),
    )  # fmt: skip
    return out


def _constants(x: Tensor, weight: Packed, depth: int = 1) -> dict[str, Any]:
    """What tensor-core kernels are compiled for; tiles that every program has in full need no masks."""
    words, planes = weight.tile["WORDS"], weight.tile["PLANES"]
    even = weight.words.shape[1] % (words * depth) == 0 and weight.inputs == weight.words.shape[1] * planes
    # The interpreter cannot multiply bfloat16, and knows no assembly.
    operands = FORMATS[torch.float32 if INTERPRETED else x.dtype]
    assembly = weight.kind == "int4" and x.dtype != torch.float32 and not INTERPRETED
    return {"KIND": weight.kind, "EVEN": even, "DTYPE": operands, "ASSEMBLY": assembly, **weight.tile}


def tiles(
    x: Tensor, weight: Packed, bias: Tensor | None, rows: int, outputs: int, split: int, stages: int, warps: int
) -> Tensor:
    """`x @ weight^T + bias` in tiles of `rows` times `outputs`, inputs split among `split` programs.

    Args:
        x: `[rows, inputs]`.
        weight: The weight.
        bias: `[outputs]`, or `None`.
        rows: Of a tile.
        outputs: Of a tile.
        split: Programs that share a tile's inputs; their sums are added in order by a second kernel.
        stages: Of loading.
        warps: Of a program.
    """
    m, (n, w) = len(x), weight.words.shape
    out = x.new_empty(m, n)
    parts = out if split == 1 else x.new_empty(split, m, n, dtype=torch.float32)
    _tiles[(triton.cdiv(n, outputs), triton.cdiv(m, rows), split)](
        x, weight.words, weight.scales, weight.zeros, bias, parts, m, n, weight.inputs, w, weight.scales.shape[1],
        BLOCK_M=rows, BLOCK_N=outputs, SPLIT=split, STAGES=stages, num_warps=warps, **_constants(x, weight),
        **early(x.device),
    )  # fmt: skip
    if split > 1:
        _sum[(triton.cdiv(m * n, 512),)](parts, bias, out, n, m * n, SPLIT=split, BLOCK=512, **early(x.device))
    return out


def dequantize(weight: Packed, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Rows `first` to `last` of the weight, `[last - first, inputs]`, the inputs in the layout's order."""
    n, w = weight.words.shape
    last = n if last is None else last
    out = torch.empty(last - first, weight.inputs, dtype=dtype, device=weight.words.device)
    wide = 64 if weight.kind == "int4" else 256
    _dequantize[(triton.cdiv(last - first, 16), triton.cdiv(w, wide))](
        weight.words, weight.scales, weight.zeros, out, first, last, weight.inputs, w, weight.scales.shape[1],
        KIND=weight.kind, BLOCK_N=16, BLOCK_W=wide, num_warps=4, **weight.tile,
    )  # fmt: skip
    return out
