"""Products with quantized weights on a GPU against torch's in bfloat16: single layers, a model's layers in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels import reference
from ..kernels.arguments import Grid
from ..kernels.weight import KernelWeight, pack
from .measure import environment, paired_ratio

Call = Callable[[], Any]

# Outputs and inputs of Llama-3-8B: attention's output, query-key-value and gate-up joined, down, the head.
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FORMATS = ("int4", "int8", "float8")
CACHE = 200_000_000  # bytes of weights between two uses of one: several times the largest L2 cache
ROUNDS = 7


def grid(form: str, outputs: int, inputs: int, generator: torch.Generator) -> Grid:
    """A random weight on the generator's device: 4 bits in symmetric groups of 128, 8 bits with a scale per output."""
    device = generator.device
    groups = inputs // 128 if form == "int4" else 1
    scales = 0.01 + 0.02 * torch.rand(outputs, groups, device=device, generator=generator)
    if form == "float8":
        codes = torch.randn(outputs, inputs, device=device, generator=generator).to(torch.float8_e4m3fn)
        return Grid(codes, scales.half(), None, 8)
    bits = int(form.removeprefix("int"))
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, device=device, generator=generator)
    return Grid(codes, scales.half(), None, bits)


def graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in one CUDA graph, run once: launches take the host no time, as in decoding with graphs."""
    for call in calls:
        call()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    captured.replay()
    return captured


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds of a call in each graph, one after the other in every round.

    Args:
        graphs: Graphs with the calls in each.
        rounds: Of all graphs.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (captured, calls) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / calls)
    return times


def copies(kernel: KernelWeight) -> list[KernelWeight]:
    """The weight as often as the caches can hold, and more."""
    size = sum(tensor.nbytes for tensor in kernel.tensors.values())
    return [kernel, *(pack(kernel.unpack()) for _ in range(min(40, max(2, -(-CACHE // size))) - 1))]


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS, formats: Sequence[str] = FORMATS
) -> list[dict[str, Any]]:
    """Time and error of single products.

    Args:
        shapes: Outputs and inputs.
        rows: Of the activations.
        formats: Of `FORMATS`.

    Returns:
        One entry for each shape, number of rows and format: microseconds of each round beside torch's, the ratio with
        its interval, the way that was chosen, and both relative errors against float32.
    """
    found = []
    generator = torch.Generator("cuda").manual_seed(0)
    for outputs, inputs in shapes:
        for form in formats:
            weight = grid(form, outputs, inputs, generator)
            kernels = copies(pack(weight))
            dense = reference.dequantize(weight, torch.bfloat16)
            denses = [dense] + [dense.clone() for _ in range(max(2, -(-CACHE // dense.nbytes)) - 1)]
            for count in rows:
                x = torch.randn(count, inputs, device="cuda", generator=generator).bfloat16()
                found.append({"outputs": outputs, "inputs": inputs, "rows": count, "format": form})
                found[-1] |= _product(x, weight, kernels, denses)
            del kernels, dense, denses, weight
    return found


def _product(x: Tensor, weight: Grid, kernels: list[KernelWeight], denses: list[Tensor]) -> dict[str, Any]:
    exact = reference.quantized_linear(x.float(), weight)
    errors = [_error(kernels[0].product(x), exact), _error(linear(x, denses[0]), exact)]
    for kernel in kernels:
        kernel.product(x)  # learns the fastest way
    repeated = denses * -(-20 // len(denses))
    times = interleaved(
        {
            "bfloat16": (graph([lambda w=w: linear(x, w) for w in repeated]), len(repeated)),  # type: ignore[misc]
            "quantized": (graph([lambda k=k: k.product(x) for k in kernels]), len(kernels)),  # type: ignore[misc]
        }
    )
    ratio = paired_ratio(times["bfloat16"], times["quantized"])
    ways = getattr(kernels[0], "ways", {})
    return {
        "way": next((str(way) for (rows, *_), way in ways.items() if _serves(rows, len(x))), ""),
        "microseconds": times,
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "error": errors[0],
        "error_bfloat16": errors[1],
    }


def _serves(bucket: int, rows: int) -> bool:
    from ..kernels.triton.weight import bucket_of

    return bucket == bucket_of(rows)


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def stack(rows: Sequence[int] = (1, 8, 64), layers: int = 32, form: str = "int4") -> list[dict[str, Any]]:
    """All products of Llama-3-8B's layers in one CUDA graph, without what stands between them.

    Args:
        rows: Of the activations.
        layers: Of the model.
        form: Of the weights.
    """
    found = []
    generator = torch.Generator("cuda").manual_seed(0)
    grids = [grid(form, *shape, generator) for shape in SHAPES[:-1]]
    kernels = [pack(weight) for _ in range(layers) for weight in grids]
    denses = [reference.dequantize(weight, torch.bfloat16) for _ in range(layers) for weight in grids]
    for count in rows:
        inputs = {w: torch.randn(count, w, device="cuda", generator=generator).bfloat16() for w in (4096, 14336)}
        calls: dict[str, list[Call]] = {
            "bfloat16": [lambda x=inputs[w.shape[1]], w=w: linear(x, w) for w in denses],  # type: ignore[misc]
            "quantized": [
                lambda x=inputs[w.shape[1]], k=k: k.product(x)  # type: ignore[misc]
                for w, k in zip(denses, kernels, strict=True)
            ],
        }
        times = interleaved({name: (graph(group), 1) for name, group in calls.items()})
        ratio = paired_ratio(times["bfloat16"], times["quantized"])
        found.append({"rows": count, "layers": layers, "format": form, "microseconds": times})
        found[-1] |= {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
    return found


def bench() -> dict[str, Any]:
    """Both, with what they ran on.

    Example:
        >>> import torch
        >>> from hf_llmopt.bench import quantized_kernels
        >>> report = quantized_kernels.bench() if torch.cuda.is_available() else None
    """
    found = {"bench": "quantized kernels", "environment": environment(), "device": torch.cuda.get_device_name()}
    return {**found, "products": measure(), "stack": stack()}
