"""A report of `bench all` on one slide, SVG, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from .all_cases import AUTOMATIC
from .all_plan import PARTS
from .all_tables import shown, verdicts
from .report import machine_text, model_text

WIDTH, HEIGHT = 1280, 720
LEFT, MIDDLE, RIGHT = 48, 640, WIDTH - 48  # the edges of the two halves
TOP, BOTTOM = 150, 610


@dataclass(frozen=True)
class Theme:
    """Colours, as `#rrggbb`."""

    back: str
    ink: str
    faint: str
    line: str
    bar: str
    bad: str


THEMES = {
    "light": Theme("#ffffff", "#1a1f24", "#5c6670", "#d5dade", "#1769aa", "#c62828"),
    "dark": Theme("#0d1117", "#e6edf3", "#9aa4af", "#30363d", "#58a6ff", "#ff7b72"),
}


def slide(report: Mapping[str, Any], theme: str = "light") -> str:
    """Draw it: `llmopt=True` case by case on the left, the matrix of combinations on the right.

    Args:
        report: Of `bench all`; of one that was not finished, what is there.
        theme: A name in `THEMES`.
    """
    colors, report = THEMES[theme], shown(report)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="14" '
        'font-family="Inter, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{colors.back}"/>',
        _text(LEFT, 62, "The same tokens, sooner", colors.ink, size=34, weight=700),
        _text(LEFT, 94, f"times as fast as stock transformers: {model_text(report['model'])}", colors.faint, size=17),
        *_bars(report["cases"], colors, bool(report.get("quick"))),
        *_heat(report["matrix"], colors),
    ]
    for number, line in enumerate(verdicts(report)[:3]):
        parts.append(_text(LEFT, 644 + 20 * number, line.partition("; ")[0], colors.ink, size=14))
    said = f"{machine_text(report['environment'])}; medians of {report['repeats']} interleaved rounds"
    if report.get("quick"):
        said = "few tokens of everything: no figure counts; " + said
    parts.append(_text(LEFT, HEIGHT - 12, said, colors.faint, size=12))
    return "\n".join([*parts, "</svg>", ""])


def _bars(cases: Sequence[Mapping[str, Any]], theme: Theme, quick: bool) -> Iterator[str]:
    yield _text(
        LEFT, TOP - 18, "llmopt=True" + ("" if quick else ", with 95 % intervals"), theme.ink, size=16, weight=600
    )
    found = [(case, case["ratios"].get(AUTOMATIC)) for case in cases]
    # An interval that is many times as wide as its bar would leave no room for the bars.
    top = max([min(ratio["high"] or 0.0, 1.5 * ratio["ratio"]) for _, ratio in found if ratio] or [1.0]) or 1.0
    start, end = LEFT + 250, MIDDLE - 80
    height = min(34.0, (BOTTOM - TOP) / max(1, len(found)))

    def x(times: float) -> float:
        return start + (end - start) * min(times, top) / top

    for number, (case, ratio) in enumerate(found):
        y = TOP + height * number
        middle, thick = y + height / 2, height * 0.55
        yield _text(start - 10, middle + 5, f"{case['name']}, {case['dtype']}", theme.ink, size=13, anchor="end")
        if ratio is None:
            yield _text(start + 6, middle + 5, "other tokens", theme.bad, size=13)
            continue
        color = theme.bar if quick or ratio["not_slower"] else theme.bad
        yield _box(start, y + (height - thick) / 2, x(ratio["ratio"]) - start, thick, color, radius=2)
        if ratio["low"] is not None:
            yield _line(x(ratio["low"]), middle, x(ratio["high"]), middle, theme.ink, 1.5)
        yield _text(
            x(max(ratio["high"] or 0.0, ratio["ratio"])) + 8, middle + 5, f"{ratio['ratio']:.1f} ×", theme.ink, size=13
        )
    if found:
        yield _line(x(1.0), TOP - 4, x(1.0), TOP + height * len(found), theme.faint, 1, dashes="4 3")
        yield _text(x(1.0), TOP + height * len(found) + 16, "stock", theme.faint, size=12, anchor="middle")


def _heat(units: Sequence[Mapping[str, Any]], theme: Theme) -> Iterator[str]:
    start = MIDDLE + 190
    yield _text(MIDDLE, TOP - 18, "every combination", theme.ink, size=16, weight=600)
    if not units:
        return
    columns = [cell["parts"] for cell in units[0]["cells"]]
    wide, high = (RIGHT - start) / len(columns), 48
    for row, part in enumerate(PARTS):
        y = TOP + 12 + 22 * row
        yield _text(start - 10, y + 5, part, theme.faint, size=13, anchor="end")
        for place, chosen in enumerate(columns):
            on = part in chosen
            yield (
                f'<circle cx="{start + wide * (place + 0.5):.1f}" cy="{y}" r="{6 if on else 2}" '
                f'fill="{theme.bar if on else theme.line}"/>'
            )
    ratios = [cell["ratio"]["ratio"] for unit in units for cell in unit["cells"] if cell["ratio"]]
    best = max([*ratios, 1.01])
    for row, unit in enumerate(units):
        y = TOP + 86 + (high + 6) * row
        for number, words in enumerate(unit["name"].split(", ")):
            yield _text(start - 10, y + 20 + 18 * number, words, theme.ink, size=13, anchor="end")
        for place, cell in enumerate(unit["cells"]):
            ratio = cell["ratio"]
            share = 0.0 if ratio is None else max(0.0, min(1.0, math.log(max(ratio["ratio"], 1.0)) / math.log(best)))
            fill = _mix(theme.back, theme.bar, 0.12 + 0.78 * share)
            ink = theme.back if share > 0.55 else theme.ink
            yield _box(start + wide * place + 2, y, wide - 4, high, fill if ratio else theme.back, 4, theme.line)
            words = "no" if ratio is None else f"{ratio['ratio']:.1f}"
            color = theme.bad if ratio is None else ink
            yield _text(
                start + wide * (place + 0.5), y + high / 2 + 5, words, color, size=15, weight=600, anchor="middle"
            )
    y = TOP + 86 + (high + 6) * len(units) + 12
    below = "with batching over stock's padded batch, else over a call for each request"
    yield _text(RIGHT, y, below, theme.faint, size=12, anchor="end")


def _mix(a: str, b: str, share: float) -> str:
    """A colour between two.

    Example:
        >>> _mix("#000000", "#ffffff", 0.5)
        '#808080'
    """
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in pairs)


def _text(x: float, y: float, words: str, color: str, size: int = 14, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, color: str, width: float, dashes: str = "none") -> str:
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _box(x: float, y: float, width: float, height: float, color: str, radius: int = 0, edge: str = "") -> str:
    drawn = f' stroke="{edge}"' if edge else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" rx="{radius}" '
        f'fill="{color}"{drawn}/>'
    )
