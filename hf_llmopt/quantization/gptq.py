"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): inputs are rounded one by one, and those behind make up for the error.

The error of a layer on calibration inputs X is `tr(dW H dW^T)` with `H = X X^T`. When input i is rounded to q, the
change of the inputs j > i that makes up for most of it is `-(w_i - q) / U_ii * U_ij`, where `H^-1 = U^T U`, U upper
triangular: U holds, row after row, what the inverse of H is once the inputs before are fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationFailed
from ..kernels.arguments import Grid
from .blocks import Block
from .grid import find_range, round_to

BLOCK = 128  # inputs whose changes to the inputs behind them are added at once
FEW = 64  # tokens; H of fewer says too little
ALPHA = 0.5  # share of the drift that is made up for: see `gptq`


class Hessian:
    """The mean of `x x^T` over all tokens that a product read, float32, and of `(x' - x) x^T` beside it.

    `x'` is what the product reads of the token in the model as it came.

    Args:
        inputs: Of the product.
        device: Where it is kept.

    Example:
        >>> import torch
        >>> hessian = Hessian(2, torch.device("cpu"))
        >>> hessian.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> hessian.value.tolist(), hessian.tokens
        ([[0.5, 0.0], [0.0, 2.0]], 2)
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.value = torch.zeros(inputs, inputs, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count tokens, `[tokens, inputs]`; without `exact`, x', as if nothing had drifted."""
        if len(x):
            wide, self.tokens = x.float(), self.tokens + len(x)
            share: dict[str, float] = {"beta": 1 - len(x) / self.tokens, "alpha": 1 / self.tokens}
            self.value.addmm_(wide.T, wide, **share)
            if self.drift is None and exact is not None:
                self.drift = torch.zeros_like(self.value)
            if self.drift is not None:
                self.drift.addmm_((wide if exact is None else exact.float()).sub(wide).T, wide, **share)


def quantize_block(block: Block, **options: Any) -> dict[str, Grid]:
    """Quantize a block with GPTQ: a method for `blocks.quantize_blocks`. The options are those of `gptq`."""
    grids: dict[str, Grid] = {}
    for stage in block.stages:
        hessians: dict[tuple[str, ...], Hessian] = {}

        def see(
            names: tuple[str, ...], x: Tensor, exact: Tensor | None, hessians: dict[tuple[str, ...], Hessian] = hessians
        ) -> None:
            if names not in hessians:
                hessians[names] = Hessian(x.shape[-1], x.device)
            hessians[names].add(x, exact)

        block.observe(stage, see)
        for names in stage:
            hessian = hessians.pop(names, None)
            for name in names:
                if hessian is None or hessian.tokens < FEW:
                    grids[name] = block.fall_back(name)
                else:
                    grids[name] = gptq(block.weight(name), hessian.value, drift=hessian.drift, **options)
                block.replace(name, grids[name])
    return grids


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    drift: Tensor | None = None,
) -> Grid:
    """Quantize a weight so that its product with the calibration inputs changes little.

    With `drift`, what the products before it changed in these inputs counts too, as in GPTAQ (Li et al. 2025, arXiv
    2504.02692): `W X'`, of the inputs X' that the model had as it came, is nearest to `W + W (X' - X) X^T H^-1` times
    X, and this is the weight that is rounded. Half of that step is taken: the whole fits the calibration set only.

    Args:
        weight: `[outputs, inputs]`.
        hessian: `X X^T` up to a factor, float32 `[inputs, inputs]`, on the weight's device.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale, a divisor of `inputs`; -1 for all.
        symmetric: No zeros.
        act_order: Round the groups in the order of their largest diagonal element of H, and inputs inside a group
            likewise (GAR, Gafni et al. 2025, arXiv 2505.14638). Inputs stay in their group, so files need no index.
        damping: Share of H's mean diagonal that is added to the diagonal; more, where H cannot be inverted otherwise.
        clip: Search the range of each group for the least loss.
        scale_dtype: What scales are stored in.
        drift: `(X' - X) X^T`, with the same factor as `hessian`.

    Raises:
        CalibrationFailed: H is not finite.
        UnsupportedQuantization: The weight is not finite.

    Example:
        >>> import torch
        >>> x = torch.randn(256, 32) @ torch.randn(32, 32)
        >>> gptq(torch.randn(8, 32), x.T @ x, group_size=16).scales.shape
        torch.Size([8, 2])
    """
    outputs, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    order = _order(hessian.diagonal(), size, act_order)
    w = weight.float().T[order].contiguous()  # [inputs, outputs]: an input is a row
    h = hessian[order][:, order]
    u = _inverse_factor(h, damping)
    if drift is not None:
        w += ALPHA * (u.T @ (u @ (drift[order][:, order].T @ w)))
    importance = u.diagonal() ** -2  # the squared error of input i enters the loss with this factor
    importance = importance / importance.mean()  # the factor itself may be out of float32's range once squared

    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=w.device)
    scales, zeros = torch.empty(2, inputs // size, outputs, device=w.device).unbind()
    step = _block(size)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        errors = torch.empty(end - start, outputs, device=w.device)
        for i in range(start, end):
            group = i // size
            if i % size == 0:  # with what the inputs before have added to its weights
                scales[group], zeros[group] = find_range(
                    w[i : i + size].T, bits, symmetric, clip, scale_dtype, importance[i : i + size]
                )
            q = round_to(w[i], scales[group], zeros[group], bits, symmetric)
            codes[i] = q.to(torch.uint8)
            errors[i - start] = (w[i] - scales[group] * (q - zeros[group])) / u[i, i]
            w[i + 1 : end].addr_(u[i, i + 1 : end], errors[i - start], alpha=-1)
        w[end:].addmm_(u[start:end, end:].T, errors, alpha=-1)

    back, groups = order.argsort(), (order[::size] // size).argsort()
    grid_zeros = None if symmetric else zeros[groups].T.contiguous().to(torch.uint8)
    return Grid(codes[back].T.contiguous(), scales[groups].T.contiguous().to(scale_dtype), grid_zeros, bits)


def _order(diagonal: Tensor, size: int, act_order: bool) -> Tensor:
    """The order in which inputs are rounded: group after group."""
    index = torch.arange(len(diagonal), device=diagonal.device)
    if not act_order:
        return index
    grouped = diagonal.view(-1, size)
    inside = index.view(-1, size).gather(1, grouped.argsort(dim=1, descending=True, stable=True))
    return inside[grouped.amax(1).argsort(descending=True, stable=True)].flatten()


def _block(size: int) -> int:
    """About `BLOCK`, so that no group begins in the middle of a block and ends behind it."""
    if size <= BLOCK:
        return BLOCK // size * size
    return max(step for step in range(1, BLOCK + 1) if size % step == 0)


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """U with `U^T U = H^-1`, of a damped H, in which inputs that were always 0 get the mean: so they are only rounded.

    Raises:
        CalibrationFailed: H is not finite.
    """
    dead = h.diagonal() == 0
    mean = h.diagonal().sum() / (~dead).sum() if not dead.all() else torch.ones_like(h[0, 0])
    h = h + torch.diag(dead * mean)
    if not h.isfinite().all():
        raise CalibrationFailed(
            "A product reads NaN or infinite values on the calibration set. Check the weights, or load them with "
            'dtype="bfloat16" or "float32": float16 ends at 65504.'
        )
    while True:
        damped = h + torch.diag((damping * mean).expand(len(h)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping = max(10 * damping, 1e-6)
