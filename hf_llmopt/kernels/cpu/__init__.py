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
    gated,
    layers,
    levels,
    linear,
    norm,
    rest,
    timing,
    used,
    using,
    why_not,
)

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "argmax",
    "attention",
    "available",
    "conv1d",
    "gated",
    "layers",
    "levels",
    "linear",
    "norm",
    "rest",
    "timing",
    "used",
    "using",
    "why_not",
]
