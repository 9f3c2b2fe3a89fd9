"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations are moved into the weights.

An int8 scale for all inputs of a token is as wide as the token's largest activation, and some inputs are large on all
tokens. Such an input is divided by `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`, and the
weights that read it are multiplied. Then both fit 8 bits.
"""

from __future__ import annotations

import torch

from ..kernels.arguments import Grid
from .blocks import Block
from .folding import folds_of, move, reader, samples
from .grid import make_grid

ALPHA = 0.5  # the paper's choice for most models


@torch.no_grad()
def quantize_block(
    block: Block,
    bits: int = 8,
    group_size: int = -1,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, Grid]:
    """Quantize a block whose activations are quantized too: a method for `blocks.quantize_blocks`.

    Args:
        block: The block. The parameters that factors moved into are changed.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        symmetric: No zeros.
        clip: Search the range of each group for the least squared error.
        scale_dtype: What scales are stored in.
    """
    folds = folds_of(block)
    readers = [reader(block, fold) for fold in folds]
    inputs = samples(block, set(readers))
    for fold, name in zip(folds, readers, strict=True):
        products = [f"{block.name}.{consumer}" for consumer in fold.consumers]
        weights = [block.weight(product) for product in products if product in block.products]
        if name in inputs and len(inputs[name]) and weights:
            activation = inputs[name].abs().amax(0).clamp_min(1e-5)
            weight = torch.stack([part.abs().amax(0) for part in weights]).amax(0).clamp_min(1e-5)
            move(block, fold, fold.shared(activation.pow(ALPHA) / weight.pow(1 - ALPHA)))
    return {
        name: make_grid(block.weight(name), bits, group_size, symmetric, clip, scale_dtype) for name in block.products
    }
