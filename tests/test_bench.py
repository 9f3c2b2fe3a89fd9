"""The benchmarks: that they measure what they say, and refuse to compare what is not the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from architectures import build
from typer.testing import CliRunner

from hf_llmopt import bench, demo, errors
from hf_llmopt.bench import (
    continuous_batching,
    continuous_batching_tables,
    equality,
    eviction,
    kv_cache,
    measure,
    plots,
    prompt_cache,
    report,
    requests,
    speculative,
    workloads,
)
from hf_llmopt.bench.workloads import Workload, ragged_prompts
from hf_llmopt.cli import app
from hf_llmopt.demo.tokens import train_tokenizer

TINY = (
    Workload("batch-1", rows=1, new_tokens=6, shortest=4, longest=9),
    Workload("batch-3", rows=3, new_tokens=6, shortest=4, longest=9),
    Workload("long", rows=1, new_tokens=10, shortest=4, longest=9),
)


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return build("llama")


# ------------------------------------------------------------------------------------------------------------- measure


def test_interleave_alternates() -> None:
    order: list[str] = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seen: list[str] = []
    results = bench.interleave(ways, 3, seen.append)
    assert order == seen == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(found) for name, found in results.items()} == {"a": 3, "b": 3}


def test_paired_ratio() -> None:
    ratio = bench.paired_ratio([2.0] * 5, [1.0] * 5)
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert ratio.not_slower
    noisy = bench.paired_ratio([1.0, 1.2, 0.8, 1.1, 0.9], [1.0] * 5)
    assert noisy.low < noisy.ratio < noisy.high
    assert not noisy.not_slower
    single = bench.paired_ratio([3.0], [1.0])
    assert single.ratio == pytest.approx(3)
    assert single.low is None
    assert not single.not_slower
    assert str(single) == "3.00"


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (10, 2.2281), (11, 2.2010), (20, 2.0860), (60, 2.0003)])
def testt_quantile(freedom: int, quantile: float) -> None:
    assert measure.t_quantile(freedom) == pytest.approx(quantile, abs=2e-4)


def test_paired_ratio_covers() -> None:
    """The interval of five noisy pairs holds the true ratio about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 2, 5, generator=generator, dtype=torch.float64).mul(0.1).exp()
    inside = 0
    for baseline, way in (noise * torch.tensor([[1.5], [1.0]])).tolist():
        found = bench.paired_ratio(baseline, way)
        inside += found.low <= 1.5 <= found.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_generate_measures(tiny: torch.nn.Module) -> None:
    inputs = ragged_prompts(TINY[1], 112)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    stock = bench.generate(tiny, inputs, **arguments)
    ours = bench.generate(tiny, inputs, llmopt=True, **arguments)
    for run in (stock, ours):
        assert run.new_tokens == 15
        assert 0 < run.time_to_first_token < run.seconds
        assert 0 < run.ms_per_step * 4 / 1e3 < run.seconds
    assert (stock.served_by, ours.served_by) == ("transformers", "llmopt")
    assert stock.stats is None
    assert torch.equal(stock.output, ours.output)


def test_generate_of_a_single_token(tiny: torch.nn.Module) -> None:
    run = bench.generate(tiny, ragged_prompts(TINY[0], 112), max_new_tokens=1, do_sample=False)
    assert run.new_tokens == 1
    assert run.ms_per_step == 0


def test_environment() -> None:
    found = bench.environment()
    assert found["hardware"].startswith(f"{found['cores']} cores of ")
    assert found["versions"]["torch"] == torch.__version__
    json.dumps(found)


def test_cache_bytes(tiny: torch.nn.Module) -> None:
    output = tiny.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    config = tiny.config
    width = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    assert measure.cache_bytes(output.past_key_values) == 4 * per_token  # the last token is never computed
    assert measure.cache_bytes(None) == 0


# ----------------------------------------------------------------------------------------------------------- workloads


def test_ragged_prompts() -> None:
    workload = Workload("w", rows=6, new_tokens=1, shortest=3, longest=12)
    texts = [list(range(20, 60)), [1, 2]]
    batch, again = ragged_prompts(workload, 100, texts, seed=1), ragged_prompts(workload, 100, texts, seed=1)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() >= 3
    assert lengths.max() == batch["input_ids"].shape[1] <= 12
    assert len(lengths.unique()) > 1
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist()), "padded on the left"
        assert (ids[mask.bool()].diff() == 1).all(), "a run of the text"
    assert not torch.equal(batch["input_ids"], ragged_prompts(workload, 100, texts, seed=2)["input_ids"])
    with pytest.raises(ValueError, match="no text has"):
        ragged_prompts(workload, 100, [[1]])


def test_build_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 64, "hidden_size": 56, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setitem(workloads.SHAPES, "0.5b", {**workloads.SHAPES["0.5b"], **small})
    state = torch.get_rng_state()
    model = workloads.build("0.5b", torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert not model.training
    with pytest.raises(ValueError, match=r"Did you mean '0\.5b'"):
        workloads.build("0.5")


def test_the_shape_is_qwen2() -> None:
    shape = workloads.SHAPES["0.5b"]
    assert shape["hidden_size"] // shape["num_attention_heads"] == 64


# ------------------------------------------------------------------------------------------------------------ equality


def test_float32_is_strict(tiny: torch.nn.Module) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    expected = torch.tensor([[5, 6, 1, 2], [7, 8, 3, 4]])
    assert bench.compare(tiny, inputs, expected, expected.clone()) == bench.Equality(True, True, 4)
    other = expected.clone()
    other[1, 3] = 9
    found = bench.compare(tiny, inputs, expected, other)
    assert not found.same
    (difference,) = found.differences
    assert difference == {"row": 1, "step": 1, "expected": 4, "got": 9, "gap": None, "noise": None}
    assert not bench.compare(tiny, inputs, expected, expected[:, :3]).same
    assert not bench.compare(tiny, inputs, expected, expected[:1]).same


@pytest.mark.parametrize(("gap", "same"), [(0.01, True), (0.5, False)])
def test_bfloat16_allows_near_ties(monkeypatch: pytest.MonkeyPatch, gap: float, same: bool) -> None:
    model = build("llama", dtype=torch.bfloat16)
    seen = []

    def logits(model: object, exact: object, prefix: torch.Tensor, rows: int) -> list[torch.Tensor]:
        seen.append((prefix.tolist(), rows))
        alone = torch.zeros(112)
        alone[4], alone[9] = 1.0, 1.0 - gap
        return [alone, alone + 0.1]

    monkeypatch.setattr(equality, "_logits", logits)
    inputs = {"input_ids": torch.tensor([[0, 6]]), "attention_mask": torch.tensor([[0, 1]])}
    found = bench.compare(model, inputs, torch.tensor([[0, 6, 1, 4, 3]]), torch.tensor([[0, 6, 1, 9, 8]]))
    assert seen == [([6, 1], 1)], "the unpadded prompt and what both agree on"
    assert not found.identical
    assert found.same == same
    assert found.differences[0]["gap"] == pytest.approx(gap)
    assert found.differences[0]["noise"] == pytest.approx(0.1)


def test_noise_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", dtype=torch.bfloat16)

    def logits(model: object, exact: object, prefix: torch.Tensor, rows: int) -> list[torch.Tensor]:
        alone = torch.zeros(112)
        alone[4], alone[9] = 1.0, 0.8
        return [alone, alone + 0.1 * float(prefix[0])]

    monkeypatch.setattr(equality, "_logits", logits)
    expected = torch.tensor([[1, 4, 3], [3, 4, 3], [2, 4, 3]])

    def compared(rows: int) -> equality.Equality:
        inputs = {"input_ids": expected[:rows, :1], "attention_mask": torch.ones(rows, 1, dtype=torch.long)}
        got = expected[:rows].clone()
        got[:2, 1] = 9
        return bench.compare(model, inputs, expected[:rows], got)

    assert not compared(1).same, "its own draws are too few"
    found = compared(3)
    assert found.same
    assert [difference["noise"] for difference in found.differences] == pytest.approx([0.3, 0.3])


def test_noise_is_measured() -> None:
    model = build("llama", dtype=torch.bfloat16)
    forms = equality._logits(model, lambda: build("llama"), torch.tensor([5, 6, 7, 8]), 3)
    assert len(forms) == 5
    assert all(form.shape == (112,) and form.dtype == torch.float32 for form in forms)
    assert max(float((a - b).abs().max()) for a in forms for b in forms) < 0.5


# ------------------------------------------------------------------------------------------------------------ kv_cache


def test_kv_cache(tiny: torch.nn.Module) -> None:
    seen: list[tuple[str, str]] = []
    found = kv_cache.bench(tiny, TINY, repeats=2, on_run=lambda *run: seen.append(run))
    json.dumps(found, allow_nan=False)
    assert found.keys() == {
        "bench", "schema", "seed", "repeats", "prompts", "environment", "model", "baseline", "workloads", "passed"
    }  # fmt: skip
    assert found["passed"]
    assert len(seen) == sum(len(kv_cache.ways_of(workload)) for workload in TINY) * 3
    for workload, made in zip(found["workloads"], TINY, strict=True):
        assert workload["name"] == made.name
        assert len(workload["prompt_lengths"]) == made.rows
        assert workload["passed"]
        assert workload["reasons"] == []
        cached = ["stock", "llmopt"]
        assert list(workload["ways"]) == (["no cache", *cached] if made.name == "long" else cached)
        assert all(outcome["identical"] for outcome in workload["equality"].values())
        for way in workload["ways"].values():
            for key in ("seconds", "tokens_per_second", "time_to_first_token", "ms_per_step"):
                assert len(way[key]["samples"]) == 2
        ours, stock = workload["ways"]["llmopt"], workload["ways"]["stock"]
        pages = sum(-(-(length + made.new_tokens - 1) // 16) for length in workload["prompt_lengths"])
        assert ours["pages"] == pages
        assert ours["kv_bytes"] > 0 < stock["kv_bytes"]
        assert ours["served_by"] == "llmopt"
        assert ours["attention"]
        assert ours["overhead_ms_per_step"]["median"] > 0
        assert stock["overhead_ms_per_step"] is None
        pairs = [(ratio["way"], ratio["over"]) for ratio in workload["ratios"]]
        assert ("llmopt", "stock") in pairs
        assert (("llmopt", "no cache") in pairs) == (made.name == "long")


def test_kv_cache_refuses_other_tokens(tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.generation.group.greedy", lambda scores: scores.argmin(-1))
    found = kv_cache.bench(tiny, TINY[:1], repeats=1)
    assert not found["passed"]
    (workload,) = found["workloads"]
    assert workload["ratios"] == []
    (reason,) = workload["reasons"]
    assert reason.startswith("llmopt gave other tokens than stock (row 0, step ")
    text = report.markdown(report.table(found))
    assert "FAILED" in text
    assert report.failures(found) == [f"batch-1: {reason}"]


def test_kv_cache_refuses_empty_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that fell through to transformers give the same tokens and prove nothing."""
    model = build("llama")
    translate = sys.modules["hf_llmopt.generation.translate"]  # the package's attribute of that name is the function
    monkeypatch.setattr(translate, "reason_against", lambda *_: "a reason")
    with pytest.warns(UserWarning, match="a reason"):
        found = kv_cache.bench(model, TINY[:1], repeats=1)
    assert not found["passed"]
    assert found["workloads"][0]["reasons"] == ["transformers served the llmopt calls: a reason"]


def test_report_reads_json(tiny: torch.nn.Module) -> None:
    found = kv_cache.bench(tiny, TINY, repeats=2)
    table = report.table(json.loads(json.dumps(found)))
    assert len(table.rows) == 7
    assert all(len(row) == len(table.columns) for row in table.rows)
    lines = report.markdown(table).splitlines()
    assert lines[2].startswith("| workload | way |")
    assert lines[3].startswith("|---|---|---:|")


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build("llama", vocab_size=300).save_pretrained(path)
    train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, vocabulary=300).save_pretrained(path)
    return path


def command(*args: object):
    return CliRunner().invoke(app, ["bench", "kv_cache", "--quick", "--repeat", "1", *map(str, args)])


def test_command(folder: Path, tmp_path: Path) -> None:
    result = command("--model", folder, "--json", "--output", tmp_path / "report.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["prompts"] == "held-out text"
    assert found["model"]["name"] == str(folder)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == found


def test_command_prints_a_table(folder: Path) -> None:
    result = command("--model", folder, "--workload", "batch-4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "batch-4" in result.stdout
    assert "batch-1" not in result.stdout
    assert "× stock" in result.stdout
    assert command("--model", folder, "--workload", "batch-1", "--markdown").stdout.startswith("**kv_cache: Llama")


def test_command_fails_when_tokens_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.generation.group.greedy", lambda scores: scores.argmin(-1))
    result = command("--model", folder, "--workload", "batch-1")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "FAILED: batch-1: llmopt gave other tokens than stock" in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--workload", "batch-2"), "Did you mean"),
        (("--shape", "0.4b"), "Did you mean '0.5b'"),
        (("--shape", "0.5b", "--dtype", "auto"), "no stored type"),
        (("--output", "no/such/folder/report.json"), "no folder 'no/such/folder'"),
    ],
)
def test_command_user_errors(args: tuple[str, ...], says: str) -> None:
    result = command(*args)
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------------- prompt_cache


def test_prompt_cache(tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.prompt_cache.tree.compute_seconds", lambda model, tokens: 1.0)
    seen: list[tuple[str, str]] = []
    found = prompt_cache.bench(tiny, prompt_cache.QUICK, repeats=2, on_run=lambda *run: seen.append(run))
    assert found["passed"], [workload["reasons"] for workload in found["workloads"]]
    assert len(seen) == sum(prompt_cache.runs_of(workload, 2) for workload in prompt_cache.QUICK)
    nothing, most, chat = found["workloads"]
    for way in ("computed", "memory", "disk"):
        assert nothing["ways"][way]["cached_tokens"] == [0, 0]
    assert most["ways"]["computed"]["cached_tokens"] == [0, 0]
    assert all(36 <= tokens <= 41 for tokens in most["ways"]["memory"]["cached_tokens"])
    assert most["ways"]["disk"]["cached_tokens"] == [32, 32], "whole pages of 16"
    # Of each later turn, what was said and the last sampled token.
    assert chat["prefilled_tokens"] <= chat["new_prompt_tokens"] + 2 * 2 < chat["prompt_tokens"]
    shown = prompt_cache.table(json.loads(json.dumps(found)))
    assert [row[:2] for row in shown.rows[:2]] == [["prefix-0", "stock"], ["prefix-0", "computed"]]
    assert "×" in shown.columns[-1]


def test_prompt_cache_refuses_other_tokens(tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.generation.group.greedy", lambda scores: scores.argmin(-1))
    found = prompt_cache.bench(tiny, prompt_cache.QUICK[:1], repeats=1)
    assert not found["passed"]
    assert found["workloads"][0]["ratios"] == []
    assert "FAILED" in prompt_cache.table(found).rows[1]


# ---------------------------------------------------------------------------------------------------------- speculative


def test_speculative(tiny: torch.nn.Module) -> None:
    seen: list[tuple[str, str]] = []
    texts = [list(range(3, 40)) * 2]
    found = speculative.bench(
        tiny, tiny, speculative.QUICK, texts=texts, repeats=2, on_run=lambda *run: seen.append(run)
    )
    assert found["passed"], [workload["reasons"] for workload in found["workloads"]]
    assert len(seen) == sum(3 * len(speculative.ways_of(workload, tiny)) for workload in speculative.QUICK)
    for workload in found["workloads"]:
        assert workload["ways"]["plain"]["steps"] >= workload["new_tokens"]
        assert all(workload["equality"][way]["same"] for way in workload["ways"])
        assert set(workload["ways"]["suffix"]["over"]) == {"plain", "plain, decoding"}, "stock drafts for one row only"
    shown = speculative.table(json.loads(json.dumps(found)))
    assert [row[1] for row in shown.rows[:4]] == ["stock", "plain", "suffix", "draft model"]


def test_speculative_refuses_other_tokens(tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.generation.choice.pick", lambda scores, noise=None: scores.argmin(-1))
    found = speculative.bench(tiny, None, speculative.QUICK[2:], texts=[list(range(3, 40))], repeats=1)
    assert not found["passed"]
    assert found["workloads"][0]["ways"]["suffix"]["over"] == {}


# -------------------------------------------------------------------------------------------------- continuous_batching


def test_jobs() -> None:
    load = requests.LOADS_BY_NAME["sharegpt"]
    drawn = requests.jobs(load, 100, seed=1)
    assert len(drawn) == load.requests
    assert all(4 <= len(job.prompt) <= 512 and 4 <= job.new <= 512 for job in drawn)
    assert drawn == requests.jobs(load, 100, seed=1) != requests.jobs(load, 100, seed=2)
    many = requests.jobs(requests.Load("m", 4000, (1, 9999), (1, 9999), mean=(161, 338)), 100)
    assert sum(job.new for job in many) / 4000 == pytest.approx(338, rel=0.1)
    texts = [list(range(30)), list(range(30, 60))]
    cut = requests.jobs(requests.Load("t", 20, (5, 40), (1, 1)), 100, texts)
    assert all(job.prompt == list(range(job.prompt[0], job.prompt[0] + len(job.prompt))) for job in cut)


def test_continuous_batching(tiny: torch.nn.Module) -> None:
    loads = [requests.Load("few", 6, (3, 12), (2, 9))]
    seen: list[tuple[str, str]] = []
    found = continuous_batching.bench(tiny, loads, repeats=2, on_run=lambda *run: seen.append(run))
    json.dumps(found, allow_nan=False)
    assert len(seen) == continuous_batching.runs_of(loads, 2)
    assert found["passed"]
    (load,) = found["loads"]
    assert load["refused"] is None
    assert list(load["ways"]) == ["stock, one by one", "stock generate_batch", "llmopt"]
    assert all(outcome == {"same": True, "identical": 6, "requests": 6} for outcome in load["equality"].values())
    assert [ratio["over"] for ratio in load["ratios"]] == ["stock, one by one", "stock generate_batch"]
    assert [point["load"] for point in found["rates"]["points"]] == list(continuous_batching.SHARES)
    assert all(point["goodput"] <= point["tokens_per_second"] for point in found["rates"]["points"])
    computed = [0] * len(found["timeline"]["requests"])
    for step in found["timeline"]["steps"]:
        assert step["began"] < step["ended"]
        for number, first, length in step["spans"]:
            assert first <= computed[number], "nothing is skipped"
            computed[number] = first + length
    wanted = [request["prompt"] + request["new"] - 1 for request in found["timeline"]["requests"]]
    assert computed == wanted, "the last token is never computed"
    drawing = plots.schedule(found["timeline"])
    root = ElementTree.fromstring(drawing)
    spans = sum(len(step["spans"]) for step in found["timeline"]["steps"])
    assert len(root.findall("{*}rect")) >= spans
    for made in continuous_batching_tables.tables(found):
        assert all(len(row) == len(made.columns) for row in made.rows)


def test_continuous_batching_refuses_to_compare_other_tokens(
    tiny: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = continuous_batching.ours

    def wrong(engine, requests):
        done = served(engine, requests)
        done.tokens[1][0] += 1
        return done

    monkeypatch.setattr(continuous_batching, "ours", wrong)
    found = continuous_batching.bench(tiny, [requests.Load("few", 3, (3, 9), (2, 5))], repeats=1)
    assert not found["passed"]
    assert found["loads"][0]["ratios"] == []
    assert found["rates"] is None
    assert "other tokens" in continuous_batching_tables.failures(found)[0]
    assert "FAILED" in str(continuous_batching_tables.tables(found)[0].rows)


# ------------------------------------------------------------------------------------------------------------ eviction


def test_eviction_needs_a_model_that_copies() -> None:
    texts = [list(range(3, 100)) * 4, list(range(99, 2, -1)) * 4]
    with pytest.raises(errors.InvalidText, match="none of 12 needles"):
        eviction.bench(build("llama"), texts, methods=("snapkv",), ratios=(0.5,), rows=4, length=160, following=4)


def test_eviction_tables() -> None:
    found = json.loads((Path(__file__).parent.parent / "docs/results/kv_cache-eviction.json").read_text("utf-8"))
    view = eviction.table(found)
    assert len(view.rows) == len(found["cases"]) == 11
    assert all(len(row) == len(view.columns) for row in view.rows)
    assert eviction.failures({**found, "reasons": ["why"]}) == ["why"]


def test_eviction_report() -> None:
    model, tokenizer = demo.load()
    texts = workloads.held_out_ids(tokenizer, 6)
    sizes = {"rows": 3, "length": 128, "following": 8}
    found = eviction.bench(model, texts, methods=("sink", "kvzip"), ratios=(0.5,), **sizes)
    whole, sink, kvzip = found["cases"]
    assert found["passed"]
    assert (whole["after"], whole["evicted"], kvzip["evicted"]) == (1.0, 0, 3 * 64)
    assert whole["held"] > max(sink["held"], kvzip["held"])
