"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs with large activations have finer steps.

The error of a product is `(W - round(W s) / s) x`. Rounding costs about as much in every column of a group, so a column
that is multiplied by s > 1 has a smaller share of it, as long as it does not widen the group's range; what gives the
input is divided by s. Factors are searched on two lines, `s = a_x^alpha / a_w^(1 - alpha)` and `s = a_x^alpha`, a_x the
mean activation of an input and a_w the mean share of the range that its weights take (the paper's
code has the first form), for the least error of all products that read these inputs.

Then the ranges of the groups are searched, as the paper does, but for the least error of the whole product: what the
other groups add to it counts, and the scale that is best for the codes of a range is tried too. On the embedded model
most of the gain comes from this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.arguments import Grid
from ..kernels.reference import dequantize
from .blocks import Block
from .folding import folds_of, move, reader, samples
from .graph import Fold
from .grid import find_range, make_grid, round_to

STEPS = 10  # values of alpha on a line
SHARES = [1 - step / 20 for step in range(10)]  # of a group's whole range
PASSES = 2  # over the groups of a weight
REFITS = 2  # least-squares scales for the codes of the best range
FEW = 64  # tokens


def quantize_block(
    block: Block,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, Grid]:
    """Quantize a block with AWQ: a method for `blocks.quantize_blocks`.

    Args:
        block: The block. The parameters that factors moved into are changed.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        symmetric: No zeros.
        clip: Search the ranges of the groups.
        scale_dtype: What scales are stored in.
    """
    prefix = f"{block.name}."
    folds = folds_of(block)
    reads = {name: name.removeprefix(prefix) for name in block.products}
    reads |= {prefix + name: reader(block, fold) for fold in folds for name in fold.consumers}
    inputs = {name: x for name, x in samples(block, set(reads.values())).items() if len(x) >= FEW}

    def nearest(weight: Tensor) -> Grid:
        return make_grid(weight, bits, group_size, symmetric, False, scale_dtype)

    for fold in folds:
        names = [prefix + name for name in fold.consumers if prefix + name in block.products]
        x = inputs.get(reads[names[0]]) if names else None
        if x is not None:
            scales = find_scales([block.weight(name) for name in names], x, fold, group_size, nearest)
            move(block, fold, scales)
            inputs[reads[names[0]]] = x / scales
    grids = {}
    for name in block.products:
        x = inputs.get(reads[name])
        if x is None:
            grids[name] = block.fall_back(name)
        elif clip:
            grids[name] = search_ranges(block.weight(name), x.T @ x, bits, group_size, symmetric, scale_dtype)
        else:
            grids[name] = nearest(block.weight(name))
    return grids


@torch.no_grad()
def find_scales(
    weights: Sequence[Tensor], x: Tensor, fold: Fold, group_size: int, nearest: Callable[[Tensor], Grid]
) -> Tensor:
    """The factors on common inputs of products with the least error of the products together.

    Args:
        weights: `[outputs, inputs]`, float32.
        x: What the products read, `[tokens, inputs]`.
        fold: Which inputs have one factor.
        group_size: Inputs that share a scale; -1 for all.
        nearest: How weights are rounded.

    Returns:
        `[inputs]`; ones, if no others are better.
    """
    hessian = x.T @ x
    activation = fold.shared(x.abs().mean(0))
    grouped = torch.cat(list(weights)).abs().unflatten(1, (-1, group_size if group_size > 0 else x.shape[1]))
    share = fold.shared((grouped / grouped.amax(-1, keepdim=True).clamp_min(1e-12)).flatten(1).mean(0))

    def error(scales: Tensor) -> float:
        offs = [dequantize(nearest(weight * scales)) / scales - weight for weight in weights]
        return sum(float(((off @ hessian) * off).sum()) for off in offs)

    best = torch.ones_like(activation)
    least = error(best)
    for alpha in (step / STEPS for step in range(1, STEPS + 1)):
        for beta in (1 - alpha, 0.0):
            scales = (activation.pow(alpha) / (share.pow(beta) + 1e-4)).clamp_min(1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            now = error(scales)
            if now < least:
                best, least = scales, now
    return best


@torch.no_grad()
def search_ranges(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """Round a weight to nearest, in ranges with the least error of its product, `tr(dW H dW^T)`.

    With `d` the error of one group, H' its part of the Hessian and `r` what the errors of the other groups make of its
    inputs, `dW H`, the group adds `d H' d^T + 2 r d^T`. For given codes q that is least with a scale of
    `(q H' w^T - r q^T) / (q H' q^T)`.

    Args:
        weight: `[outputs, inputs]`, float32.
        hessian: `X X^T` up to a factor, `[inputs, inputs]`.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        symmetric: No zeros.
        scale_dtype: What scales are stored in.

    Example:
        >>> import torch
        >>> x = torch.randn(256, 32) @ torch.randn(32, 32)
        >>> search_ranges(torch.randn(8, 32), x.T @ x, 4, 16, symmetric=False).scales.shape
        torch.Size([8, 2])
    """
    size = group_size if group_size > 0 else weight.shape[1]
    grouped = weight.unflatten(1, (-1, size))
    whole, zeros = find_range(grouped, bits, symmetric, False, scale_dtype)
    scales, _ = find_range(grouped, bits, symmetric, True, scale_dtype)
    codes = round_to(grouped, scales[..., None], zeros[..., None], bits, symmetric)
    off = (scales[..., None] * (codes - zeros[..., None]) - grouped).flatten(1)
    for group in list(range(whole.shape[1])) * PASSES:
        part = slice(group * size, (group + 1) * size)
        w, zero, inner = grouped[:, group], zeros[:, group, None], hessian[part, part]
        rest = off @ hessian[:, part] - off[:, part] @ inner
        least = ((off[:, part] @ inner + 2 * rest) * off[:, part]).sum(-1)
        for step in range(len(SHARES) + REFITS):
            if step < len(SHARES):
                trial = whole[:, group] * SHARES[step]
            else:
                near = codes[:, group] - zero
                lever = near @ inner
                square = (lever * near).sum(-1)
                fit = (lever * w).sum(-1) - (near * rest).sum(-1)
                trial = torch.where(square > 0, fit / square, scales[:, group])
            trial = trial.to(scale_dtype).float()
            trial = torch.where((trial == 0) | ~trial.isfinite(), scales[:, group], trial)
            q = round_to(w, trial[:, None], zero, bits, symmetric)
            d = trial[:, None] * (q - zero) - w
            error = ((d @ inner + 2 * rest) * d).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scales[:, group] = torch.where(better, trial, scales[:, group])
            codes[:, group] = torch.where(better[:, None], q, codes[:, group])
            off[:, part] = torch.where(better[:, None], d, off[:, part])
    stored = None if symmetric else zeros.to(torch.uint8)
    return Grid(codes.flatten(1).to(torch.uint8), scales.to(scale_dtype), stored, bits)
