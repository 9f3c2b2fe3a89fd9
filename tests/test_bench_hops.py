"""What `bench hops` measures, and what it says of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_llmopt.bench import hops, hops_tables
from hf_llmopt.cli import app

REPORT = {
    "bench": "hops",
    "environment": {"hardware": "a machine", "versions": {"torch": "2", "transformers": "5"}},
    "plan": {"requests": 4, "tokens": 8, "repeats": 2},
    "ways": {
        "engine": {"seconds_per_request": {"median": 0.002}, "seconds_per_token": {"median": 0.001}},
        "HTTP": {"seconds_per_request": {"median": 0.005}, "seconds_per_token": {"median": 0.0015}},
    },
    "all_reduce_seconds": {"4096": {"median": 0.0001}},
    "reasons": [],
    "passed": True,
}


def test_a_hop_is_what_the_row_before_lacks(tmp_path: Path) -> None:
    way, reduced = hops_tables.tables(REPORT)
    assert way.rows == [["engine", "2.00", "", "1.00", ""], ["HTTP", "5.00", "+3.00", "1.50", "+0.50"]]
    assert reduced.rows == [["4 KiB", "100"]]
    (tmp_path / "report.json").write_text(json.dumps(REPORT), "utf-8")
    shown = CliRunner().invoke(app, ["bench", "hops", "--report", str(tmp_path / "report.json"), "--markdown"])
    assert shown.exit_code == 0
    assert "| HTTP | 5.00 | +3.00 |" in shown.stdout
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, "passed": False, "reasons": ["no"]}), "utf-8")
    assert CliRunner().invoke(app, ["bench", "hops", "--report", str(tmp_path / "report.json")]).exit_code == 1


@pytest.mark.slow
def test_hops_are_measured(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "hops", "--quick", "--output", str(tmp_path / "hops.json")])
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "hops.json").read_text("utf-8"))
    assert {hops.ENGINE, hops.HTTP} <= set(report["ways"]) <= {hops.ENGINE, hops.HTTP, hops.REPLICAS}
    requests = [way["seconds_per_request"]["median"] for way in report["ways"].values()]
    assert 0 < requests[0] < requests[1]
    assert report["all_reduce_seconds"]["4096"]["median"] > 0
    assert report["passed"]
