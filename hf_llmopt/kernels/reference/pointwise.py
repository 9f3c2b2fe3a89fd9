"""What each token goes through by itself: norms, activations, rotations, the choice of the largest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Norm, Turns


def norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm or RMSNorm of the last axis, `[..., width]`."""
    wide, weight = x.float(), None if norm.weight is None else norm.weight.float()
    if norm.centre:
        weight = weight + 1 if weight is not None and norm.variant == 1 else weight
        bias = None if norm.bias is None else norm.bias.float()
        return torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight, bias, norm.epsilon).to(x.dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    if weight is not None:
        wide = wide.to(x.dtype).float() * weight if norm.variant == 0 else wide * (weight + (norm.variant == 1))
    return wide.to(x.dtype)


def gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)` where `up` is `None` (Shazeer 2020).

    Args:
        gate: `[..., width]`.
        up: `[..., width]`, or `None`.
        kind: `"silu"`, `"gelu_tanh"`, `"gelu"`, `"relu"` or `"relu2"`.
    """
    functional = torch.nn.functional
    act = {
        "silu": functional.silu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu": functional.gelu,
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }[kind](gate)
    return act if up is None else act * up


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Queries or keys `[tokens, heads, width]` turned by their positions."""
    if turns.cosine is None or turns.sine is None:
        return x
    cosine, sine = turns.cosine[:, None], turns.sine[:, None]
    part, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    if turns.pairs == 2:
        cosine, sine = (t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in (cosine, sine))
    if turns.pairs:
        turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    else:
        low, high = part.chunk(2, dim=-1)
        turned = torch.cat([-high, low], dim=-1)
    return torch.cat([(part * cosine + turned * sine).to(x.dtype), rest], dim=-1)


def argmax(x: Tensor) -> Tensor:
    """The first of the largest elements of each row of `[rows, width]`, int64; -1 for a row that contains NaN."""
    return x.float().argmax(dim=-1).masked_fill(x.isnan().any(dim=-1), -1)


def leaders(
    estimates: Tensor, error: Tensor, spread: Tensor, slack: Tensor, dtype: torch.dtype, most: int
) -> tuple[Tensor, Tensor | None]:
    """Which outputs of a head may be the largest of their row once they are rounded to `dtype`.

    Args:
        estimates: float32 `[rows, outputs]`, or `[2 * rows, outputs]`: an estimate is the sum of two, `rows` apart.
        error: float32 `[outputs]`; an estimate is off by at most `error * spread + slack`.
        spread: float32 `[rows]`.
        slack: float32 `[rows]`.
        dtype: Of the logits.
        most: Outputs that may be found.

    Returns:
        The estimates in `dtype`, `[rows, outputs]`, and the places of all that may be the largest of some row,
        ascending; `None` if they are more than `most`, or if no number bounds them.
    """
    estimate, off = estimates.unflatten(0, (-1, len(spread))).sum(0), error * spread[:, None]
    least, largest = (estimate - off).amax(1), (estimate + off).amax(1)
    format_, top = torch.finfo(dtype), torch.maximum(least.abs(), largest.abs())
    bar = least - 2 * slack - format_.eps * top - 2 * format_.tiny * format_.eps
    places = (estimate + off >= bar[:, None]).any(0).nonzero()[:, 0]
    bounded = bar.isfinite() & (spread >= 1e-15) & (top < format_.max)  # squares of smaller numbers may vanish
    return estimate.to(dtype), places if bool(bounded.all()) and len(places) <= most else None


def settle(estimates: Tensor, x: Tensor, weight: Tensor, error: Tensor, size: float) -> Tensor:
    """Logits of which all that may be the largest of their row are products, and the others estimates.

    Args:
        estimates: `[rows, outputs]` of `x @ weight^T`, rounded to x's format; before, off by at most `error * |x|`.
        x: `[rows, inputs]`.
        weight: `[outputs, inputs]`.
        error: float32 `[outputs]`.
        size: Largest norm of an output's weights.
    """
    given, spacing, rounding = estimates.float(), torch.finfo(x.dtype).eps, x.shape[1] * torch.finfo(torch.float32).eps
    spread = x.float().norm(dim=1, keepdim=True) * (1 + rounding)
    off = error * spread + size * rounding * spread + spacing * given.abs()
    least = (given - off).amax(1, keepdim=True)
    bar = least - 2 * size * rounding * spread - 2 * spacing * least.abs() - 2 * torch.finfo(x.dtype).tiny * spacing
    bar = bar.where(spread >= 1e-15, -torch.inf)  # squares of smaller numbers may vanish
    return torch.where(given + off < bar, estimates, x @ weight.T)
