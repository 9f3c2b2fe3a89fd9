"""Calls into the C kernels: tensors in, tensors out.

Every function has a twin of the same name and signature in `kernels/reference.py`, which says what it computes.
Callers see to it that tensors are on the CPU, of one dtype in `DTYPES`, and contiguous where the C files say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # before the extension: both must share torch's OpenMP runtime
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4}

_C: Any = None
_reason: str | None = None
try:
    from . import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _reason = f"the extension was not built ({error}); install a C compiler and reinstall hf-llmopt"

_level = len(_C.levels()) - 1 if _C is not None else -1


def available() -> bool:
    """Whether the kernels were built and this machine can run them."""
    return _C is not None


def why_not() -> str | None:
    """Why the kernels are not available, or `None` if they are."""
    return _reason


def levels() -> tuple[str, ...]:
    """Names of the instruction set levels this machine can run, best last; the last is used."""
    return tuple(_C.levels()) if _C is not None else ()


@contextmanager
def using(level: str) -> Iterator[None]:
    """Force an instruction set level inside the block, for tests."""
    global _level
    before, _level = _level, levels().index(level)
    try:
        yield
    finally:
        _level = before


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


MAX_DIM, SPLIT = 512, 1024  # as in attention.h


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    items: Tensor,
    page_size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """See `reference.paged_attention`; `longest` is the most keys an item sees, if the caller knows."""
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = values.shape[1], values.shape[2]
    if longest is None:
        longest = int((items[:, 2] - items[:, 1]).max())
    parts = max(1, -(-longest // SPLIT))
    output = query.new_empty(tokens, heads, value_dim)
    sinks = None if sinks is None else sinks.float().contiguous()
    _C.attention(
        _level, DTYPES[query.dtype], torch.get_num_threads(),
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), table.data_ptr(), items.data_ptr(), _address(sinks),
        output.data_ptr(),
        tokens, heads, kv_heads, key_dim, value_dim, page_size, table.shape[1], query.stride(0), query.stride(1), parts,
        longest,
        scaling, softcap or 0.0,
    )  # fmt: skip
    return output


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    _C.linear(
        _level, DTYPES[x.dtype], torch.get_num_threads(),
        x.data_ptr(), weight.data_ptr(), _address(bias), _address(residual), y.data_ptr(),
        rows, outputs, inputs,
    )  # fmt: skip
    return y


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.conv1d`."""
    inputs, outputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    _C.conv1d(
        _level, DTYPES[x.dtype], torch.get_num_threads(),
        x.data_ptr(), weight.data_ptr(), _address(bias), y.data_ptr(), x.numel() // inputs, outputs, inputs,
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variant: int = 0) -> Tensor:
    """See `reference.rms_norm`."""
    return _norm(x, weight, None, epsilon, 0, variant)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """See `reference.layer_norm`."""
    return _norm(x, weight, bias, epsilon, 1, 0)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, centre: int, variant: int) -> Tensor:
    y = torch.empty_like(x)
    width = x.shape[-1]
    _C.norm(
        _level, DTYPES[x.dtype], torch.get_num_threads(),
        x.data_ptr(), _address(weight), _address(bias), y.data_ptr(), x.numel() // width, width, epsilon, centre,
        variant,
    )  # fmt: skip
    return y


def gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """See `reference.gated`. `gate` and `up` may be halves of one tensor: rows `gate.stride(-2)` apart."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device="cpu")
    width = gate.shape[-1]
    stride = gate.stride(-2) if gate.dim() > 1 else width
    _C.activation(
        _level, DTYPES[gate.dtype], torch.get_num_threads(),
        gate.data_ptr(), _address(up), y.data_ptr(), gate.numel() // width, width, stride, ACTIVATIONS[kind],
    )  # fmt: skip
    return y


def rotary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    interleaved: bool = False,
) -> None:
    """See `reference.rotary`."""
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = value.shape[1:]
    _C.rotary(
        _level, DTYPES[query.dtype], 1,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(cosine), _address(sine), slots.data_ptr(),
        keys.data_ptr(), values.data_ptr(),
        tokens, heads, kv_heads, key_dim, value_dim, 0 if cosine is None else cosine.shape[-1], int(interleaved),
    )  # fmt: skip
