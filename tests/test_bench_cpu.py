"""The CPU benchmark: that its figures are what they say, and that nothing is said where tokens differ."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from typer.testing import CliRunner

from hf_llmopt import bench
from hf_llmopt.bench import breakdown, cpu, cpu_kinds, cpu_tables, equality, measure, report, requests, workloads
from hf_llmopt.bench.workloads import Workload, ragged_prompts
from hf_llmopt.cli import app
from hf_llmopt.kernels import cpu as kernels

SHORT = Workload("short", rows=2, new_tokens=6, shortest=5, longest=5)
LONG = Workload("long", rows=2, new_tokens=6, shortest=40, longest=40)
PAIR = ((SHORT, 0.001), (LONG, None))


def experiment(kind: str, shape: str = "0.5b", dtype: str = "float32", cases: Any = PAIR) -> cpu.Experiment:
    return cpu.Experiment(kind, kind, shape, dtype, cases)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as given: the miniature is of the models alone."""
    monkeypatch.setattr(cpu, "in_miniature", lambda item: item)


def run(*experiments: cpu.Experiment, repeats: int = 2, **arguments: Any) -> dict[str, Any]:
    seen: list[tuple[str, str]] = []
    found = cpu.bench(experiments, repeats=repeats, quick=True, on_run=lambda *what: seen.append(what), **arguments)
    assert len(seen) == sum(cpu.runs_of(item, repeats) for item in experiments)
    json.dumps(found, allow_nan=False)
    for table in cpu_tables.tables(json.loads(json.dumps(found))):
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
        report.markdown(table)
    return found


def cases(found: dict[str, Any]) -> list[dict[str, Any]]:
    (result,) = found["experiments"]
    return result["cases"]


# --------------------------------------------------------------------------------------------------------- experiments


def test_decode() -> None:
    found = run(experiment("decode"))
    assert found["passed"]
    assert found["quick"]
    short, long = cases(found)
    assert (short["prompt_lengths"], long["prompt_lengths"]) == ([5, 5], [40, 40])
    for case in (short, long):
        assert list(case["ways"]) == ["stock", "llmopt"]
        assert case["equality"]["identical"]
        for way in case["ways"].values():
            # A step is a part of the call without its prompt.
            samples = zip(
                *(way[name]["samples"] for name in ("ms_per_step", "time_to_first_token", "seconds")), strict=True
            )
            assert all(0 < 5e-3 * step <= total - first for step, first, total in samples)
        assert case["ratio"]["low"] <= case["ratio"]["ratio"] <= case["ratio"]["high"]
    assert short["met"]
    assert long["met"] is None
    assert found["experiments"][0]["noise"] == 0


def test_bfloat16_says_how_much_rounding_moves_logits() -> None:
    found = run(experiment("decode", dtype="bfloat16", cases=((SHORT, None),)), repeats=1)
    (result,) = found["experiments"]
    assert 0 < result["noise"] < 1
    assert f"noise {result['noise']:.3f}" in report.markdown(cpu_tables.tables(found)[0])


@pytest.mark.parametrize("shape", ["1.2b-llama", "opt-125m", "gpt2-small", "demo"])
def test_shapes(shape: str) -> None:
    found = run(experiment("decode", shape, cases=((SHORT, None),)), repeats=1)
    assert found["passed"], cpu_tables.failures(found)
    assert found["experiments"][0]["model"]["name"] == shape


def test_growth() -> None:
    found = run(experiment("growth", cases=((SHORT, None), (LONG, 1e-6))))
    (case,) = cases(found)
    assert found["passed"]
    assert case["name"] == "long over short"
    short, long = (way["ms_per_step"]["samples"] for way in case["ways"].values())
    expected = bench.paired_ratio(long, short).ratio
    assert case["ratio"]["ratio"] == pytest.approx(expected), "how much longer, not how much faster"
    assert case["met"] is False
    assert "≤ 1e-06×: missed" in report.markdown(cpu_tables.tables(found)[0])


def test_floor() -> None:
    found = run(experiment("floor", cases=((SHORT, 1e6),)))
    (case,) = cases(found)
    assert found["passed"]
    assert case["met"]
    steps, floors = case["ways"]["llmopt"]["ms_per_step"]["samples"], case["floor_ms"]["samples"]
    rates = case["bytes_per_second"]["samples"]
    assert floors == pytest.approx([1e3 * case["weight_bytes"] / rate for rate in rates])
    assert case["ratio"]["ratio"] == pytest.approx(bench.paired_ratio(steps, floors).ratio)


def test_weight_bytes() -> None:
    tied, untied = build("llama", tie_word_embeddings=True), build("llama", tie_word_embeddings=False)
    every = sum(parameter.numel() * 4 for parameter in tied.parameters())
    assert measure.weight_bytes(tied) == every
    assert measure.weight_bytes(untied) == every, "the embedding is looked up, the head is read"
    assert measure.weight_bytes(build("llama", tie_word_embeddings=True, dtype=torch.bfloat16)) == every // 2


def test_read_bandwidth() -> None:
    assert 1e8 < cpu_kinds.read_bandwidth(torch.ones(1 << 20, dtype=torch.int64)) < 1e13


def test_throughput() -> None:
    ragged = Workload("ragged", rows=4, new_tokens=5, shortest=4, longest=12)
    found = run(experiment("throughput", cases=((ragged, 1e9),)))
    (case,) = cases(found)
    assert found["passed"], cpu_tables.failures(found)
    assert len(set(case["prompt_lengths"])) > 1
    assert case["equality"]["llmopt"]["identical"]
    assert case["met"] is False
    assert case["ways"].keys() >= {"stock", "llmopt"}
    assert (requests.BATCHED in case["ways"]) == (case["refused"] is None)
    for way in case["ways"].values():
        assert all(0 < figure < 1e6 for figure in way["tokens_per_second"]["samples"])


def test_throughput_without_generate_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("needs a GPU")

    monkeypatch.setattr(cpu_kinds, "batched", refuse)
    ragged = Workload("ragged", rows=2, new_tokens=3, shortest=4, longest=9)
    cpu_report = cpu.bench([experiment("throughput", cases=((ragged, None),))], repeats=1, quick=True)
    assert cpu_report["passed"]
    (case,) = cases(cpu_report)
    assert case["refused"] == "RuntimeError: needs a GPU"
    assert "did not run" in report.markdown(cpu_tables.tables(cpu_report)[0])


def test_stock_batching_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    found = requests.batched(model, [requests.Job(prompt, 4) for prompt in ([5, 6, 7], [8, 9], [5, 6, 7])])
    assert model.config._attn_implementation == before
    expected = model.generate(torch.tensor([[8, 9]]), max_new_tokens=4, eos_token_id=None)[0, 2:].tolist()
    assert [len(row) for row in found.tokens] == [4, 4, 4]
    assert found.tokens[1] == expected


# ----------------------------------------------------------------------------------------------------------- breakdown


def test_breakdown() -> None:
    found = run(experiment("breakdown", cases=((SHORT, None),)))
    (case,) = cases(found)
    assert found["passed"]
    assert list(case["ms"]) == list(breakdown.PARTS)
    assert all(share >= 0 for share in case["ms"].values())
    assert sum(case["ms"].values()) == pytest.approx(case["ms_per_step"], rel=1e-6), "nothing is left out"
    for part in (breakdown.PRODUCTS, breakdown.PYTHON, breakdown.ENGINE, breakdown.SAMPLING):
        assert case["ms"][part] > 0
    if kernels.available():
        assert case["ms"][breakdown.ATTENTION] > 0


def test_the_prompt_is_no_part_of_a_step() -> None:
    model = build("llama")
    inputs = ragged_prompts(LONG, 112)
    with breakdown.instrumented() as spent:
        clock = breakdown.Marks(spent)
        bench.generate(model, inputs, max_new_tokens=3, eos_token_id=None, llmopt=True, streamer=clock)
    parts = clock.parts()
    assert 0 < parts[breakdown.PRODUCTS] < spent[breakdown.PRODUCTS]
    assert sum(parts.values()) == pytest.approx(clock.times[-1] - clock.times[1])


def test_instruments_are_removed() -> None:
    from hf_llmopt.engine.runner import Runner
    from hf_llmopt.generation import Group
    from hf_llmopt.kernels.cpu import ops

    def places() -> list[Any]:
        functional = torch.nn.functional
        return [
            ops._C,
            Runner.run,
            Group.advance,
            functional.linear,
            torch.addmm,
            functional.scaled_dot_product_attention,
        ]

    def fail() -> None:
        with breakdown.instrumented():
            assert all(now is not then for now, then in zip(places(), before, strict=True) if then is not None)
            raise ZeroDivisionError

    before = places()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(now is then for now, then in zip(places(), before, strict=True))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_other_tokens_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("group.greedy", "choice.pick"):
        monkeypatch.setattr(f"hf_llmopt.generation.{name}", lambda scores, *_: scores.argmin(-1))
    found = cpu.bench([experiment("decode", cases=((SHORT, None),)), experiment("throughput")], repeats=1, quick=True)
    assert not found["passed"]
    for result in found["experiments"]:
        for case in result["cases"]:
            assert case["reasons"] == ["other tokens than stock"]
            assert case["met"] is None
            assert not case.get("ratio")
            assert not case.get("ratios")
    assert "decode, short: other tokens than stock" in cpu_tables.failures(found)
    assert "FAILED" in report.markdown(cpu_tables.tables(found)[0])


def test_calls_served_by_transformers_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    translate = sys.modules["hf_llmopt.generation.translate"]  # the package's attribute of that name is the function
    monkeypatch.setattr(translate, "reason_against", lambda *_: "a reason")
    with pytest.warns(UserWarning, match="a reason"):
        found = cpu.bench([experiment("decode", cases=((SHORT, None),))], repeats=1, quick=True)
    assert cases(found)[0]["reasons"] == ["transformers served the call: a reason"]


@pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
def test_attention_by_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kinds, "LLMOPT", {"attention": "sdpa"})
    found = cpu.bench([experiment("decode", cases=((SHORT, None),))], repeats=1, quick=True)
    assert cases(found)[0]["reasons"] == ["the attention kernel did not run"]


# ------------------------------------------------------------------------------------------------------------- the rest


def test_names_and_goals() -> None:
    names = [item.name for item in cpu.EXPERIMENTS]
    assert len(set(names)) == len(names)
    for item in cpu.EXPERIMENTS:
        assert item.kind in cpu_kinds.KINDS
        assert item.shape in {*workloads.SHAPES, "demo"}
        assert all(goal is None or goal > 0 for _, goal in item.cases)
    shared = [(item.shape, item.dtype) for item in cpu.EXPERIMENTS]
    assert sum(a != b for a, b in pairwise(shared)) == len(set(shared)) - 1, "each model is built once"


def test_rounding_noise() -> None:
    inputs = ragged_prompts(SHORT, 112)
    assert equality.rounding_noise(build("llama"), inputs) == 0
    model = build("llama", dtype=torch.bfloat16)
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        rounded, exact = model(ids).logits[0, -1].float(), build("llama").to(torch.bfloat16).float()(ids).logits[0, -1]
    assert equality.rounding_noise(model, inputs) >= float((rounded - exact).abs().max()) > 0


def test_the_worst_outcome_counts() -> None:
    model, inputs = build("llama"), ragged_prompts(SHORT, 112)
    expected = measure.generate(model, inputs, max_new_tokens=3, eos_token_id=None).output
    other = expected.clone()
    other[1, -1] += 1
    assert equality.worst(model, inputs, expected, [expected, expected.clone()]).identical
    assert not equality.worst(model, inputs, expected, [expected, other]).same


# --------------------------------------------------------------------------------------------------------- the command


def command(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", "cpu", "--quick", "--repeat", "1", *map(str, args)])


def test_command(tmp_path: Path) -> None:
    result = command("--only", "gpt2", "--json", "--output", tmp_path / "report.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert [item["name"] for item in found["experiments"]] == ["gpt2"]
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == found


def test_command_prints_tables() -> None:
    result = command("--only", "opt", "--only", "breakdown", "--markdown")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.count("**cpu: ") == 2
    assert "no figure counts" in result.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [(("--only", "decode-bfloat1"), "Did you mean"), (("--output", "no/such/r.json"), "no folder 'no/such'")],
)
def test_command_user_errors(args: tuple[str, ...], says: str) -> None:
    result = command(*args)
    assert result.exit_code == 1
    assert says in result.stderr
