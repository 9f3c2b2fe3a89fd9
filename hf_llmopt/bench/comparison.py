"""Two reports of one benchmark beside each other: every ratio, and every figure that has samples, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hf_llmopt.errors import InvalidOption

from .measure import Ratio, t_quantile
from .report import Table

Path = tuple[str, ...]
SETTINGS = ("environment", "plan", "model")  # what a report was made with is no figure
NAMED = ("name", "dtype", "way")  # what tells the entries of a list apart
COLUMNS = ["what", "first", "second", "second / first", ""]
MACHINE = ("hardware", "threads", "cpu_capability")


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Set the figures of two reports beside each other.

    Ratios were made from pairs of runs on one machine: they may be compared across machines too. Times may not; their
    samples are not paired, so the interval is Welch's on the logarithms.

    Args:
        first: A report of any benchmark, as read back from JSON.
        second: Another one of the same benchmark.

    Returns:
        `"ratios"` and `"figures"`, lists of `"what"`, the two values, and how many times as large the second is, with
        the ends of its 95 % interval, `None` where there is none; `"missing"`, what only one of them has; `"machines"`,
        what of hardware, threads and versions differs.

    Raises:
        InvalidOption: They are of different benchmarks.
    """
    if first.get("bench") != second.get("bench"):
        raise InvalidOption(
            f"The reports are of two benchmarks, {first.get('bench')!r} and {second.get('bench')!r}: their figures are "
            "of different things. Give two reports of one."
        )
    ours, theirs = dict(leaves(first)), dict(leaves(second))
    both = [path for path in ours if path in theirs]
    found: dict[str, list[dict[str, Any]]] = {"ratios": [], "figures": []}
    for path in both:
        kind = "ratios" if "ratio" in ours[path] else "figures"
        entry = (_of_ratios if kind == "ratios" else _of_samples)(ours[path], theirs[path])
        if entry is not None:
            found[kind].append({"what": _called(path), **entry})
    return {
        "bench": "compare",
        "schema": 1,
        "of": first.get("bench"),
        "passed": bool(first.get("passed", True) and second.get("passed", True)),
        "machines": _differences(first, second),
        "quick": bool(first.get("quick") or second.get("quick")),
        **found,
        "missing": [_called(path) for path in [*ours, *theirs] if path not in both],
    }


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every ratio with its interval, and every figure with samples, by where it stands in a report.

    Example:
        >>> report = {"cases": [{"name": "one", "seconds": {"median": 1.0, "samples": [1.0, 1.0]}}]}
        >>> [path for path, _ in leaves(report)]
        [('cases', 'one', 'seconds')]
    """
    if isinstance(value, Mapping):
        if "samples" in value or {"ratio", "low", "high"} <= set(value):
            yield path, value
        else:
            for name, inner in value.items():
                if path or name not in SETTINGS:
                    yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if isinstance(inner, Mapping):
                name = " ".join(str(inner[key]) for key in NAMED if isinstance(inner.get(key), str))
                name += f" × {inner['over']}" if isinstance(inner.get("over"), str) else ""
                yield from leaves(inner, (*path, name or str(number)))


def _called(path: Path) -> str:
    """A figure's name: where it stands; of a ratio, of which case and of what over what."""
    if "ratios" not in path:
        return ", ".join(path)
    place = path.index("ratios")
    return f"{', '.join(path[1:place])}: {', '.join(path[place + 1 :])}"


def below(report: Mapping[str, Any], bound: float) -> list[str]:
    """The ratios that fell below a share of what they were, a line each."""
    return [
        f"{entry['what']}: {entry['second']:.2f}, was {entry['first']:.2f}"
        for entry in report["ratios"]
        if entry["second"] < bound * entry["first"]
    ]


def tables(report: Mapping[str, Any], figures: bool = True) -> list[Table]:
    """The tables of a comparison.

    Args:
        report: As `compare` returned it.
        figures: Show those that have samples too, not only ratios.
    """
    caption = "second / first, with its 95 % interval; higher, lower: the interval does not hold 1"
    if report["machines"]:
        caption += f"; the reports differ in {', '.join(report['machines'])}: times say little, ratios more"
    if report["quick"]:
        caption += "; one of them is of --quick: no figure counts"
    if report["missing"]:
        caption += f"; {len(report['missing'])} are in one of them only"
    made = [
        Table(f"compare: {kind} of {report['of']}", COLUMNS, _rows(report[kind]), 1)
        for kind in ("ratios", "figures")
        if report[kind] and (figures or kind == "ratios")
    ]
    return [*made[:-1], Table(made[-1].title, made[-1].columns, made[-1].rows, 1, caption)] if made else []


def _rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            entry["what"],
            *(f"{entry[side]:.4g}" for side in ("first", "second")),
            str(Ratio(entry["times"], entry["low"], entry["high"])),
            "" if entry["low"] is None else "higher" if entry["low"] > 1 else "lower" if entry["high"] < 1 else "",
        ]
        for entry in entries
    ]


def _of_ratios(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many times as large a ratio is; their logarithms' intervals add up as those of independent errors."""
    if not _positive(first["ratio"], second["ratio"]):
        return None
    times = second["ratio"] / first["ratio"]
    low = high = None
    if _positive(first["low"], second["low"], first["high"], second["high"]):
        halves = [math.log(each["high"] / each["low"]) / 2 for each in (first, second)]
        width = math.exp(min(math.hypot(*halves), 700.0))
        low, high = times / width, times * width
    return {"first": first["ratio"], "second": second["ratio"], "times": times, "low": low, "high": high}


def _of_samples(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many times as large a figure is: Welch's t on the logarithms; `None` where one is not positive."""
    if not all(isinstance(each["samples"], list) and _positive(*each["samples"]) for each in (first, second)):
        return None
    samples = [np.asarray(each["samples"], dtype=float) for each in (first, second)]
    if not all(map(len, samples)):
        return None
    logs = [np.log(each) for each in samples]
    times = float(np.exp(logs[1].mean() - logs[0].mean()))
    low = high = None
    if min(map(len, logs)) > 1:
        parts = [float(each.var(ddof=1)) / len(each) for each in logs]
        error = math.sqrt(sum(parts))
        weights = sum(part**2 / (len(each) - 1) for part, each in zip(parts, logs, strict=True))
        freedom = int(error**4 / weights) if weights else len(logs[0]) + len(logs[1]) - 2
        width = math.exp(min(t_quantile(max(1, freedom)) * error, 700.0))
        low, high = times / width, times * width
    medians = [float(np.median(each)) for each in samples]
    return {"first": medians[0], "second": medians[1], "times": times, "low": low, "high": high}


def _positive(*values: Any) -> bool:
    """Whether all are numbers that have a logarithm."""
    return all(isinstance(value, int | float) and value > 0 for value in values)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    one, other = (report.get("environment") or {} for report in (first, second))
    differ = [name for name in MACHINE if one.get(name) != other.get(name)]
    versions = [each.get("versions") or {} for each in (one, other)]
    return differ + [name for name in versions[0] if versions[0][name] != versions[1].get(name)]
