"""The benchmark of quantized weights: that its figures are what they say, and that other results fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from architectures import build
from typer.testing import CliRunner

from hf_llmopt import LLMOptConfig
from hf_llmopt.bench import (
    llama_cpp,
    load_memory,
    plots,
    quantization,
    quantized,
    quantized_quality,
    quantized_speed,
    report,
)
from hf_llmopt.cli import app
from hf_llmopt.config import QuantizationConfig
from hf_llmopt.kernels import reference
from hf_llmopt.quantization import QuantizedLinear


def check_tables(found: dict[str, Any]) -> str:
    json.dumps(found, allow_nan=False)
    texts = []
    for table in quantization.tables(json.loads(json.dumps(found))):
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
        texts.append(report.markdown(table))
    return "\n\n".join(texts)


# --------------------------------------------------------------------------------------------------------------- copies


def test_dequantized_weights_are_those_of_the_codes() -> None:
    full = build("llama", hidden_size=64, intermediate_size=96)
    model = quantized.quantize(full, QuantizationConfig("int4", group_size=32))
    dense = quantized.dequantized(model, full)
    changed = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dense.get_submodule(name).weight
            assert torch.equal(weight, reference.dequantize(module.grid()))
            assert not torch.equal(weight, full.get_submodule(name).weight)
            changed += 1
    assert changed > 7
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # as some methods change norms
    assert torch.equal(quantized.dequantized(model, full).model.norm.weight, model.model.norm.weight)
    assert not torch.equal(dense.model.norm.weight, model.model.norm.weight)


def test_errors_are_of_the_products() -> None:
    full = build("llama", hidden_size=64, intermediate_size=96)
    model = quantized.quantize(full, QuantizationConfig("int8"))
    found = quantized.output_errors(model, full, [1, 5], seed=0)
    assert found["weights"] < 1e-5
    assert 1e-5 < found["activations"] < 0.05 or found["activations"] == pytest.approx(found["weights"])
    assert all(m.activations for m in model.modules() if isinstance(m, QuantizedLinear))
    with torch.no_grad():
        full.model.norm.weight.mul_(1)
    broken = quantized.quantize(full, QuantizationConfig("int8"))
    projection = broken.model.layers[0].mlp.down_proj
    forward = projection.forward
    projection.forward = lambda x: 1.5 * forward(x)
    assert quantized.output_errors(broken, full, [1, 5], seed=0)["weights"] > 0.01


def test_memory() -> None:
    full = build("llama", hidden_size=128, intermediate_size=256, dtype=torch.bfloat16)
    model = quantized.quantize(full, QuantizationConfig("int4", group_size=128))
    found = quantized.memory(model)
    products = [m for m in full.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert found["products_before"] == sum(2 * m.weight.numel() for m in products)
    assert found["products"] < 0.4 * found["products_before"]
    rest = quantized.held(full) - found["products_before"]
    assert found["bytes"] == pytest.approx(rest + found["products"], rel=0.02)


# --------------------------------------------------------------------------------------------------------------- speed


def speed(**arguments: Any) -> dict[str, Any]:
    seen: list[str] = []
    asked = {"shapes": ["1.2b-llama"], "rows": [1, 2], "methods": ["int4"], "repeats": 2, **arguments}
    found = quantization.bench(["speed"], **asked, quick=True, on_run=seen.append)
    assert len(seen) == quantization.runs_of(["speed"], **asked)
    check_tables(found)
    return found


def test_speed() -> None:
    found = speed()
    assert found["passed"], quantization.failures(found)
    (shape,) = found["speed"]
    assert shape["model"]["dtype"] == "bfloat16"
    assert [case["name"] for case in shape["cases"]] == ["1 rows", "2 rows", "prompt of 512"]
    for case in shape["cases"]:
        assert list(case["ms"]) == ["stock", "llmopt, bfloat16", "int4"]
        assert list(case["ratios"]) == ["llmopt, bfloat16", "int4"]
        ratio = case["ratios"]["int4"]
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert all(len(ms["samples"]) == 2 and ms["median"] > 0 for ms in case["ms"].values())
    first, _, prompt = shape["cases"]
    assert first["goals"] == {"int4": 4.0}
    assert prompt["goals"] == {"int4": 1.0}
    assert "≥" not in check_tables(found), "nothing is said of goals on miniatures"
    assert "≥ 4: m" in check_tables({**found, "quick": False})
    assert shape["methods"]["int4"]["products"] < 0.5 * shape["methods"]["int4"]["products_before"]
    drawing = ElementTree.fromstring(plots.quantized_speed(shape))
    assert len(drawing.findall("{*}circle")) == 4, "two numbers of rows, two ways"
    assert "kernels: " in check_tables(found)
    shape["model"]["device"] = "cuda:0"
    assert "kernels: " not in check_tables(found), "a GPU's steps use none of the CPU's"


def test_other_tokens_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("group.greedy", "row.pick"):
        monkeypatch.setattr(f"hf_llmopt.generation.{name}", lambda scores: scores.argmin(-1))
    found = speed(rows=[1], repeats=1)
    assert not found["passed"]
    case = found["speed"][0]["cases"][0]
    (reason,) = case["reasons"]
    assert reason.startswith("llmopt, bfloat16: other tokens than stock (row 0, step 0: ")
    assert case["ratios"] == {}
    assert "FAILED" in check_tables(found)
    assert f"1.2b-llama, 1 rows: {reason}" in quantization.failures(found)


def test_goals_are_of_what_is_measured() -> None:
    for method, what in quantized_speed.GOALS:
        assert method in quantized.METHODS
        assert what in (*quantization.ROWS, quantized_speed.PREFILL)


# ------------------------------------------------------------------------------------------------------------- quality


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Measures these cases only, on short prompts."""
    short = replace(quantized_quality.PROMPTS, rows=2, new_tokens=12)
    monkeypatch.setattr(quantized_quality, "PROMPTS", short)

    def choose(*names: str) -> None:
        known = {case.name: case for case in quantized_quality.CASES}
        monkeypatch.setattr(quantized_quality, "CASES", tuple(known[name] for name in names))

    return choose


def test_quality(only: Callable[..., None]) -> None:
    only("int8", "int8, head too", "rtn, 4 bits", "int4, 4 bits")
    found = quantization.bench(["quality"], quick=True)
    assert found["passed"], quantization.failures(found)
    int8, head, rtn, int4 = found["quality"]["cases"]
    assert int8["equality"]["identical"]
    assert int4["equality"]["identical"]
    assert head["equality"] is None
    assert 0.99 < int8["times"]["value"] < 1.01 < rtn["times"]["value"] < 1.5
    assert rtn["times"]["low"] < rtn["times"]["value"] < rtn["times"]["high"]
    assert rtn["over_rtn"] is int8["over_rtn"] is None
    ratio = int4["perplexity"]["perplexity"] / rtn["perplexity"]["perplexity"]
    assert int4["over_rtn"]["value"] == pytest.approx(ratio)
    assert int4["config"] == {"method": "int4", "bits": 4, "group_size": 64}
    drawing = ElementTree.fromstring(plots.quantized_quality(found["quality"]))
    assert len(drawing.findall("{*}circle")) == 4
    assert "rtn, 4 bits" in check_tables(found)


def test_wrong_products_fail(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("int8")
    grid = QuantizedLinear.grid

    def moved(self: QuantizedLinear) -> Any:
        found = grid(self)
        return found._replace(scales=found.scales * 1.3)

    monkeypatch.setattr(QuantizedLinear, "grid", moved)
    found = quantization.bench(["quality"], quick=True)
    assert not found["passed"]
    assert "int8: other tokens than the dequantized weights" in quantization.failures(found)
    assert any("logits differ by" in line for line in quantization.failures(found))
    assert "FAILED" in check_tables(found)


def test_cases() -> None:
    names = [case.name for case in quantized_quality.CASES]
    assert len(set(names)) == len(names)
    for bits in (3, 4):
        for method in ("rtn", "int4", "gptq", "awq"):
            assert f"{method}, {bits} bits" in names
    firsts = {case.family: case.name for case in reversed(quantized_quality.CASES)}
    assert firsts["4 bits"] == "rtn, 4 bits", "the others are compared with it"
    for case in quantized_quality.CASES:
        LLMOptConfig(quantization=case.config)
    assert {asked.config.samples for asked in map(quantized_quality._small, quantized_quality.CASES)} == {8, 128}


# -------------------------------------------------------------------------------------------------------------- memory


def test_watching_sees_memory_that_is_given_back(tmp_path: Path) -> None:
    if load_memory.resident() is None:
        pytest.skip("this system does not say")
    with load_memory.watching() as peak:
        block = torch.ones(50_000_000, dtype=torch.uint8)
        block.max()
        for _ in range(20):
            block.max()
        del block
    own, files = peak()
    assert 40e6 < own < 200e6
    assert files < 40e6
    (tmp_path / "block").write_bytes(bytes(50_000_000))
    with load_memory.watching() as peak:
        block = torch.from_file(str(tmp_path / "block"), size=50_000_000, dtype=torch.uint8)
        for _ in range(20):
            block.max()
    own, files = peak()
    assert own < 40e6 < files < 200e6


def test_load_memory() -> None:
    found = load_memory.measure("1.2b-llama", QuantizationConfig("int4"), quick=True)
    assert 0 < found["bytes"] < found["bytes_before"]
    assert found["method"] == "int4"
    if found["peak"] is not None:
        assert found["peak"] > 0
        assert 0 < found["mapped"] < found["bytes"]
        own = found["bytes"] - found["mapped"]
        assert found["over"] == pytest.approx((found["peak"] - found["largest_product"]) / own)
    check_tables({**quantization.bench([]), "memory": [found]})


@pytest.mark.slow
def test_the_peak_while_loading_is_little_more_than_the_result(tmp_path: Path) -> None:
    """Without giving freed memory back it is half as much again."""
    found = load_memory.measure("0.5b", QuantizationConfig("int4", clip=False))
    assert found["peak"] is None or found["over"] < load_memory.GOAL


# ----------------------------------------------------------------------------------------------------------- llama.cpp


def test_without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.runs_of(["0.5b"], 3) == 0
    found = quantization.bench(["llama.cpp"])
    assert found["passed"]
    assert found["llama.cpp"] == {"skipped": "llama_cpp, gguf not installed; pip install llama-cpp-python gguf"}
    (table,) = quantization.tables(found)
    assert "llama.cpp: llama_cpp, gguf not installed" in table.caption


@pytest.mark.slow
def test_llama_cpp() -> None:
    for name in llama_cpp.NEEDED:
        pytest.importorskip(name)
    seen: list[str] = []
    found = llama_cpp.measure(["0.5b", "1.2b-llama", "opt-125m"], 2, quick=True, on_run=seen.append)
    assert len(seen) == llama_cpp.runs_of(["0.5b", "1.2b-llama", "opt-125m"], 2)
    assert [(case["shape"], case["format"], case["rows"]) for case in found["cases"]] == [
        (shape, kind, rows) for shape in ("0.5b", "1.2b-llama") for kind in ("Q4_0", "Q8_0") for rows in (1, 16)
    ]
    assert all(ms["median"] > 0 for case in found["cases"] for ms in case["ms"].values())
    check_tables({**quantization.bench([]), "llama.cpp": found})


# --------------------------------------------------------------------------------------------------------- the command


def command(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", "quantization", "--quick", "--repeat", "1", *map(str, args)])


def test_command(tmp_path: Path) -> None:
    options = ("--only", "speed", "--shape", "0.5b", "--rows", "1", "--method", "int8", "--plots", tmp_path)
    result = command(*options, "--json", "--output", tmp_path / "report.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert [shape["shape"] for shape in found["speed"]] == ["0.5b"]
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == found
    assert (tmp_path / "quantization-0.5b.svg").read_text("utf-8").startswith("<svg")
    again = CliRunner().invoke(app, ["bench", "quantization", "--report", str(tmp_path / "report.json"), "--markdown"])
    assert again.exit_code == 0, again.output
    assert "no figure counts" in again.stdout
    assert again.stdout.strip() == check_tables(found).strip()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--only", "sped"), "Did you mean 'speed'?"),
        (("--shape", "0.6b"), "Did you mean"),
        (("--method", "int5"), "Did you mean"),
        (("--rows", "1;4"), "numbers of at least 1"),
        (("--rows", "0"), "numbers of at least 1"),
        (("--output", "no/such/r.json"), "no folder 'no/such'"),
        (("--report", "no/such.json"), "there is no file"),
    ],
)
def test_command_user_errors(args: tuple[str, ...], says: str) -> None:
    result = command(*args)
    assert result.exit_code == 1
    assert says in result.stderr
