"""Everything in one run: each part alone, the presets, and the matrix of all combinations, against stock.

What was measured is handed on after every unit (a case, a pair of number formats), and a report that was begun goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from hf_llmopt.errors import InvalidOption

from . import all_cases, all_matrix
from .all_plan import PAGES, WEIGHTS, Case, Plan, Source, cells, name_of, rounds_of
from .kv_cache import describe
from .measure import environment

SECTIONS = ("cases", "quality", "matrix")
Keep = Callable[[dict[str, Any]], None]


def bench(
    source: Source,
    plan: Plan,
    *,
    only: Sequence[str] = SECTIONS,
    former: Mapping[str, Any] | None = None,
    keep: Keep = lambda report: None,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure, unit by unit.

    Args:
        source: The model.
        plan: How much.
        only: Of `SECTIONS`: calls of `generate` in every way; what number formats cost; the matrix.
        former: A report of the same model, plan and machine that was not finished: its units are not measured again.
        keep: Called with the report after every unit.
        on_run: Called with what has run, `runs_of` times in all.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether tokens were the same, quality kept its bounds and
        llmopt served its calls; `report["complete"]`, whether everything that was asked for is there.

    Raises:
        InvalidOption: `former` was measured with something else; the message says what differs.
    """
    report: dict[str, Any] = {
        "bench": "all",
        "schema": 1,
        "name": source.name,
        "seed": source.seed,
        "repeats": plan.repeats,
        "prompts": "random ids" if source.texts is None else "held-out text",
        "environment": environment(),
        "plan": _plain(asdict(plan)),
        "baseline": all_cases.STOCK,
        "complete": False,
        "model": None,
        **{section: [] for section in SECTIONS},
    }
    if former is not None:
        _require_same(report, former)
        report |= {"model": former["model"], **{section: list(former[section]) for section in SECTIONS}}
    if "cases" in only:
        for dtype in dict.fromkeys((source.dtype, *plan.dtypes)):
            _cases(report, source, plan, dtype, keep, on_run)
    if {"quality", "matrix"} & set(only):
        _formats(report, source, plan, only, keep, on_run)
    report["complete"] = True
    _judge(report)
    keep(report)
    return report


def runs_of(plan: Plan, dtype: str, only: Sequence[str] = SECTIONS, former: Mapping[str, Any] | None = None) -> int:
    """How often `bench` calls `on_run`."""
    done = {section: {_key(unit) for unit in former[section]} if former else set() for section in SECTIONS}
    rounds, count = plan.repeats + 1, 0
    if "cases" in only:
        for name in dict.fromkeys((dtype, *plan.dtypes)):
            left = [case for case in _served(plan, name) if (case.name, name) not in done["cases"]]
            count += len(left) * len(all_cases.WAYS) * rounds
    pairs = [(name_of(weights, pages, dtype), None) for weights in WEIGHTS for pages in PAGES]
    if "quality" in only:
        count += sum(pair not in done["quality"] for pair in pairs)
    if "matrix" in only:
        count += sum(pair not in done["matrix"] for pair in pairs) * (len(list(cells())) + 2) * rounds
    return count


def _served(plan: Plan, dtype: str) -> Iterator[Case]:
    """The cases in a number format: below float32 a near tie is another one for each draw of noise."""
    return (case for case in plan.cases if dtype == "float32" or not case.sampled)


def _key(unit: Mapping[str, Any]) -> tuple[str, str | None]:
    return unit["name"], unit.get("dtype")


def _cases(
    report: dict[str, Any], source: Source, plan: Plan, dtype: str, keep: Keep, on_run: Callable[[str], None]
) -> None:
    done, model = {_key(unit) for unit in report["cases"]}, None
    for case in _served(plan, dtype):
        if (case.name, dtype) not in done:
            model = _loaded(report, source, dtype, model)
            unit = all_cases.measure(
                model,
                case,
                source,
                plan.repeats,
                lambda way, case=case: on_run(f"{case.name}, {dtype}: {way}"),  # type: ignore[misc]
            )
            _add(report, "cases", unit, keep)


def _formats(
    report: dict[str, Any],
    source: Source,
    plan: Plan,
    only: Sequence[str],
    keep: Keep,
    on_run: Callable[[str], None],
) -> None:
    done = {section: {unit["name"] for unit in report[section]} for section in ("quality", "matrix")}
    full: PreTrainedModel | None = None
    for weights in WEIGHTS:
        model: PreTrainedModel | None = None  # the former one goes before the next one comes
        gc.collect()
        for pages in PAGES:
            name = name_of(weights, pages, source.dtype)
            left = [section for section in done if section in only and name not in done[section]]
            if not left:
                continue
            full = _loaded(report, source, source.dtype, full)
            model = model if model is not None else all_matrix.quantized(full, weights)
            if "quality" in left:
                unit = all_matrix.measure_quality(model, full, weights, pages, source, plan)
                on_run(f"{name}: quality")
                _add(report, "quality", unit, keep)
            if "matrix" in left:
                rounds = rounds_of(source, full, plan)
                say = lambda way, name=name: on_run(f"{name}: {way}")  # noqa: E731
                unit = all_matrix.measure_group(model, full, weights, pages, source, rounds, say)
                _add(report, "matrix", unit, keep)


def _loaded(report: dict[str, Any], source: Source, dtype: str, model: PreTrainedModel | None) -> PreTrainedModel:
    if model is None:
        model = source.load(dtype)
    if report["model"] is None:
        report["model"] = {**describe(model), "dtype": source.dtype, "name": source.name}
    return model


def _add(report: dict[str, Any], section: str, unit: dict[str, Any], keep: Keep) -> None:
    report[section].append(unit)
    _judge(report)
    keep(report)


def _judge(report: dict[str, Any]) -> None:
    report["passed"] = not failures(report)
    report["never_slower"] = not slower(report)


def failures(report: Mapping[str, Any]) -> list[str]:
    """Why the report did not pass, a line for each reason."""
    units = (unit for section in SECTIONS[:2] for unit in report[section])
    found = [f"{unit['name']}: {reason}" for unit in units for reason in unit["reasons"]]
    for unit in report["matrix"]:
        found += [f"{unit['name']}, {cell['name']}: {reason}" for cell in unit["cells"] for reason in cell["reasons"]]
    return found


def slower(report: Mapping[str, Any]) -> list[str]:
    """The cases in which `llmopt=True` was not shown to be as fast as stock."""
    return [
        f"{case['name']}, {case['dtype']}"
        for case in report["cases"]
        if not case["ratios"].get(all_cases.AUTOMATIC, {}).get("not_slower", False)
    ]


def _require_same(report: Mapping[str, Any], former: Mapping[str, Any]) -> None:
    """Refuse to mix measurements of different things."""
    differ = [name for name in ("bench", "schema", "name", "seed", "plan") if former.get(name) != report[name]]
    theirs = former.get("environment", {})
    differ += [
        f"environment.{name}"
        for name in ("hardware", "threads", "versions", "git")
        if theirs.get(name) != report["environment"][name]
    ]
    if differ:
        raise InvalidOption(
            f"The report that was begun was made with another {', '.join(differ)}: its figures do not belong beside "
            "new ones. Write to another file, or leave --resume out to begin again."
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
