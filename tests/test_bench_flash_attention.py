"""The CPU part of `bench flash_attention`: its figures are what they say, and what is wrong fails it."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from hf_llmopt.bench import flash_attention_cpu as bench
from hf_llmopt.bench import flash_attention_plain as plain
from hf_llmopt.bench import plots, report
from hf_llmopt.bench.measure import weight_bytes
from hf_llmopt.bench.workloads import build
from hf_llmopt.cli import app
from hf_llmopt.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="it measures the C kernels")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    said: list[str] = []
    result = bench.bench(("prompts", "decode"), bench.QUICK, repeats=2, on_run=said.append)
    assert len(said) == bench.steps(("prompts", "decode"), bench.QUICK)
    return json.loads(json.dumps(result, allow_nan=False))


def test_errors_and_tokens_stand_beside_times(found: dict[str, Any]) -> None:
    assert found["passed"], bench.failures(found)
    assert len(found["prompts"]) == 4
    for case in found["prompts"]:
        exact = torch.finfo(getattr(torch, case["dtype"])).eps
        assert all(0 < error < 2 * exact for error in case["error"].values())
        assert all(min(times["samples"]) > 0 for times in case["milliseconds"].values())
    decode = found["decode"]
    assert decode["equality"]["same"]
    assert decode["equality"]["tokens"] == bench.QUICK.new_tokens
    assert decode["ratio"]["ratio"] > 0
    model = build("0.5b", torch.bfloat16, 0, miniature=True)
    width = model.config.hidden_size // model.config.num_attention_heads
    token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * width
    assert decode["read_bytes"] == weight_bytes(model) + token * (bench.QUICK.context + 1)


def test_tables_and_picture(found: dict[str, Any]) -> None:
    whole = {**found, "memory": [{"tokens": 512, "bytes": 2**20}]}
    tables = bench.tables(whole)
    assert len(tables) == 3
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        report.markdown(table)
    assert all(float(figure) > 0 for row in tables[0].rows for figure in row[4:6])
    assert "reading all weights and keys takes" in tables[2].caption
    assert [row[4] for row in tables[2].rows] == [""], "miniatures have no goal"
    drawing = ElementTree.fromstring(plots.prompts(found["prompts"]))
    circles = [part for part in drawing if part.tag.endswith("circle")]
    assert len(circles) == 2  # of whole prompts


def test_what_is_wrong_fails(found: dict[str, Any]) -> None:
    wrong = copy.deepcopy(found)
    wrong["prompts"][0]["error"]["llmopt"] *= 2
    wrong["memory"] = [{"tokens": n, "bytes": n * n} for n in (2**14, 2**15)]
    wrong["decode"]["reasons"] = ["other tokens than stock"]
    lines = bench.failures(wrong)
    assert [line.partition(":")[0] for line in lines] == [
        "bfloat16, heads (4, 2, 16), 64 of 64 tokens", "memory", "decode",
    ]  # fmt: skip
    straight = {"memory": [{"tokens": n, "bytes": 7000 * n} for n in (2**14, 2**15)]}
    assert not bench.failures(straight)


@pytest.mark.slow
def test_memory_of_a_prompt_is_seen() -> None:
    """In a process of its own: memory that others left free would not be asked for again."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        risen = pool.submit(bench.peak, 4096, True, 0).result()
    if risen is not None:
        assert risen > 4096 * 2 * 2 * 2 * 16 * 2  # its keys and values, of two layers


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["bench", "flash_attention", "--device", "cpu", "--quick", "--only", "prompts", "--repeat", "1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(path), "--plots", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert set(json.loads(path.read_text("utf-8"))) >= {"prompts", "command", "environment"}
    assert (tmp_path / "flash_attention-cpu.svg").read_text("utf-8").startswith("<svg")
    shown = CliRunner().invoke(app, ["bench", "flash_attention", "--report", str(path), "--markdown"])
    assert shown.exit_code == 0
    assert "torch's error" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--only", "promts"), "prompts"), (("--device", "gpu"), "cuda"), (("--output", "/nowhere/x.json"), "folder")],
)
def test_user_errors(arguments: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", "flash_attention", *arguments])
    assert result.exit_code != 0
    assert says in f"{result.output} {result.exception}"


def test_plain_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU part's cases, small: every attention is what it should be, and whose error is too large fails."""
    monkeypatch.setattr(plain, "_microseconds", lambda way, device: float(way().shape[1]))
    monkeypatch.setattr("hf_llmopt.attention.plain._wins", lambda *_: True)  # a race, which a busy machine may lose
    small = [case._replace(tokens=192, window=case.window and 40) for case in plain.CASES]
    with torch.inference_mode():
        cases = [plain.measure(case, (4, 2, 16), torch.Generator().manual_seed(0)) for case in small]
    assert not plain.failures(cases)
    assert all(0 < error < 0.02 for case in cases for error in case["error"].values())
    assert [case["mask_bytes"][plain.STOCK] > 0 for case in cases] == [False, True, True, True, True]
    assert all(case["mask_bytes"][plain.OURS] <= 12 * 192 * case["rows"] for case in cases)
    shown = plain.table(cases, "")
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    cases[1]["error"][plain.OURS] *= 2
    assert [line.partition(":")[0] for line in plain.failures(cases)] == ["plain forward, window of 1,024"]
