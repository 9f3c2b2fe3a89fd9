"""Pictures of reports as SVG, drawn by hand: they need no package and are the same everywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Texts inherit the root's colour; where the reader's screen is dark, so is the picture.
STYLE = (
    "<style>:root{fill:#222222}.page{fill:#ffffff}"
    "@media(prefers-color-scheme:dark){:root{fill:#dddddd}.page{fill:#1e2129}}</style>"
)
COLORS = ("#555555", "#9ecae1", "#1f77b4", "#2ca02c", "#ff7f0e", "#d62728", "#9467bd", "#8c564b")


def quantized_speed(found: Mapping[str, Any], width: int = 760) -> str:
    """Times as fast as stock over the rows of a decode step, a line for each method, with intervals.

    Args:
        found: An entry of `"speed"` of a report of `bench quantization`.
        width: Of the picture, in pixels.
    """
    cases = [case for case in found["cases"] if case["new_tokens"] > 1 and case["ratios"]]
    names = dict.fromkeys(name for case in cases for name in case["ratios"])
    lines = {name: [(case["rows"], case["ratios"][name]) for case in cases] for name in names}
    return lines_of_ratios(lines, f"requests in a step; times as fast as stock, {found['shape']}", width)


def quantized_quality(found: Mapping[str, Any], width: int = 760) -> str:
    """Perplexity as a multiple of full precision's, a dot with its interval for each method, on a logarithmic axis.

    Args:
        found: `"quality"` of a report of `bench quantization`.
        width: Of the picture, in pixels.
    """
    cases = found["cases"]
    left, right, height = 190, width - 30, 22
    ends = [
        end for case in cases for end in (case["times"]["low"], case["times"]["high"], case["times"]["value"]) if end
    ]
    low, high = math.log(min([*ends, 0.999])), math.log(max([*ends, 1.001]))
    bottom = 20 + height * len(cases)

    def x(times: float) -> float:
        return left + (right - left) * (math.log(times) - low) / (high - low)

    parts = _begin(width, bottom + 40)
    parts.append(_line(x(1), 10, x(1), bottom, "#777777"))
    for number, case in enumerate(cases):
        y, times, color = 20 + height * number, case["times"], COLORS[2]
        parts.append(f'<text x="8" y="{y + 4}">{case["name"]}</text>')
        if times["low"] is not None:
            parts.append(_line(x(times["low"]), y, x(times["high"]), y, color))
        parts.append(f'<circle cx="{x(times["value"]):.1f}" cy="{y}" r="4" fill="{color}"/>')
    for times in _ticks(math.exp(low), math.exp(high)):
        parts.append(f'<text x="{x(times):.1f}" y="{bottom + 14}" text-anchor="middle">{times:g}</text>')
    parts.append(f'<text x="{left}" y="{bottom + 32}">perplexity, times that of full precision</text>')
    return "\n".join([*parts, "</svg>", ""])


def prompts(cases: Sequence[Mapping[str, Any]], width: int = 760) -> str:
    """Times as fast as torch over the length of a prompt, a line for each number format and shape of heads.

    Args:
        cases: `"prompts"` of a report of `bench flash_attention` on the CPU.
        width: Of the picture, in pixels.
    """
    lines: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for case in cases:
        if case["span"] == case["context"]:
            heads, kv_heads, size = case["heads"]
            name = f"{case['dtype']}, {heads} heads over {kv_heads} of width {size}"
            lines.setdefault(name, []).append((case["span"], case["ratio"]))
    return lines_of_ratios(lines, "tokens of the prompt; times as fast as torch's attention on contiguous keys", width)


def speculation(report: Mapping[str, Any], width: int = 760) -> str:
    """Times as fast as plain decoding over the rows of a call, a line for each kind of text and drafter.

    Args:
        report: Of `bench speculative`.
        width: Of the picture, in pixels.
    """
    lines: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for workload in report["workloads"]:
        for name, way in workload["ways"].items():
            if ratio := way["over"].get("plain, decoding"):
                lines.setdefault(f"{workload['kind']}, {name}", []).append((workload["rows"], ratio))
    return lines_of_ratios(lines, "rows of a call; times as fast as plain decoding, behind the first token", width)


def lines_of_ratios(
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], below: str, width: int = 760
) -> str:
    """Ratios with their intervals, a line for each name; the places on the axis are equally far apart.

    Args:
        lines: By name: place, and `"ratio"`, `"low"` and `"high"`.
        below: What the axes are.
        width: Of the picture, in pixels.
    """
    top = max((_high(ratio) for line in lines.values() for _, ratio in line), default=1.0)
    left, right, upper, lower = 50, width - 10, 20 + 18 * len(lines), 330 + 18 * len(lines)
    steps = sorted({place for line in lines.values() for place, _ in line})
    x = {place: left + 30 + (right - left - 60) * i / max(1, len(steps) - 1) for i, place in enumerate(steps)}

    def y(times: float) -> float:
        return lower - (lower - upper - 20) * times / top

    parts = _begin(width, lower + 40)
    for times in range(math.floor(top) + 1):
        parts.append(_line(left, y(times), right, y(times), "#dddddd" if times != 1 else "#777777"))
        parts.append(f'<text x="{left - 6}" y="{y(times) + 4:.1f}" text-anchor="end">{times}</text>')
    for place in steps:
        parts.append(f'<text x="{x[place]:.1f}" y="{lower + 16}" text-anchor="middle">{place:,}</text>')
    parts.append(f'<text x="{left}" y="{lower + 34}">{below}</text>')
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[(number + 1) % len(COLORS)]
        parts.append(f'<rect x="{left}" y="{10 + 18 * number}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{left + 18}" y="{20 + 18 * number}">{name}</text>')
        points = [(x[place], ratio) for place, ratio in line]
        parts += [
            _line(x0, y(a["ratio"]), x1, y(b["ratio"]), color, 2) for (x0, a), (x1, b) in itertools.pairwise(points)
        ]
        for at, ratio in points:
            parts.append(f'<circle cx="{at:.1f}" cy="{y(ratio["ratio"]):.1f}" r="3" fill="{color}"/>')
            if ratio["low"] is not None:
                parts.append(_line(at, y(ratio["low"]), at, y(ratio["high"]), color))
    return "\n".join([*parts, "</svg>", ""])


def served(points: Sequence[Mapping[str, Any]], width: int = 760) -> str:
    """The share of requests that were answered within the limits over the rate at which they came.

    Args:
        points: `"points"` of a report of `bench serve`.
        width: Of the picture, in pixels.
    """
    lines: dict[str, list[tuple[float, dict[str, float | None]]]] = {}
    for point in sorted((point for point in points if point["rate"] is not None), key=lambda point: point["rate"]):
        share = point["goodput"] * point["seconds"] / point["requests"]
        lines.setdefault(point["way"], []).append(
            (round(point["rate"], 1), {"ratio": share, "low": None, "high": None})
        )
    return lines_of_ratios(lines, "requests/s; share of them that was answered within the limits", width)


def page_formats(report: Mapping[str, Any], width: int = 760) -> str:
    """Memory and time of a step with each page format, bars beside those of bfloat16.

    Args:
        report: Of `bench kv_cache --long`.
        width: Of the picture, in pixels.
    """
    size, steps = report["speed"]["page_bytes"], report["speed"]["ms_per_step"]
    first, names = next(iter(size)), list(size)
    left, right, height = 90, width - 150, 46
    parts = _begin(width, 50 + height * len(names))
    for number, name in enumerate(names):
        y = 16 + height * number
        parts.append(f'<text x="8" y="{y + 22}">{name}</text>')
        pairs = (("memory", size[name], size[first]), ("step", steps[name]["median"], steps[first]["median"]))
        for place, (what, value, whole) in enumerate(pairs):
            top, long = y + 18 * place, (right - left) * value / whole
            parts.append(f'<rect x="{left}" y="{top}" width="{long:.1f}" height="15" fill="{COLORS[1 + place]}"/>')
            parts.append(f'<text x="{left + long + 6:.1f}" y="{top + 12}">{what} {value / whole:.2f}</text>')
    below = f"keys and values, and a decode step behind {report['speed']['context']:,} tokens, beside bfloat16"
    parts.append(f'<text x="{left}" y="{height * len(names) + 38}">{below}</text>')
    return "\n".join([*parts, "</svg>", ""])


def schedule(recorded: Mapping[str, Any], width: int = 900) -> str:
    """Draw a recorded schedule: a line for each request, a bar for each span, time from left to right.

    Args:
        recorded: `"timeline"` of a report of `bench continuous_batching`.
        width: Of the picture, in pixels.
    """
    left, top, height = 60, 44, 18
    requests, steps = recorded["requests"], recorded["steps"]
    end = max(step["ended"] for step in steps)
    bottom = top + height * len(requests)

    def x(seconds: float) -> float:
        return left + (width - left - 10) * max(0.0, seconds) / end

    colors = {"prompt": "#1f77b4", "token": "#9ecae1", "wait": "#bbbbbb", "lost": "#d62728"}
    parts = _begin(width, bottom + 30)
    for place, (color, name) in enumerate(
        [("prompt", "prompt"), ("token", "new token"), ("wait", "waits"), ("lost", "loses its pages")]
    ):
        parts.append(f'<rect x="{left + 150 * place}" y="12" width="12" height="12" fill="{colors[color]}"/>')
        parts.append(f'<text x="{left + 150 * place + 18}" y="22">{name}</text>')
    for number, request in enumerate(requests):
        y = top + height * number
        last = max((step["ended"] for step in steps if any(s[0] == number for s in step["spans"])), default=end)
        parts.append(f'<text x="4" y="{y + 12}">{number + 1}: {request["prompt"]}+{request["new"]}</text>')
        parts.append(_line(x(request["arrived"]), y + 8, x(last), y + 8, colors["wait"]))
    for step in steps:
        begin, size = x(step["began"]), max(0.5, x(step["ended"]) - x(step["began"]) - 0.3)
        for number, first, length in step["spans"]:
            kind = "prompt" if first + length <= requests[number]["prompt"] or length > 1 else "token"
            parts.append(
                f'<rect x="{begin:.1f}" y="{top + height * number + 2}" width="{size:.1f}" height="{height - 6}" '
                f'fill="{colors[kind]}"/>'
            )
        for number in step["preempted"]:
            parts.append(
                f'<rect x="{begin - 1:.1f}" y="{top + height * number}" width="2" height="{height - 2}" '
                f'fill="{colors["lost"]}"/>'
            )
    parts.append(f'<text x="{left}" y="{bottom + 18}">0 s</text>')
    parts.append(f'<text x="{width - 10}" y="{bottom + 18}" text-anchor="end">{end:.2f} s</text>')
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float) -> Sequence[float]:
    step = next(
        (step for step in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / step <= 8), 5.0
    )
    first = math.ceil(low / step)
    return [round(number * step, 6) for number in range(first, math.floor(high / step) + 1) if number > 0]


def _high(ratio: Mapping[str, Any]) -> float:
    return float(ratio["ratio"] if ratio["high"] is None else min(ratio["high"], 2 * ratio["ratio"]))


def _begin(width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        STYLE,
        f'<rect width="{width}" height="{height}" fill="white" class="page"/>',
    ]


def _line(x0: float, y0: float, x1: float, y1: float, color: str, width: int = 1) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" stroke-width="{width}"/>'
