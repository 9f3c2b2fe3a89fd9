"""`bench kv_cache --long`: its figures are what they say, and a broken bound fails it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from hf_llmopt.bench import kv_cache_long as bench
from hf_llmopt.bench import plots, report
from hf_llmopt.cli import app
from hf_llmopt.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="it measures the C kernels")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Made by the command: the report that it saved."""
    folder: Path = tmp_path_factory.mktemp("long")
    path = folder / "report.json"
    arguments = ["bench", "kv_cache", "--long", "--quick", "--repeat", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(path), "--plots", str(folder)])
    assert result.exit_code == 0, result.output
    assert "own float32 pages" in " ".join(result.output.split())
    assert (folder / "kv_cache-long.svg").read_text("utf-8").startswith("<svg")
    return json.loads(path.read_text("utf-8"))


def test_every_format_has_its_figures(found: dict[str, Any]) -> None:
    assert found["passed"], bench.failures(found)
    assert list(found["attention"]) == list(bench.FORMATS) == list(found["speed"]["ms_per_step"])
    errors = found["attention"]
    assert errors["bfloat16"] < errors["int8"] < errors["fp8"] < errors["int4"] < 0.2
    perplexities = {name: case["times"]["value"] for name, case in found["quality"]["formats"].items()}
    assert perplexities["bfloat16"] == 1
    assert all(0.9 < times < 1.1 and times != 1 for name, times in perplexities.items() if name != "bfloat16")
    size = found["speed"]["page_bytes"]
    assert size["int4"] < size["int8"] == size["fp8"] < size["bfloat16"]


def test_tables_and_picture(found: dict[str, Any]) -> None:
    for table in bench.tables(found):
        assert all(len(row) == len(table.columns) for row in table.rows)
        report.markdown(table)
    bars = [part for part in ElementTree.fromstring(plots.page_formats(found)) if part.tag.endswith("rect")]
    assert len(bars) == 1 + 2 * len(bench.FORMATS)


def test_a_broken_bound_fails(found: dict[str, Any]) -> None:
    wrong = copy.deepcopy(found) | {"quick": False}
    wrong["quality"]["formats"]["int8"]["times"]["value"] = 1.002
    wrong["speed"]["page_bytes"]["int4"] = wrong["speed"]["page_bytes"]["bfloat16"]
    lines = bench.failures(wrong)
    assert any(line.startswith("int8: 1.0020 times the perplexity") for line in lines)
    assert any(line.startswith("int4: 1.000 of bfloat16's bytes") for line in lines)


def test_other_models_are_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "kv_cache", "--long", "--shape", "0.5b"])
    assert result.exit_code != 0
    assert "leave out" in f"{result.output} {result.exception}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_offload_asks_for_a_device() -> None:
    result = CliRunner().invoke(app, ["bench", "kv_cache", "--offload"])
    assert result.exit_code != 0
    assert "found no CUDA device" in f"{result.output} {result.exception}"
