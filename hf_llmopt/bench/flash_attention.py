"""Attention on a GPU: over pages against torch's on dense keys, from prompts to decoding, and in plain forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.arguments import Seen
from . import flash_attention_plain as plain
from .measure import environment
from .quantized_kernels import CACHE, graph, interleaved
from .report import Table

Call = Callable[[], Tensor]
OnRun = Callable[[str], None]

HEADS, KV_HEADS, WIDTH, PAGE = 32, 8, 128, 16  # of Llama-3-8B
# Requests, tokens of each, and how many of them are computed now.
PREFILLS = (
    (16, 1024, 1024), (8, 2048, 2048), (4, 4096, 4096), (2, 8192, 8192), (4, 8192, 1024), (4, 32768, 1024),
)  # fmt: skip
DECODES = tuple((batch, context) for context in (4096, 16384, 65536, 131072) for batch in (1, 8, 64))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SAMPLED = 24  # query tokens whose error is taken
DENSE = 17e9  # most bytes of keys and values that are copied for torch
READ = 2**30  # most bytes beside which reading as many is timed: more are read at the full bandwidth


class Problem(NamedTuple):
    """What is computed: queries over pages in random order, or in runs.

    Attributes:
        query: `[tokens, heads, width]`.
        seen: What they attend to, on the device.
        batch: Requests.
        context: Tokens of each.
        span: How many of them are computed.
    """

    query: Tensor
    seen: Seen
    batch: int
    context: int
    span: int

    def tiles(self, size: int) -> Tensor:
        """As `StepInputs.tiles`."""
        found = [
            (row * self.span + start, min(size, self.span - start), self.context)
            for row in range(self.batch)
            for start in reversed(range(0, self.span, size))
        ]
        return torch.tensor(found, dtype=torch.int32, device="cpu").to(self.query.device)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as torch takes them, `[batch, heads, tokens, width]`."""
        page = self.seen.page_size
        index = (self.seen.table.long()[..., None] * page + torch.arange(page, device=self.query.device)).flatten(1)
        keys, values = (pages[index].transpose(1, 2) for pages in (self.seen.keys, self.seen.values))
        return self.query.unflatten(0, (self.batch, -1)).transpose(1, 2), keys, values

    def error(self, output: Tensor) -> float:
        """Of some tokens `[tokens, heads, width]`, relative to float64."""
        chosen = torch.linspace(0, len(self.query) - 1, min(SAMPLED, len(self.query))).long().tolist()
        wrong = total = 0.0
        for token in chosen:
            row, first, end = self.seen.items[token].tolist()
            index = torch.arange(first, end, device=self.query.device)
            page = self.seen.page_size
            slots = self.seen.table[row].long()[index // page] * page + index % page
            keys, values = (pages[slots].double().transpose(0, 1) for pages in (self.seen.keys, self.seen.values))
            query = self.query[token].double().unflatten(0, (self.seen.shape.kv_heads, -1))
            weights = (query @ keys.transpose(1, 2) * self.seen.scaling).softmax(-1)
            exact = (weights @ values).flatten(0, 1)
            wrong += float((output[token].double() - exact).square().sum())
            total += float(exact.square().sum())
        return float((wrong / total) ** 0.5)


def problem(
    batch: int,
    context: int,
    span: int,
    generator: torch.Generator,
    runs: bool,
    heads: tuple[int, int, int] = (HEADS, KV_HEADS, WIDTH),
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Random queries, keys and values on the generator's device.

    Args:
        batch: Requests.
        context: Tokens of each, a multiple of the page size.
        span: How many of them are computed.
        generator: Of the numbers.
        runs: Each request's pages follow one another, instead of lying in random order.
        heads: Query heads, key heads, and their width.
        dtype: Of the numbers.
    """
    count, kv_heads, width = heads
    device, pages = generator.device, batch * context // PAGE

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    order = torch.arange if runs else partial(torch.randperm, generator=generator)
    table = order(pages, device=device).int().view(batch, -1)
    ends = torch.arange(context - span + 1, context + 1, device=device).repeat(batch)
    rows = torch.arange(batch, device=device).repeat_interleave(span)
    items = torch.stack([rows, torch.zeros_like(rows), ends], 1).int()
    keys, values = (normal(pages * PAGE, kv_heads, width) for _ in range(2))
    seen = Seen(keys, values, table, items, PAGE, context, width**-0.5)
    return Problem(normal(batch * span, count, width), seen, batch, context, span)


def reading(size: int) -> float:
    """Microseconds that the fastest of torch's reductions takes over so many bytes, caches cold."""
    buffers = [torch.empty(size // 4, dtype=torch.int32, device="cuda").random_() for _ in range(-(-CACHE // size))]
    repeated = buffers * max(1, 3 // len(buffers))
    ways: dict[str, list[Call]] = {
        "sum": [numbers.view(torch.float32).sum for numbers in repeated],
        "amax": [numbers.amax for numbers in repeated],
    }
    times = interleaved({name: (graph(way), len(way)) for name, way in ways.items()})
    return min(median(found) for found in times.values())


def read_bandwidth() -> float:
    """Bytes a second that can be read of 4 GB."""
    return 4 * 2**30 / (1e-6 * reading(4 * 2**30))


def prefill(batch: int, context: int, span: int, generator: torch.Generator) -> dict[str, Any]:
    """Time and error of each way to compute spans of `span` tokens at the end of `context`."""
    from ..kernels.triton import extend, hopper

    case = problem(batch, context, span, generator, runs=True)
    query, seen, group = case.query, case.seen, HEADS // KV_HEADS
    shape = extend.shape_for(query, seen)
    ways: dict[str, Call] = {
        "triton": partial(extend.extend, query, seen, case.tiles(shape.rows // group), shape, False)
    }
    if torch.cuda.get_device_capability() == (9, 0):
        ways["hopper"] = partial(hopper.extend, query, seen, case.tiles(hopper.ROWS // group), False)
    dense = case.dense()
    for name, backend in BACKENDS.items():
        if span == context:
            ways[name] = partial(_torch, backend, *dense, is_causal=True, enable_gqa=True)
        elif name == "flash":  # keys are repeated beforehand: this way takes no groups
            wide = (dense[0], *(part.repeat_interleave(group, 1) for part in dense[1:]))
            ways[name] = partial(_torch, backend, *wide, attn_mask=causal_lower_right(span, context))
    visible = span * (2 * context - span + 1) // 2
    return {"batch": batch, "context": context, "span": span} | _measured(
        case, ways, 4, "teraflops", 4e-6 * batch * HEADS * WIDTH * visible
    )


def decode(batch: int, context: int, generator: torch.Generator) -> dict[str, Any]:
    """Time and error of single tokens over `context` keys of each request, caches cold."""
    from ..kernels.triton import decode

    size = 4 * batch * context * KV_HEADS * WIDTH
    cases = [problem(batch, context, 1, generator, False) for _ in range(max(1, int(-(-CACHE // size))))]
    plan = decode.plan(cases[0].query, cases[0].seen, batch, 1)
    ours = [partial(decode.decode, c.query, c.seen, c.tiles(1), 1, plan) for c in cases]
    ways: dict[str, Any] = {"triton": ours}
    if size <= DENSE:
        ways["flash"] = []
        for case in cases:
            query, keys, values = case.dense()
            folded = query.reshape(batch, KV_HEADS, -1, WIDTH)  # the heads of a key head are its queries
            ways["flash"].append(partial(_torch, BACKENDS["flash"], folded, keys, values))
    found = _measured(cases[0], ways, 20, "gigabytes", 1e-3 * size)
    if size <= READ:
        found["reading"] = reading(size)
    return {"batch": batch, "context": context, "parts": plan.split} | found


def _torch(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel([backend]):
        return scaled_dot_product_attention(query, key, value, **options)


def _measured(case: Problem, ways: dict[str, Any], calls: int, unit: str, amount: float) -> dict[str, Any]:
    """Times of all ways in turns, what they do in a microsecond in units of `amount`, and errors."""
    found: dict[str, Any] = {"microseconds": {}, unit: {}, "error": {}}
    graphs = {}
    for name, way in ways.items():
        group = way if isinstance(way, list) else [way]
        output = group[0]()
        if output.dim() == 4 and output.shape[1] == HEADS:
            output = output.transpose(1, 2).flatten(0, 1)
        found["error"][name] = case.error(output.reshape(case.query.shape))
        repeated = group * max(1, calls // len(group))
        graphs[name] = graph(repeated), len(repeated)
    found["microseconds"] = interleaved(graphs)
    found[unit] = {name: amount / median(times) for name, times in found["microseconds"].items()}
    return found


def bench(
    prefills: Sequence[tuple[int, int, int]] = PREFILLS,
    decodes: Sequence[tuple[int, int]] = DECODES,
    seed: int = 0,
    on_run: OnRun = lambda name: None,
) -> dict[str, Any]:
    """All of it.

    Args:
        prefills: Requests, tokens of each, and how many of them are computed.
        decodes: Requests and tokens of each.
        seed: Of the numbers.
        on_run: Called before each measurement.

    Returns:
        Times in microseconds of every round, tera floating-point operations and gigabytes a second, relative errors.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    report: dict[str, Any] = {"bench": "flash attention", "environment": environment()}
    report |= {"device": torch.cuda.get_device_name(), "read_gigabytes": 1e-9 * read_bandwidth(), "prefill": []}
    for numbers in prefills:
        on_run(f"prefill {numbers}")
        report["prefill"].append(prefill(*numbers, generator))
        torch.cuda.empty_cache()
    report["decode"] = []
    for pair in decodes:
        on_run(f"decode {pair}")
        report["decode"].append(decode(*pair, generator))
        torch.cuda.empty_cache()
    report["plain"] = []
    with torch.inference_mode():
        for case in plain.CASES:
            on_run(f"plain forward, {case.name}")
            report["plain"].append(plain.measure(case, (HEADS, KV_HEADS, WIDTH), generator))
            torch.cuda.empty_cache()
    report["passed"] = not failures(report)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """Ours with a larger error than torch's, a line for each."""
    lines = plain.failures(report["plain"])
    for found in (*report["prefill"], *report["decode"]):
        theirs = max((found["error"][name] for name in BACKENDS if name in found["error"]), default=None)
        for name, error in found["error"].items():
            if name not in BACKENDS and theirs is not None and error > 1.1 * theirs:
                lines.append(f"{name}, {found['batch']} x {found['context']}: error {error:.2e}, torch's {theirs:.2e}")
    return lines


def tables(report: dict[str, Any]) -> list[Table]:
    """A table for prompts and one for decoding."""
    machine = f"{report['device']}; torch {report['environment']['versions']['torch']}, bfloat16"
    shape = f"{HEADS} query heads, {KV_HEADS} key heads, width {WIDTH}"
    names = sorted({name for found in report["prefill"] for name in found["teraflops"]})
    rows = [
        [str(found["batch"]), f"{found['context']:,}", f"{found['span']:,}"]
        + [f"{found['teraflops'][name]:.0f}" if name in found["teraflops"] else "" for name in names]
        + [" ".join(f"{name} {1e3 * found['error'][name]:.2f}" for name in names if name in found["error"])]
        for found in report["prefill"]
    ]
    columns = ["requests", "context", "computed", *(f"{name} TFLOP/s" for name in names), "error, thousandths"]
    caption = (
        f"{machine}; {shape}; causal; medians of interleaved graph replays; ours over pages, torch's over dense keys"
    )
    prompts = Table("Prompts, and prompts behind a prefix", columns, rows, 3, caption)
    read = report["read_gigabytes"]
    rows = []
    for found in report["decode"]:
        ours, theirs = found["gigabytes"]["triton"], found["gigabytes"].get("flash")
        rows.append([f"{found['context']:,}", str(found["batch"]), f"{median(found['microseconds']['triton']):.1f}"])
        rows[-1] += [f"{ours:.0f}", f"{ours / read:.0%}", f"{theirs / read:.0%}" if theirs else ""]
        rows[-1] += [f"{found['reading']:.1f}" if "reading" in found else "", f"{1e3 * found['error']['triton']:.2f}"]
    columns = ["context", "requests", "µs", "GB/s", "of the read bandwidth", "torch's flash", "reading alone µs"]
    columns += ["error, thousandths"]
    caption = f"{machine}; {shape}; read bandwidth {read:.0f} GB/s, measured in the same run; pages in random order; "
    caption += "reading alone: as many bytes, by torch's fastest reduction"
    decoding = Table("Decoding", columns, rows, 2, caption)
    caption = f"{machine}; {shape}; a layer's attention, medians of {plain.ROUNDS} interleaved rounds of {plain.CALLS}"
    caption += " calls; stock: sdpa, for softcaps and sinks eager; errors against float64 in thousandths; "
    caption += "a forward makes a mask once"
    return [prompts, decoding, plain.table(report["plain"], caption)]
