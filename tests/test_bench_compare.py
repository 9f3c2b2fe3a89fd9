"""`bench compare`: intervals of two reports' figures, and what they may not be compared for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_llmopt.bench import comparison
from hf_llmopt.bench.all_cases import WAYS
from hf_llmopt.bench.all_plan import Plan
from hf_llmopt.bench.measure import summary
from hf_llmopt.cli import app
from hf_llmopt.errors import InvalidOption

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def report(seconds: list[float], ratio: tuple[float, float | None, float | None], **more) -> dict:
    case = {"name": "one", "dtype": "float32", "seconds": summary(seconds)}
    ends = dict(zip(("ratio", "low", "high"), ratio, strict=True))
    return {"bench": "all", "passed": True, "cases": [{**case, "ratios": {"True": ends}}], **more}


def test_figures_are_found_by_name_not_by_place() -> None:
    first = {"bench": "b", "cases": [{"name": "x", "ms": summary([1.0])}, {"name": "y", "ms": summary([2.0])}]}
    second = {"bench": "b", "cases": [*first["cases"][::-1], {"name": "z", "ms": summary([3.0])}]}
    found = comparison.compare(first, second)
    assert [(entry["what"], entry["times"]) for entry in found["figures"]] == [("cases, x, ms", 1), ("cases, y, ms", 1)]
    assert found["missing"] == ["cases, z, ms"]


def test_a_ratio_is_called_by_what_is_over_what() -> None:
    ends = {"way": "llmopt", "over": "stock", "ratio": 2.0, "low": 1.9, "high": 2.1}
    saved = {"bench": "kv_cache", "workloads": [{"name": "long", "ratios": [ends]}]}
    assert [entry["what"] for entry in comparison.compare(saved, saved)["ratios"]] == ["long: llmopt × stock"]


def test_ratios_of_ratios() -> None:
    found = comparison.compare(report([1.0], (2.0, 1.8, 2.2)), report([1.0], (1.0, 0.9, 1.1)))
    (entry,) = found["ratios"]
    assert entry["what"] == "one float32: True"
    assert entry["times"] == pytest.approx(0.5)
    assert 0.5 * (1.8 / 2.2) < entry["low"] < 0.45 < 0.55 < entry["high"] < 0.5 * (2.2 / 1.8)
    assert comparison.below(found, 0.6) == ["one float32: True: 1.00, was 2.00"]
    assert comparison.below(found, 0.4) == []
    without = comparison.compare(report([1.0], (2.0, None, None)), report([1.0], (1.0, 0.9, 1.1)))["ratios"][0]
    assert (without["low"], without["high"]) == (None, None)


def test_intervals_of_times_cover() -> None:
    """Of samples with different noise, the interval holds the true ratio about 95 times in 100."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        a, b = np.exp(rng.normal(0, 0.05, 5)), 1.3 * np.exp(rng.normal(0, 0.15, 7))
        (entry,) = comparison.compare(report(a.tolist(), (1, 1, 1)), report(b.tolist(), (1, 1, 1)))["figures"]
        inside += entry["low"] <= 1.3 <= entry["high"]
    assert 0.93 <= inside / 1000 <= 0.975


def test_what_has_no_interval_or_no_logarithm() -> None:
    first, second = report([1.0], (1, 1, 1)), report([2.0], (1, 1, 1))
    (entry,) = comparison.compare(first, second)["figures"]
    assert (entry["times"], entry["low"]) == (2.0, None)
    assert comparison.compare(report([0.0, 0.0], (1, 1, 1)), second)["figures"] == []
    same = comparison.compare(report([2.0, 2.0], (1, 1, 1)), report([2.0, 2.0], (1, 1, 1)))["figures"][0]
    assert (same["low"], same["high"]) == (1, 1)


def test_other_benchmarks_and_machines() -> None:
    with pytest.raises(InvalidOption, match="two benchmarks, 'all' and 'cpu'"):
        comparison.compare(report([1.0], (1, 1, 1)), {"bench": "cpu"})
    one = report([1.0], (1, 1, 1), environment={"hardware": "a", "threads": 2, "versions": {"torch": "1"}})
    other = report([1.0], (1, 1, 1), environment={"hardware": "b", "threads": 2, "versions": {"torch": "2"}})
    found = comparison.compare(one, other)
    assert found["machines"] == ["hardware", "torch"]
    assert "differ in hardware, torch" in comparison.tables(found)[-1].caption


@pytest.mark.parametrize(
    "name", ["kv_cache", "prompt_cache", "quantization", "speculative", "continuous_batching", "cpu-1"]
)
def test_every_benchmark_has_figures_to_compare(name: str) -> None:
    saved = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    found = comparison.compare(saved, saved)
    assert found["ratios"]
    assert all(entry["times"] == 1 for kind in ("ratios", "figures") for entry in found[kind])
    assert len({entry["what"] for entry in found["ratios"]}) == len(found["ratios"])
    assert found["missing"] == []


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(report([1.0, 1.1], (2.0, 1.9, 2.1))))
    second.write_text(json.dumps(report([3.0, 3.1], (0.5, 0.4, 0.6))))
    done = run(first, second, "--bound", "0.5", "--figures")
    assert done.exit_code == 0  # whatever the figures say
    assert "lower" in done.stdout
    assert "higher" in done.stdout
    assert "below 0.5 of what it was: one float32: True: 0.50, was 2.00" in done.stderr
    assert "seconds" not in run(first, second).stdout
    assert json.loads(run(first, second, "--json").stdout)["ratios"][0]["times"] == 0.25
    assert run(first, second, "--markdown").stdout.startswith("**compare: ratios of all**")
    assert run(first, second, "--only", "float64").exit_code == 1
    first.write_text("[]")
    assert "no report" in run(first, second).output
    first.write_text("{")
    assert "no JSON" in run(first, second).output


def test_the_baseline_is_of_what_ci_measures() -> None:
    """`.ci/run` measures the cases that the baseline has, and its figures do not judge."""
    baseline = json.loads((RESULTS / "baseline.json").read_text("utf-8"))
    asked = (RESULTS.parent.parent / ".ci" / "run").read_text("utf-8")
    assert baseline["command"].partition(" --output")[0] in asked.replace("wheel/bin/", "")
    assert baseline["passed"]
    assert baseline["complete"]
    found = comparison.compare(baseline, baseline)
    assert {entry["what"].rpartition(": ")[2] for entry in found["ratios"]} == set(WAYS) - {"stock"}
    assert [entry["what"].rpartition(": ")[0] for entry in found["ratios"] if entry["what"].endswith(": True")] == [
        f"{case.name} bfloat16" for case in Plan().cases if not case.sampled
    ]
