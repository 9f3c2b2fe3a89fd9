"""Pages in host memory, beside pages on the device and stock's offloaded cache: steps, prompts and device memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt.generation import handle_of
from hf_llmopt.kv_cache.transfer import pinned_zeros

from .equality import worst
from .kv_cache import describe
from .measure import Ratio, Run, environment, generate, paired_ratio, summary
from .report import Table, machine_text, model_text, same_text
from .workloads import build

STOCK, RIVAL, OURS, LOSSY = "stock", "stock, offloaded", "llmopt, offloaded", "llmopt, offloaded, int8"
WAYS: dict[str, dict[str, Any]] = {
    STOCK: {},
    RIVAL: {"cache_implementation": "offloaded"},
    "llmopt": {"llmopt": "kv_cache"},
    OURS: {"llmopt": {"kv_cache": {"offload": True}}},
    LOSSY: {"llmopt": {"kv_cache": {"offload": True, "dtype": "int8"}}},
}
CONTEXTS = 8192, 32768
BEYOND = 131072  # tokens whose keys and values do not fit beside the weights under `ROOM`
ROOM = 6 * 2**30  # bytes of device memory beside the weights
STEPS = 16


def steps(quick: bool = False) -> int:
    """How often `on_run` is called."""
    return (1 if quick else len(CONTEXTS)) * len(WAYS) + 2


def bench(
    shape: str = "8b-llama",
    repeats: int = 3,
    seed: int = 0,
    quick: bool = False,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure one request behind long prompts, in every way, and a context that is larger than the device's memory.

    The ways run one after the other: where pages lie is a matter of the engine, and each has its own.

    Args:
        shape: Of the model, bfloat16, random weights.
        repeats: Timed runs of each way, after some that are not timed.
        seed: Of weights and prompts.
        quick: A miniature model and short contexts: no figure counts.
        on_run: Called before each measurement.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether all tokens were the same and llmopt served its
        calls.
    """
    model = build(shape, torch.bfloat16, seed, quick, "cuda")
    contexts, beyond = ((256,), 512) if quick else (CONTEXTS, BEYOND)
    report: dict[str, Any] = {
        "bench": "kv_cache --offload",
        "environment": environment(),
        "model": {"name": shape, **describe(model)},
        "repeats": repeats,
        "seed": seed,
        "host_to_device": _bus(2**22 if quick else 2**30),
        "contexts": [_context(model, tokens, repeats, seed, on_run) for tokens in contexts],
        "beyond": _beyond(model, beyond, seed, on_run),
    }
    report["passed"] = not failures(report)
    return report


def _bus(nbytes: int) -> float:
    """Bytes a second that a copy from pinned memory reaches."""
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    host = pinned_zeros((nbytes,), torch.uint8, device.device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return nbytes / min(times)


def _prompt(model: PreTrainedModel, tokens: int, seed: int) -> dict[str, Tensor]:
    drawn = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids = drawn.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor], **way: Any) -> tuple[Run, int]:
    """A call, and the most bytes that it took on the device, without the weights."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    weights = sum(weight.nbytes for weight in model.parameters())
    found = generate(model, inputs, max_new_tokens=STEPS + 1, do_sample=False, eos_token_id=None, **way)
    return found, torch.cuda.max_memory_allocated() - weights


def _release(model: PreTrainedModel) -> None:
    """Give back what the way before took: pages, graphs, the allocator's blocks."""
    handle_of(model).release()
    gc.collect()
    torch.cuda.empty_cache()


def _context(
    model: PreTrainedModel, tokens: int, repeats: int, seed: int, on_run: Callable[[str], None]
) -> dict[str, Any]:
    inputs, runs, taken = _prompt(model, tokens, seed), {}, {}
    for name, way in WAYS.items():
        on_run(f"{tokens:,} tokens, {name}")
        _release(model)
        for _ in range(2):  # until graphs are there, and kernels are chosen
            _run(model, inputs, **way)
        found = [_run(model, inputs, **way) for _ in range(repeats)]
        runs[name], taken[name] = [run for run, _ in found], max(nbytes for _, nbytes in found)
    _release(model)
    expected = runs[STOCK][0].output
    exact = [name for name in WAYS if name != LOSSY]
    equality = {name: worst(model, inputs, expected, (run.output for run in runs[name])) for name in exact}
    return {
        "context": tokens,
        "page_bytes": {name: found[-1].stats.page_bytes for name, found in runs.items() if found[-1].stats},
        "ms_per_step": {name: summary(run.ms_per_step for run in found) for name, found in runs.items()},
        "time_to_first_token": {name: summary(r.time_to_first_token for r in found) for name, found in runs.items()},
        "device_bytes": taken,
        "equality": {name: outcome.to_dict() for name, outcome in equality.items()},
        "ratios": {
            name: vars(paired_ratio([r.ms_per_step for r in runs[RIVAL]], [r.ms_per_step for r in runs[name]]))
            for name in (OURS, LOSSY)
        },
        "reasons": [
            *(
                f"{name} gave other tokens than stock ({found.farthest})"
                for name, found in equality.items()
                if not found.same
            ),
            *_unserved(runs),
        ],
    }


def _beyond(model: PreTrainedModel, tokens: int, seed: int, on_run: Callable[[str], None]) -> dict[str, Any]:
    """A context whose pages do not fit: under a limit of memory, and without it for the tokens."""
    inputs, way = _prompt(model, tokens, seed), {"llmopt": {"kv_cache": {"offload": True}}}
    weights = sum(weight.nbytes for weight in model.parameters())
    limit = weights + ROOM
    runs = {}
    for name, share in (("limited", limit / torch.cuda.mem_get_info()[1]), ("free", 1.0)):
        on_run(f"{tokens:,} tokens, {name}")
        _release(model)
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        runs[name] = _run(model, inputs, **way)
    torch.cuda.set_per_process_memory_fraction(1.0)
    run, taken = runs["limited"]
    same = torch.equal(run.output, runs["free"][0].output)
    return {
        "context": tokens,
        "limit": limit,
        "weights": weights,
        "page_bytes": run.stats.page_bytes if run.stats else 0,
        "device_bytes": taken,
        "ms_per_step": run.ms_per_step,
        "time_to_first_token": run.time_to_first_token,
        "same_tokens": same,
        "reasons": ([] if same else ["other tokens than without the limit"]) + _unserved({"limited": [run]}),
    }


def _unserved(runs: Mapping[str, list[Run]]) -> list[str]:
    stats = [(name, run.stats) for name, found in runs.items() for run in found[-1:] if run.stats]
    return [f"{name}: transformers served the call: {s.reason}" for name, s in stats if s.served_by != "llmopt"]


def failures(report: Mapping[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    parts = [*report["contexts"], report["beyond"]]
    return [f"{part['context']:,} tokens: {reason}" for part in parts for reason in part["reasons"]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """One table, a row for each context and way."""
    bus, beyond, rows = report["host_to_device"], report["beyond"], []
    for part in report["contexts"]:
        for name, found in part["ms_per_step"].items():
            ratio, size = part["ratios"].get(name), part["page_bytes"].get(name)
            rows.append([f"{part['context']:,}", name, f"{found['median']:.1f}"])
            rows[-1] += [
                _share(size, found["median"], bus) if ratio else "",
                f"{part['time_to_first_token'][name]['median']:.2f}",
                f"{part['device_bytes'][name] / 2**30:.2f}",
                same_text(part["equality"][name]) if name in part["equality"] else "lossy",
                str(Ratio(**ratio)) if ratio and not part["reasons"] else "",
            ]
    step = beyond["ms_per_step"]
    rows.append([f"{beyond['context']:,}", f"{OURS}, {beyond['limit'] / 2**30:.0f} GiB for all", f"{step:.1f}"])
    rows[-1] += [
        _share(beyond["page_bytes"], step, bus),
        f"{beyond['time_to_first_token']:.2f}",
        f"{beyond['device_bytes'] / 2**30:.2f}",
        "as without the limit" if beyond["same_tokens"] else "NO",
        "",
    ]
    columns = ["context", "way", "ms/step", "of the bus", "prompt s", "GiB on the device", "same tokens", f"× {RIVAL}"]
    caption = (
        f"{machine_text(report['environment'])}; {model_text(report['model'])}; greedy, one request; device memory "
        f"without the weights' {beyond['weights'] / 2**30:.1f} GiB; the bus copies {bus / 1e9:.0f} GB/s from pinned "
        f"memory; medians of {report['repeats']} runs; × is the geometric mean of paired ratios with its 95 % interval"
    )
    return [Table("Pages in host memory", columns, rows, 2, caption)]


def _share(nbytes: int, ms: float, bus: float) -> str:
    return f"{100 * nbytes / (1e-3 * ms) / bus:.0f} %"
