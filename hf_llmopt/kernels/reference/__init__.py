"""Plain-torch definitions of every kernel: slow, short, and what "correct" means.

A faster kernel has the same signature as its twin here and is tested against it.
"""

from .decoder import layer
from .paged import attention, paged_attention, visible
from .pointwise import argmax, gated, leaders, norm, rotate, settle
from .products import conv1d, dequantize, float8_rows, linear, quantize_rows, quantized_linear
from .rows import hadamard, pack_rows, unpack_rows

__all__ = [
    "argmax",
    "attention",
    "conv1d",
    "dequantize",
    "float8_rows",
    "gated",
    "hadamard",
    "layer",
    "leaders",
    "linear",
    "norm",
    "pack_rows",
    "paged_attention",
    "quantize_rows",
    "quantized_linear",
    "rotate",
    "settle",
    "unpack_rows",
    "visible",
]
