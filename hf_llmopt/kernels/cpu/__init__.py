"""Kernels in C for the CPU, an operation per file; `ops` calls them.

They are built with the package where there is a compiler. Without them torch's operators serve; `why_not` says why.
"""

from .ops import (
    DTYPES,
    MAX_DIM,
    argmax,
    attention,
    available,
    conv1d,
    dequantize,
    gated,
    layer_numbers,
    layers,
    leaders,
    levels,
    linear,
    norm,
    pack_rows,
    quantized_linear,
    rest,
    timing,
    used,
    using,
    why_not,
)
from .quantized import BlockedWeight, own_products

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "BlockedWeight",
    "argmax",
    "attention",
    "available",
    "conv1d",
    "dequantize",
    "gated",
    "layer_numbers",
    "layers",
    "leaders",
    "levels",
    "linear",
    "norm",
    "own_products",
    "pack_rows",
    "quantized_linear",
    "rest",
    "timing",
    "used",
    "using",
    "why_not",
]
