"""A quantized weight on an NVIDIA GPU: the layout of `layout.py`, and for each number of rows the fastest way."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ..arguments import Grid
from . import fp8, int_linear
from . import wide as many
from .int_linear import Packed, tile_of
from .layout import BLOCK, pack_nibbles, unpack_nibbles
from .tuning import Way, fastest, on

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**27  # weights that are decoded at a time
MOST_ROWS = 2048  # of which times are measured
MANY = 8192  # outputs of a launch from which on tiles of 128 columns are faster
SPLITS = (1, 2, 4, 8, 16)
WARPS = 132 * 16  # of a product that is split further: 16 for each of an H100's processors
# Configurations of `deep`, `wide` and `tiles` (without the split) by number of rows: each is the fastest somewhere.
DEEP = {
    1: (
        (1, 16, 8, 3, 8),
        (1, 16, 16, 3, 16),
        (1, 32, 8, 3, 8),
        (1, 32, 2, 5, 2),
        (1, 64, 2, 4, 2),
        (1, 32, 4, 3, 4),
        (1, 16, 4, 5, 4),
    ),
    8: ((8, 64, 4, 3, 4), (8, 64, 2, 3, 2), (8, 32, 4, 3, 4), (8, 16, 8, 3, 8)),
    16: ((16, 32, 4, 3, 4), (16, 128, 2, 3, 2)),
}
WIDE = {
    32: ((32, 64, 4, 4, 0),),
    64: ((64, 64, 4, 4, 0), (64, 128, 4, 8, 0)),
    128: ((128, 64, 3, 4, 1), (128, 128, 3, 8, 1)),
    256: ((128, 64, 3, 4, 0), (128, 128, 3, 8, 1)),
    512: ((128, 64, 3, 4, 0), (128, 64, 3, 4, 1), (128, 128, 3, 8, 1)),
    1024: ((128, 128, 3, 8, 1),),
}
TILES = {
    8: ((16, 128, 3, 4),),
    16: ((16, 128, 3, 4),),
    32: ((32, 128, 3, 4),),
    64: ((64, 128, 3, 4), (64, 128, 3, 8)),
    128: ((128, 128, 3, 8), (64, 128, 3, 8)),
    256: ((128, 128, 3, 8),),
}


class TritonWeight:
    """Weights of 2 to 8 bits, and float8_e4m3fn; the kernels' part of a quantized linear module.

    Args:
        tensors: `words`, `scales`, and where there are any `zeros` and `order`, the inputs group by group.
        inputs: Of the product.
        bits: Of a code of the grid.
        kind: `"int4"`, `"int8"` or `"float8"`.
        tile: See `tile_of`.

    Attributes:
        share: Inputs that share a scale where activations are rounded; 0 where they never are.
    """

    def __init__(self, tensors: dict[str, Tensor], inputs: int, bits: int, kind: str, tile: dict[str, int]) -> None:
        self.tensors = tensors
        self.inputs, self.bits, self.kind, self.tile = inputs, bits, kind, tile
        self.share = inputs if kind == "float8" else 0
        self.ways: dict[tuple[int, torch.dtype, bool], Way] = {}

    @classmethod
    def pack(cls, grid: Grid) -> TritonWeight | None:
        """The weight in this layout.

        Args:
            grid: The weight. Groups of 16, 32, 64, a multiple of 128 (8 bits: of 16), or whole rows.

        Returns:
            `None` for other groups, and for an order of inputs with groups of unequal size.
        """
        codes, scales, zeros, bits, index = grid
        inputs, groups = codes.shape[1], scales.shape[1]
        kind = "float8" if codes.is_floating_point() else "int8" if bits > 4 else "int4"
        tile = tile_of(kind, inputs, groups)
        order = None if index is None else index.argsort(stable=True)
        if tile is None or (kind == "float8" and (codes.dtype != torch.float8_e4m3fn or zeros is not None)):
            return None
        if index is not None and order is not None:
            regular = torch.arange(inputs, device=index.device) // (inputs // groups)
            if torch.equal(index, regular.to(index.dtype)):
                order = None
            elif not torch.equal(index[order], regular.to(index.dtype)):
                return None
        if order is not None:
            codes = codes.view(torch.uint8)[:, order].view(codes.dtype)
        middle = 0 if zeros is not None else 2 ** (bits - 1)  # kernels subtract 8 or 128
        if kind == "float8":
            words, scales = codes.view(torch.int8).clone(), scales.float()
        elif kind == "int8":
            words = ((codes + (128 - middle if middle else 0)) ^ 128).view(torch.int8)
        else:
            words = pack_nibbles(codes + (8 - middle if middle else 0))
        tensors = {"words": words, "scales": scales.clone(memory_format=torch.contiguous_format)}
        if zeros is not None:
            tensors["zeros"] = zeros.clone(memory_format=torch.contiguous_format)
        if order is not None:
            tensors["order"] = order
        return cls(tensors, inputs, bits, kind, tile)

    def unpack(self) -> Grid:
        """The grid, bit for bit; an `index` of groups that follow one another is left out."""
        words, scales, zeros, _, _, _ = self.packed()
        order = self.tensors.get("order")
        middle = 2 ** (self.bits - 1)
        if self.kind == "float8":
            codes = words
        elif self.kind == "int8":
            codes = (words.view(torch.uint8) ^ 128) - (128 - middle if zeros is None else 0)
        else:
            codes = unpack_nibbles(words, self.inputs) - (8 - middle if zeros is None else 0)
        index = None
        if order is not None:
            index = torch.empty(self.inputs, dtype=torch.int32, device=order.device)
            groups = torch.arange(self.inputs, device=order.device) // (self.inputs // scales.shape[1])
            index[order] = groups.int()
            codes = torch.empty_like(codes).index_copy_(1, order, codes)
        codes = codes.view(torch.float8_e4m3fn) if self.kind == "float8" else codes
        return Grid(codes.clone() if codes is words else codes, scales, zeros, self.bits, index)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[outputs, inputs]`."""
        with on(self.tensors["words"].device):
            weight = int_linear.dequantize(self.packed(), dtype)
        order = self.tensors.get("order")
        return weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)

    def rows(self, start: int, stop: int) -> TritonWeight:
        """The outputs `[start, stop)`, which share memory with the whole."""
        part = {name: tensor if name == "order" else tensor[start:stop] for name, tensor in self.tensors.items()}
        return TritonWeight(part, self.inputs, self.bits, self.kind, self.tile)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return len(self.tensors["words"]), self.inputs

    @property
    def form(self) -> str:
        """What weights have in common that one kernel multiplies with in one launch, in words."""
        zeros = " zeros" if "zeros" in self.tensors else ""
        scales = self.tensors["scales"]
        return f"{self.kind}{zeros} {scales.dtype} {scales.shape[1]} groups"

    def packed(self) -> Packed:
        """What kernels read."""
        held = self.tensors
        return Packed(held["words"], held["scales"], held.get("zeros"), self.inputs, self.kind, self.tile)

    def product(self, x: Tensor, bias: Tensor | None = None, *, activations: bool = True) -> Tensor:
        """`x @ weight^T + bias` in the way that is fastest on this device.

        The first product of a number of rows (1, or up to the next power of two from 16 on) measures; nothing waits for
        the device afterwards, and a CUDA graph may be captured. A graph that is captured before uses a default.

        Args:
            x: `[..., inputs]`, float32, float16 or bfloat16.
            bias: `[outputs]`, or `None`.
            activations: A float8 weight may round activations to float8 too.

        Returns:
            `[..., outputs]`.
        """
        rows = x.reshape(-1, self.inputs).contiguous()
        weight = self.packed()
        if len(rows) == 0:
            return x.new_zeros(*x.shape[:-1], len(weight.words))
        order = self.tensors.get("order")
        with on(x.device):
            rows = rows if order is None else rows.index_select(1, order)
            way = self._way(rows, weight, bias, activations)
            return compute(way, rows, weight, bias).view(*x.shape[:-1], -1)

    def _way(self, x: Tensor, weight: Packed, bias: Tensor | None, activations: bool) -> Way:
        bucket = bucket_of(len(x))
        way = self.ways.get((bucket, x.dtype, activations))
        if way is not None:
            return way
        ways = ways_of(bucket, x, weight, activations)
        if not x.is_cuda:  # Triton's interpreter has no clock
            return ways[0]
        key = f"{self.form} {self.shape[0]}x{self.inputs} {x.dtype} {bucket}{' activations' if activations else ''}"
        found = fastest(key, ways, lambda way: compute(way, x, weight, bias), x.device)
        if found is None:
            return ways[0]
        return self.ways.setdefault((bucket, x.dtype, activations), found)


def bucket_of(rows: int) -> int:
    """Numbers of rows that share a way are named after the largest.

    Example:
        >>> [bucket_of(rows) for rows in (1, 2, 16, 17, 100, 5000)]
        [1, 8, 16, 32, 128, 2048]
    """
    return 1 if rows == 1 else min(MOST_ROWS, max(8, 1 << (rows - 1).bit_length()))


def ways_of(bucket: int, x: Tensor, weight: Packed, activations: bool) -> list[Way]:
    """What is worth measuring; the first serves where nothing can be measured."""
    ways = [Way("deep", configuration) for configuration in DEEP.get(bucket, ())]
    wide = wide_ways(bucket, len(weight.words), x, weight)
    for rows, columns, stages, warps in () if wide else TILES.get(bucket, TILES[256] if bucket > 256 else ()):
        splits = splits_of(-(-len(weight.words) // columns) * -(-bucket // rows) * warps, SPLITS[-1])
        ways += [Way("tiles", (rows, columns, split, stages, warps)) for split in splits]
    ways += wide
    if bucket >= 64:
        ways.append(Way("dequantize"))
    if activations and fp8.serves(x, weight):
        ways.insert(0, Way("scaled"))
    return ways


def wide_ways(bucket: int, outputs: int, x: Tensor, weight: Packed) -> tuple[Way, ...]:
    """Ways of `wide` that are worth measuring; none where it does not serve.

    Args:
        bucket: Of rows.
        outputs: Of all weights that are multiplied in one launch.
        x: `[rows, inputs]`.
        weight: One of the weights, which are alike.
    """
    if bucket <= 16 or not many.serves(x, weight):
        return ()
    groups, sets = weight.scales.shape[1], weight.tile["SETS"]
    return _wide_ways(weight.kind, bucket, outputs, weight.inputs // BLOCK, groups, sets)


@cache
def _wide_ways(kind: str, bucket: int, outputs: int, blocks: int, groups: int, sets: int) -> tuple[Way, ...]:
    ways: dict[Way, None] = {}
    configurations = WIDE[min(bucket, max(WIDE))]
    if bucket <= 256:  # each kernel takes seconds to compile, and those of the other width never won
        width = 128 if kind == "int4" and outputs >= MANY else 64
        configurations = tuple(each for each in configurations if each[1] == width) or configurations
    for rows, columns, stages, warps, scaled in configurations:
        # After the product; before it where groups share a tile.
        scaled = 0 if groups == 1 else 1 if sets > 1 else scaled
        for split in splits_of(-(-outputs // columns) * -(-bucket // rows) * warps, blocks):
            ways[Way("wide", (rows, columns, split, stages, warps, scaled))] = None
    return tuple(ways)


def splits_of(warps: int, most: int) -> list[int]:
    """Among how many programs the inputs of a tile may be split.

    Args:
        warps: Of an unsplit product.
        most: Programs of a tile.
    """
    return [split for split in SPLITS if split == 1 or (split <= most and warps * split <= WARPS)][-3:]


def compute(way: Way, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias` in one way.

    Args:
        way: One of `ways_of`.
        x: `[rows, inputs]`, the inputs in the layout's order.
        weight: The weight.
        bias: `[outputs]`, or `None`.
    """
    if way.name == "deep":
        return int_linear.deep(x, [weight], [bias], way.configuration)
    if way.name == "wide":
        return many.wide(x, [weight], [bias], way.configuration)
    if way.name == "tiles":
        return int_linear.tiles(x, weight, bias, *way.configuration)
    if way.name == "scaled":
        return fp8.scaled(x, weight, bias)
    outputs, inputs = len(weight.words), weight.inputs
    step = max(1, CHUNK // inputs)
    if step >= outputs:
        return torch.nn.functional.linear(x, int_linear.dequantize(weight, x.dtype), bias)
    out = x.new_empty(len(x), outputs)
    for first in range(0, outputs, step):
        last = min(outputs, first + step)
        torch.mm(x, int_linear.dequantize(weight, x.dtype, first, last).T, out=out[:, first:last])
    return out if bias is None else out.add_(bias)
