"""What reports of GPUs say that have no command of their own: decode steps, products with quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import Table, machine_text

FORMATS = {"int4": "int4, groups of 128", "int8": "int8", "float8": "fp8"}


def decoding(report: Mapping[str, Any]) -> list[Table]:
    """Milliseconds of a decode step by weights and rows; microseconds of attention by context and page format."""
    caption = f"{report['hardware']}; {report['shape']}; {report['what']}"
    attention = report["attention_us"]
    formats = {
        name: {case: times[name] for case, times in attention.items()} for name in next(iter(attention.values()))
    }
    steps = _grid("a decode step, ms", "rows", report["ms_per_step"], 2, caption)
    return [steps, _grid("attention of one layer, µs", "requests × context", formats, 0, report["hardware"])]


def products(report: Mapping[str, Any]) -> list[Table]:
    """How many times as fast as torch's bfloat16 products are, by format, size and rows; and a model's in one graph."""
    cells: dict[str, dict[str, float]] = {}
    for form, title in FORMATS.items():
        for found in report["products"]:
            if found["format"] == form:
                row = cells.setdefault(f"{title}, {found['outputs']} × {found['inputs']}", {})
                row[str(found["rows"])] = found["ratio"]
    errors = {
        kind: max(found["error"] for found in report["products"] if (found["way"] == "scaled") == (kind == "rounded"))
        for kind in ("kept", "rounded")
    }
    caption = (
        f"{machine_text(report['environment'])}; weights larger than the cache in turn; medians of 7 interleaved runs; "
        f"relative error in the same run: at most {errors['kept']:.4f}, and {errors['rounded']:.3f} where fp8 rounds "
        f"activations too; torch's own in bfloat16: {max(f['error_bfloat16'] for f in report['products']):.4f}"
    )
    stacks = [[str(found["rows"]), f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"]
              for found in report["stack"]]  # fmt: skip
    first = report["stack"][0]
    return [
        _grid("products, × torch in bfloat16", "rows", cells, 2, caption),
        Table(
            "all products of a model, × torch in bfloat16",
            ["rows", "×"],
            stacks,
            1,
            f"{first['layers']} layers of Llama-3-8B's shape, {FORMATS[first['format']]}, in one CUDA graph",
        ),
    ]


def layers(report: Mapping[str, Any]) -> list[Table]:
    """How many times as fast as bfloat16 a layer's products are with quantized weights, and all of them together."""
    cells: dict[str, dict[str, float]] = {}
    for form, parts in report["microseconds"].items():
        for name, found in parts.items():
            cells[f"{FORMATS[form]}: {name}"] = {rows: dense / ours for rows, (dense, ours) in found.items()}
        cells[f"{FORMATS[form]}: all"] = {
            rows: sum(found[rows][0] for found in parts.values()) / sum(found[rows][1] for found in parts.values())
            for rows in next(iter(parts.values()))
        }
    caption = f"{report['hardware']}; {report['shape']}; {report['what']}"
    return [_grid("products of a layer, × bfloat16", "rows", cells, 2, caption)]


def _grid(title: str, across: str, cells: Mapping[str, Mapping[str, float]], digits: int, caption: str) -> Table:
    """Rows by name, columns by the inner names, in the order of their numbers where they are numbers."""
    names = dict.fromkeys(name for row in cells.values() for name in row)
    columns = sorted(names, key=int) if all(name.isdigit() for name in names) else list(names)
    rows = [[name, *(f"{row[c]:.{digits}f}" if c in row else "" for c in columns)] for name, row in cells.items()]
    return Table(title, [across, *columns], rows, 1, caption)
