"""Calls into the C kernels: tensors in, tensors out.

Every function has a twin of the same name and signature in `kernels/reference/`, which says what it computes.
Callers see to it that tensors are on the CPU, of one dtype in `DTYPES`, and contiguous where the C files say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # before the extension: both must share torch's OpenMP runtime
from torch import Tensor

from ...errors import unknown
from ..arguments import Layer, Norm, PageFormat, Product, Seen, Stage

if TYPE_CHECKING:
    from .quantized import BlockedWeight

VARIABLE = "HF_LLMOPT_CPU"  # a level to use instead of the best one, or "off"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMS = {"int8": 1, "fp8": 2, "int4": 3}  # as in pages.h
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4}

_process = os.getpid()
_C: Any = None
_reason: str | None = None
if os.environ.get(VARIABLE) == "off":
    _reason = f"{VARIABLE}=off in the environment"
else:
    try:
        _C = import_module("._C", __package__)
    except ImportError as error:
        _reason = f"the extension was not built ({error}); install a C compiler and reinstall hf-llmopt"


_levels: tuple[str, ...] = tuple(_C.levels()) if _C is not None else ()


def available() -> bool:
    """Whether the kernels were built and this machine can run them."""
    return _C is not None


def why_not() -> str | None:
    """Why the kernels are not available, or `None` if they are."""
    return _reason


def levels() -> tuple[str, ...]:
    """Names of the instruction set levels this machine can run, best last."""
    return _levels


def rest() -> None:
    """End the threads that OpenMP keeps for the calling thread, until it needs them again.

    GNU's OpenMP lets threads wait actively only while all of them together are no more than the processors. A second
    thread that once ran a product keeps threads of its own; from then on everybody's wait is a system call, and the
    steps of small models take up to three times as long.
    """
    if _C is not None and os.getpid() == _process:  # in a forked child they do not exist, and would be waited for
        _C.rest()


def _index(level: str, where: str) -> int:
    if level not in levels():
        raise unknown(where, level, levels())
    return levels().index(level)


_level = len(levels()) - 1
if _C is not None and VARIABLE in os.environ:
    _level = _index(os.environ[VARIABLE], VARIABLE)


def used() -> str:
    """Name of the level that is used."""
    return levels()[_level]


@contextmanager
def using(level: str) -> Iterator[None]:
    """Force an instruction set level inside the block, for tests."""
    global _level
    before, _level = _level, _index(level, "using")
    try:
        yield
    finally:
        _level = before


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


MAX_DIM = 512  # as in attention.h


_NO_NORM, _NO_PRODUCT, DENSE = (0, 0, 0, 0.0, 0, 0), (0, 0, 0, 0, 0.0, 0), 0


def _norm_numbers(norm: Norm) -> tuple[int | float, ...]:
    weight, bias, width, epsilon, centre, variant = norm
    return _address(weight), _address(bias), width, epsilon, centre, variant


def _product_numbers(product: Product) -> tuple[int | float, ...]:
    weight, bias, factor, group = product
    if isinstance(weight, Tensor):
        return weight.data_ptr(), _address(bias), *weight.shape, factor, DENSE
    return _quantized_numbers(weight, bias, factor, group)


def _quantized_numbers(
    weight: BlockedWeight, bias: Tensor | None, factor: float, group: int
) -> tuple[int | float, ...]:
    codes = weight.tensors["codes"]
    return codes.data_ptr(), _address(bias), weight.outputs, weight.inputs, factor, *weight.numbers(group)


def _seen_numbers(seen: Seen, tokens: int, heads: int) -> tuple[int | float, ...]:
    keys, values, table, items, page_size, longest, scaling, softcap, sinks, tiled, form, *_ = seen
    return (
        keys.data_ptr(), values.data_ptr(), table.data_ptr(), items.data_ptr(), _address(sinks),
        tokens, heads, *seen.shape, page_size, table.shape[1], longest, tiled,
        scaling, softcap or 0.0, 0 if form is None else FORMS[form.name],
    )  # fmt: skip


def _trees(*seen: Seen) -> list[int]:
    """What a call ends with if any token sees less than all before it."""
    return [_address(each.tree) for each in seen] if any(each.tree is not None for each in seen) else []


def layer_numbers(layer: Layer) -> tuple[int | float, ...]:
    """What C is told of a layer alone: addresses of its weights, shapes."""
    numbers: list[int | float] = []
    for norm in layer.norms:
        numbers += _NO_NORM if norm is None else _norm_numbers(norm)
    for product in layer.products:
        numbers += _NO_PRODUCT if product is None else _product_numbers(product)
    return tuple(numbers)


def _add_stage(numbers: list[int | float], stage: Stage, tokens: int, dtype: torch.dtype) -> None:
    layer, seen, (cosine, sine, slots, pairs), heads, told = stage
    _, key_dim, value_dim = seen.shape
    joined = layer.products[1] is None
    head = 2 * key_dim + value_dim if joined else key_dim
    numbers += layer_numbers(layer) if told is None else told
    numbers += _seen_numbers(seen, tokens, heads)
    numbers += (
        _address(cosine), _address(sine), slots.data_ptr(), 0 if cosine is None else cosine.shape[-1], pairs,
        cosine is not None and cosine.dtype is not dtype,
        key_dim if joined else 0, 2 * key_dim if joined else 0, head, head if joined else value_dim,
        ACTIVATIONS[layer.kind], layer.parallel,
    )  # fmt: skip


def layers(x: Tensor, stages: Sequence[Stage]) -> Tensor:
    """Layers one after the other, see `reference.layer`; none has sinks."""
    y = torch.empty_like(x)
    tokens, hidden = x.shape
    numbers: list[int | float] = [x.data_ptr(), y.data_ptr(), _address(_spent), tokens, hidden, len(stages)]
    for stage in stages:
        _add_stage(numbers, stage, tokens, x.dtype)
    numbers += _trees(*(stage.seen for stage in stages))
    _C.layers(_level, DTYPES[x.dtype], torch.get_num_threads(), *numbers)
    return y


_spent: Tensor | None = None


@contextmanager
def timing() -> Iterator[Tensor]:
    """Count the seconds that `layers` spends in products, attention and small operations, float64 `[3]`."""
    global _spent
    before, _spent = _spent, torch.zeros(3, dtype=torch.float64, device="cpu")
    try:
        yield _spent
    finally:
        _spent = before


def attention(query: Tensor, seen: Seen) -> Tensor:
    """See `reference.paged_attention`."""
    tokens, heads, _ = query.shape
    output = query.new_empty(tokens, heads, seen.shape.value_dim)
    if seen.sinks is not None:
        seen = seen._replace(sinks=seen.sinks.float().contiguous())
    _C.attention(
        _level, DTYPES[query.dtype], torch.get_num_threads(), *_seen_numbers(seen, tokens, heads),
        query.data_ptr(), query.stride(0), query.stride(1), output.data_ptr(), *_trees(seen),
    )  # fmt: skip
    return output


def pack_rows(x: Tensor, form: PageFormat, rotates: bool = False) -> Tensor:
    """See `reference.pack_rows`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, kv_heads, width = x.shape
    rows = torch.empty(tokens, 1, form.row_bytes(kv_heads, width), dtype=torch.uint8, device=x.device)
    _C.pack_rows(
        _level, DTYPES[x.dtype], torch.get_num_threads(), x.data_ptr(), rows.data_ptr(),
        tokens, kv_heads, width, x.stride(0), x.stride(1), FORMS[form.name], rotates,
    )  # fmt: skip
    return rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    _C.linear(
        _level, DTYPES[x.dtype], torch.get_num_threads(),
        weight.data_ptr(), _address(bias), outputs, inputs, 1.0, DENSE,
        x.data_ptr(), _address(residual), y.data_ptr(), x.numel() // inputs,
    )  # fmt: skip
    return y


def quantized_linear(
    x: Tensor, weight: BlockedWeight, bias: Tensor | None = None, residual: Tensor | None = None, group: int = 0
) -> Tensor:
    """See `reference.quantized_linear`; `group` is 0 or `weight.share`."""
    y = x.new_empty(*x.shape[:-1], weight.outputs)
    _C.linear(
        _level, DTYPES[x.dtype], torch.get_num_threads(), *_quantized_numbers(weight, bias, 1.0, group),
        x.data_ptr(), _address(residual), y.data_ptr(), x.numel() // weight.inputs,
    )  # fmt: skip
    return y


def dequantize(weight: BlockedWeight, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    y = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device="cpu")
    numbers = _quantized_numbers(weight, None, 1.0, 0)
    _C.dequantize(_level, DTYPES[dtype], torch.get_num_threads(), *numbers, y.data_ptr())
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


def norm(x: Tensor, norm: Norm) -> Tensor:
    """See `reference.norm`."""
    y = torch.empty_like(x)
    rows = x.numel() // norm.width
    _C.norm(_level, DTYPES[x.dtype], torch.get_num_threads(), *_norm_numbers(norm), x.data_ptr(), y.data_ptr(), rows)
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


def argmax(x: Tensor) -> Tensor:
    """See `reference.argmax`; the last axis of `x` is contiguous."""
    rows, width = x.shape
    best = torch.empty(rows, dtype=torch.int64, device="cpu")
    _C.argmax(_level, DTYPES[x.dtype], torch.get_num_threads(), x.data_ptr(), best.data_ptr(), rows, width, x.stride(0))
    return best


def leaders(
    estimates: Tensor, error: Tensor, spread: Tensor, slack: Tensor, dtype: torch.dtype, most: int
) -> tuple[Tensor, Tensor | None]:
    """See `reference.leaders`; all tensors are contiguous."""
    rows, width = len(spread), len(error)
    logits = torch.empty(rows, width, dtype=dtype, device="cpu")
    found = torch.empty(1 + most, dtype=torch.int64, device="cpu")
    _C.leaders(
        _level, DTYPES[dtype], torch.get_num_threads(), estimates.data_ptr(), error.data_ptr(), spread.data_ptr(),
        slack.data_ptr(), logits.data_ptr(), found.data_ptr(), rows, width, most, len(estimates) // rows,
        torch.finfo(dtype).eps, torch.finfo(dtype).tiny * torch.finfo(dtype).eps,
    )  # fmt: skip
    count = int(found[0])
    return logits, None if count < 0 else found[1 : 1 + count]
