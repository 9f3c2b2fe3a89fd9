"""`bench all`: that every combination is measured and judged, and that a run that was ended goes on."""

from __future__ import annotations

import copy
import gc
import json
import signal
import weakref
from pathlib import Path
from time import sleep
from xml.etree import ElementTree

import pytest
import torch
from architectures import build
from typer.testing import CliRunner

from hf_llmopt import LLMOptConfig, demo, errors
from hf_llmopt.bench import all as bench
from hf_llmopt.bench import all_cases, all_matrix, all_plan, all_tables, pages, slide
from hf_llmopt.bench.all_plan import Case, Plan, Source
from hf_llmopt.bench.workloads import held_out_ids
from hf_llmopt.cli import app
from hf_llmopt.cli.bench import all as command

pytestmark = pytest.mark.usefixtures("cheap_guesses")
SMALL = Plan(
    cases=(
        Case("one", 1, (6, 6), 4),
        Case("two, sampled", 2, (4, 6), 4, sampled=True),
        Case("again", 1, (20, 20), 2, again=True),
    ),
    requests=2, shared=18, own=(3, 5), new=(2, 4), repeats=1, tokens=64, context=32, dtypes=(),
)  # fmt: skip


def source(dtype: str = "float32") -> Source:
    return Source("tiny", lambda wanted: build("llama", dtype=getattr(torch, wanted)), dtype, None)


@pytest.fixture(scope="module")
def measured() -> tuple[dict, list[dict], list[str]]:
    """The report of everything, small, what was kept on the way, and what ran."""
    kept: list[dict] = []
    ran: list[str] = []
    with torch.random.fork_rng():
        report = bench.bench(source(), SMALL, keep=lambda report: kept.append(copy.deepcopy(report)), on_run=ran.append)
    return report, kept, ran


def test_every_combination_is_there_once(measured) -> None:
    report, _, ran = measured
    assert [(unit["weights"], unit["pages"]) for unit in report["matrix"]] == [
        (weights, pages) for weights in ("full", "int8", "int4") for pages in ("full", "int8")
    ]
    for unit in report["matrix"]:
        assert len({tuple(cell["parts"]) for cell in unit["cells"]}) == len(unit["cells"]) == 8
        for cell in unit["cells"]:
            assert cell["over"] == ("stock, padded batch" if "batching" in cell["parts"] else "stock")
            assert bool(cell["cached_tokens"]) == ("prompt cache" in cell["parts"])
            assert cell["seconds"]["median"] > cell["time_to_first_token"]["median"] > 0
            assert cell["kv_bytes"] > 0
    assert len(ran) == bench.runs_of(SMALL, "float32")
    json.dumps(report)


def test_it_passes_and_says_so(measured) -> None:
    report, _, _ = measured
    assert report["passed"], bench.failures(report)
    assert report["complete"]
    assert [case["name"] for case in report["cases"]] == ["one", "two, sampled", "again"]
    for case in report["cases"]:
        assert set(case["equality"]) == set(all_cases.WAYS) - {"memory"}  # which is lossy
        assert case["ways"]["True"]["attention"]
    again = report["cases"][2]["ways"]
    assert again["True"]["cached_tokens"] > 0 == again["kv_cache"]["cached_tokens"]
    assert {unit["name"] for unit in report["quality"]} == {unit["name"] for unit in report["matrix"]}


def test_memory_of_the_matrix(measured) -> None:
    report, _, _ = measured
    units = {(unit["weights"], unit["pages"]): unit for unit in report["matrix"]}
    assert units["full", "full"]["weight_bytes"] == units["full", "full"]["stock_weight_bytes"]
    assert (
        units["int4", "full"]["weight_bytes"]
        < units["int8", "full"]["weight_bytes"]
        < units["full", "full"]["weight_bytes"]
    )
    held = {pages: units["full", pages]["cells"][0]["kv_bytes"] for pages in ("full", "int8")}
    assert held["int8"] < held["full"]


def test_pages_cost_something(measured) -> None:
    """The reference is not read through the pages that it is compared with."""
    error = {(unit["weights"], unit["pages"]): unit["logit_error"] for unit in measured[0]["quality"]}
    assert error["full", "full"] == 0 < error["full", "int8"] < error["int4", "int8"]


@pytest.fixture
def not_measured(monkeypatch, measured) -> list[str]:
    """Names of the units that would have been measured; each is a copy of the first of its section."""
    asked: list[str] = []

    def unit(section: str, name: str) -> dict:
        asked.append(name)
        return {**measured[0][section][0], "name": name}

    def formats(section: str):
        return lambda model, full, weights, pages, *_: unit(section, all_plan.name_of(weights, pages, "float32"))

    monkeypatch.setattr(all_cases, "measure", lambda model, case, *_: unit("cases", case.name))
    monkeypatch.setattr(all_matrix, "measure_quality", formats("quality"))
    monkeypatch.setattr(all_matrix, "measure_group", formats("matrix"))
    return asked


def test_a_run_that_was_ended_goes_on(measured, not_measured) -> None:
    report, kept, ran = measured
    begun = json.loads(json.dumps(kept[4]))  # three cases, a quality, a group
    assert [len(begun[section]) for section in bench.SECTIONS] == [3, 1, 1]
    assert not begun["complete"]
    whole = bench.bench(source(), SMALL, former=begun)
    assert len(not_measured) == 10
    assert bench.runs_of(SMALL, "float32", former=begun) == len(ran) - 3 * 6 * 2 - 1 - 10 * 2
    assert whole["complete"]
    assert whole["cases"] == begun["cases"]
    for section in bench.SECTIONS:
        assert [unit["name"] for unit in whole[section]] == [unit["name"] for unit in report[section]]


def test_other_measurements_are_not_mixed_in(measured) -> None:
    begun = json.loads(json.dumps(measured[1][0]))
    begun["environment"]["threads"] += 1
    begun["seed"] = 7
    with pytest.raises(errors.InvalidOption, match=r"another seed, environment\.threads"):
        bench.bench(source(), SMALL, former=begun)


def test_ctrl_c_while_garbage_is_collected_ends_it(monkeypatch) -> None:
    """Each run collects garbage first. What a callback raises there goes nowhere, so the run went on."""

    class Garbage:
        pass

    def collect(*_, **__) -> None:
        garbage = Garbage()
        garbage.itself = garbage
        callback = weakref.finalize(garbage, signal.raise_signal, signal.SIGINT)
        del garbage
        gc.collect()
        assert not callback.alive
        sleep(60)  # not that long: the signal ends it
        raise AssertionError("it went on")

    monkeypatch.setattr(command, "load_or_build", lambda *_: (build("llama"), None, "tiny"))
    monkeypatch.setattr(bench, "bench", collect)
    ended = CliRunner().invoke(app, ["bench", "all", "--quick"])
    assert ended.exit_code == 130
    assert ended.exception is None or isinstance(ended.exception, SystemExit)


def test_what_is_wrong_is_found(monkeypatch, measured) -> None:
    """Other tokens, a lost bound and a slow case are each reported."""
    report = copy.deepcopy(measured[0])
    report["matrix"][0]["cells"][3] |= {"passed": False, "reasons": ["other tokens"], "ratio": None}
    report["quality"][1] |= {"passed": False, "reasons": ["0.5, at most 0.1"]}
    report["cases"][0]["ratios"]["True"] |= {"low": 0.9, "high": 1.2, "not_slower": False}
    assert bench.failures(report) == [
        "float32 weights, int8 pages: 0.5, at most 0.1",
        "float32 weights, float32 pages, prompt cache + speculation: other tokens",
    ]
    assert "one, float32" in bench.slower(report)
    said = "\n".join(all_tables.verdicts(report))
    assert all(words in said for words in ("47 of 48 combinations", "5 of 6 pairs", "not shown for"))
    assert "FAILED" in all_tables.page(report)
    ElementTree.fromstring(slide.slide(report, "dark"))

    model = build("llama")
    asked = all_matrix._one_by_one

    def wrong(model, config, jobs):
        found = asked(model, config, jobs)
        return all_matrix._Round([[3] * len(row) for row in found.tokens], *list(vars(found).values())[1:])

    monkeypatch.setattr(all_matrix, "_one_by_one", wrong)
    rounds = all_plan.rounds_of(source(), model, SMALL)
    unit = all_matrix.measure_group(model, model, "full", "full", source(), rounds, lambda way: None)
    bad = [cell["name"] for cell in unit["cells"] if not cell["passed"]]
    assert bad == ["none", "prompt cache", "speculation", "prompt cache + speculation"]
    assert all(cell["ratio"] is None for cell in unit["cells"] if not cell["passed"])


def test_figures_of_quick_have_no_interval_and_no_verdict(measured) -> None:
    whole = copy.deepcopy(measured[0])
    for case in whole["cases"]:
        case["ratios"]["True"] |= {"ratio": 2.0, "low": 1.875, "high": 2.125, "not_slower": True}
    quick = {**whole, "quick": True}
    for report, said in ((whole, True), (quick, False)):
        text = all_tables.page(report) + slide.slide(report, "light")
        for words in ("[1.88, 2.12]", "not slower than stock in 3 of 3", "95 % interval"):
            assert (words in text) == said
        assert "2.00" in text
        assert all_tables.tables(report)[0].rows[0][-1] == ("yes" if said else "")


def test_quality_beyond_its_bound_fails(monkeypatch) -> None:
    monkeypatch.setitem(all_matrix.LOGITS, "int4", 0.001)
    model = build("llama")
    found = all_matrix.measure_quality(all_matrix.quantized(model, "int4"), model, "int4", "full", source(), SMALL)
    assert not found["passed"]
    assert found["reasons"][0].endswith("at most 0.0010")


def test_perplexity_of_a_trained_model() -> None:
    """The bounds hold, and pages in 8 bits cost less than weights in 4."""
    model, tokenizer = demo.load()
    trained = Source("demo", lambda dtype: model, "float32", held_out_ids(tokenizer, 2))
    plan = Plan(tokens=512, context=128)
    pages = all_matrix.measure_quality(model, model, "full", "int8", trained, plan)
    weights = all_matrix.measure_quality(all_matrix.quantized(model, "int4"), model, "int4", "full", trained, plan)
    for unit in (pages, weights):
        assert unit["passed"], unit["reasons"]
        assert unit["measured"] == "perplexity"
    assert 0 < pages["logit_error"] < 0.2 * weights["logit_error"]
    assert handle_is_stock(model)


def handle_is_stock(model: torch.nn.Module) -> bool:
    """Reading through pages leaves no default behind."""
    return model.llmopt.config is None


def test_prompts_and_plans() -> None:
    model = build("llama")
    rounds = all_plan.rounds_of(source(), model, SMALL)
    shared = {tuple(job.prompt[: SMALL.shared]) for jobs in rounds for job in jobs}
    own = [tuple(job.prompt[SMALL.shared :]) for jobs in rounds for job in jobs]
    assert (len(rounds), len(shared), len(set(own))) == (SMALL.repeats + 1, 1, len(own))
    small, tiny = all_plan.in_small(Plan()), all_plan.in_miniature(Plan())
    assert max(case.rows for case in small.cases) == 8
    assert small.requests < Plan().requests
    assert [case.name for case in tiny.cases] == [case.name for case in Plan().cases]
    assert all_plan.name_of("full", "int8", "bfloat16") == "bfloat16 weights, int8 pages"
    configs = {all_matrix.config_of(pages, parts) for pages in all_plan.PAGES for parts in all_plan.cells()}
    assert len(configs) == 8
    assert LLMOptConfig() in configs  # batching is how requests come, not what they ask for


@pytest.mark.parametrize("theme", list(slide.THEMES))
def test_slide(measured, theme: str) -> None:
    drawn = slide.slide(measured[0], theme)
    root = ElementTree.fromstring(drawn)
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one, float32", "int4 weights"} <= set(words)
    inside = [float(text.get("x")) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(0 <= x <= slide.WIDTH for x in inside)
    ElementTree.fromstring(slide.slide(measured[1][0], theme))  # of what was measured first


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", "all", *arguments])


def test_command(tmp_path: Path, measured) -> None:
    saved = tmp_path / "all.json"
    saved.write_text(json.dumps({**measured[0], "quick": True}))
    done = run("--report", str(saved), "--markdown", "--plots", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "48 of 48 combinations" in done.stdout
    assert "not slower than stock in" not in done.stdout  # nothing is claimed of so few tokens
    assert "interval" not in done.stdout.replace("the interval begins at 0.97", "")
    assert {path.name for path in tmp_path.iterdir()} == {"all.json", "all.svg", "all-dark.svg"}
    for name in ("all", "all-dark"):
        assert (tmp_path / f"{name}.svg").read_text() == pages.drawn(tmp_path / f"{name}.svg")
    assert "every combination" in run("--report", str(saved)).stdout
    broken = copy.deepcopy(measured[0])
    broken |= {"passed": False}
    broken["quality"][0]["reasons"] = ["wrong"]
    saved.write_text(json.dumps(broken))
    assert run("--report", str(saved)).exit_code == 1


def test_command_measures_and_resumes(tmp_path: Path, monkeypatch, not_measured) -> None:
    monkeypatch.setattr(all_plan, "in_miniature", lambda plan: SMALL)
    output = tmp_path / "all.json"
    arguments = ("--quick", "--only", "cases", "--dtype", "float32", "--output", str(output))
    assert run(*arguments).exit_code == 0
    first = json.loads(output.read_text())
    assert (first["complete"], len(first["cases"]), first["matrix"]) == (True, 3, [])
    assert run(*arguments, "--resume").exit_code == 0
    assert len(not_measured) == 3
    assert json.loads(output.read_text())["cases"] == first["cases"]
    refused = run(*arguments, "--resume", "--seed", "5")
    assert refused.exit_code == 1
    assert "another" in refused.output
    assert "give --output" in run("--resume").output
    assert "Did you mean 'cases'" in run("--only", "case").output
