"""`bench serve`: that it sends what it says when it says, and refuses to compare other answers than `generate`'s."""

from __future__ import annotations

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from hf_llmopt import demo
from hf_llmopt.cli import app

pytest.importorskip("fastapi")

from served import Running, make, running

from hf_llmopt.bench import plots, serve, serve_load, serve_process, serve_tables
from hf_llmopt.bench.continuous_batching import Limits
from hf_llmopt.bench.serve_load import Ask, Client, Load

pytestmark = pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model has no weights")
TEXTS = ["import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n" * 3]
PLAN = serve.Plan(serve_load.QUICK, rates=(40.0,), clients=2, repeats=1)


@pytest.fixture(scope="module")
def pair():
    return demo.load()


@pytest.fixture(scope="module")
def it(pair):
    with running(make(pair, max_waiting=8)) as started:
        yield started


@pytest.fixture
def here(it: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is the server of this process; transformers' does not start."""

    @contextmanager
    def started(command, log: Path):
        if command != ["ours"]:
            raise serve_process.NoServer("No module named 'openai'")
        log.write_text("a log")
        yield serve_process.Server(it.url, SimpleNamespace(send_signal=lambda signal: None))

    monkeypatch.setattr(serve, "started", started)


def measure(pair, it: Running, folder: Path, plan: serve.Plan = PLAN, on_run=lambda part, way: None) -> dict:
    commands = {serve.OURS: ["ours"], serve.THEIRS: ["theirs"]}
    return serve.bench(pair[0], it.service.engine, pair[1], TEXTS, commands, folder, "demo", plan, on_run)


def test_draw_and_arrivals() -> None:
    load = Load(requests=300, groups=3, shared=40, own=(5, 9), new=(2, 4))
    asks = serve_load.draw(load, TEXTS, [0])
    assert asks == serve_load.draw(load, TEXTS, [0]) != serve_load.draw(load, TEXTS, [1])
    assert len({ask.prompt[:40] for ask in asks}) == 3
    assert {len(ask.prompt) for ask in asks} == set(range(45, 50))
    assert {ask.new for ask in asks} == {2, 3, 4}
    times = serve_load.arrivals(20.0, 4000, [0])
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(1 / 20, rel=0.1)


def test_the_report(pair, it, here, tmp_path) -> None:
    seen: list[tuple[str, str]] = []
    report = measure(pair, it, tmp_path, on_run=lambda *run: seen.append(run))
    json.dumps(report, allow_nan=False)
    assert report["passed"], report["reasons"]
    assert report["exact"]
    assert report["refused"] == {serve.THEIRS: "No module named 'openai'"}
    assert len(seen) == PLAN.runs - 2, "what did not start is not measured"
    saturated, at_rate = report["points"]
    assert (saturated["rate"], at_rate["rate"]) == (None, 40.0)
    for point in (saturated, at_rate):
        assert point["way"] == serve.OURS
        assert point["answered"] == point["same"] == point["requests"] == 4
        assert 0 < point["first_token"]["p50"] <= point["first_token"]["p99"] < point["seconds"]
        assert point["goodput"] <= point["requests_per_second"] <= point["tokens_per_second"]
    assert report["best"] == {serve.OURS: at_rate["goodput"]}
    for figures in report["overhead"]["ways"].values():
        samples = figures["seconds"]["samples"], figures["engine_seconds"]["samples"]
        ratio = math.prod(over / engine for over, engine in zip(*samples, strict=True))
        assert figures["times"]["ratio"] == pytest.approx(ratio)
    shown = serve_tables.tables(report)
    assert all(len(row) == len(made.columns) for made in shown for row in made.rows)
    assert "transformers serve did not start: No module named 'openai'" in shown[0].caption
    assert "llmopt" not in shown[0].title
    assert "llmopt=int8" in serve_tables.tables({**report, "llmopt": "int8"})[1].title
    assert ElementTree.fromstring(plots.served(report["points"])) is not None


def test_limits_decide_what_is_good(pair, it, here, tmp_path) -> None:
    plan = serve.Plan(serve_load.QUICK, (40.0,), Limits(1e-6, 1e-6), parts=(serve.RATES,))
    report = measure(pair, it, tmp_path, plan)
    assert report["passed"]
    assert [point["goodput"] for point in report["points"]] == [0.0, 0.0]
    assert report["overhead"] is None


def test_other_answers_are_not_compared(pair, it, here, tmp_path, monkeypatch) -> None:
    take = serve_load._take

    def wrong(reply, body):
        take(reply, body)
        reply.text += "?"

    monkeypatch.setattr(serve_load, "_take", wrong)
    report = measure(pair, it, tmp_path)
    assert not report["passed"]
    assert report["best"] == {}
    assert "8 answers other than generate's" in report["reasons"][0]
    assert f"{serve.STREAMED} gave 4" in str(report["reasons"])
    assert f"{serve.ENGINE} gave" not in str(report["reasons"])
    assert all("FAILED" in row for made in serve_tables.tables(report) for row in made.rows)


@pytest.mark.parametrize("streams", [False, True])
def test_errors_are_told(it, streams: bool) -> None:
    with Client(it.url, "demo", streams) as client:
        assert client(Ask("import", 5000)).error.startswith("400: ")
        assert client(Ask("import", 2)).error is None
    with Client("http://127.0.0.1:9", "demo", streams) as client:
        assert "refused" in client(Ask("import", 2)).error


def test_a_server_that_ends_says_why(tmp_path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such package')"]
    with pytest.raises(serve_process.NoServer, match="no such package"), serve_process.started(command, tmp_path / "x"):
        pass


def test_a_stretched_tokenizer_shows_every_token(pair) -> None:
    tokenizer = pair[1]
    more = serve_process.stretched(tokenizer, 5000)
    assert more(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert more.decode([4500, 4999]) == " w4500 w4999"
    assert more.decode(list(range(256, 4096))) == tokenizer.decode(list(range(256, 4096)))


@pytest.mark.slow
def test_against_transformers_serve(tmp_path) -> None:
    out = tmp_path / "report.json"
    done = CliRunner().invoke(
        app,
        ["bench", "serve", "--quick", "--repeat", "1", "--rate", "5", "--output", str(out), "--plots", str(tmp_path)],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text("utf-8"))
    assert report["refused"] == {}
    assert {point["way"] for point in report["points"]} == {serve.OURS, serve.THEIRS}
    assert all(point["same"] == point["requests"] for point in report["points"])
    assert (tmp_path / "serve.svg").is_file()
    again = CliRunner().invoke(app, ["bench", "serve", "--report", str(out), "--markdown"])
    assert "transformers serve" in again.output


@pytest.mark.slow
def test_a_shape_has_no_text(tmp_path) -> None:
    """Random weights over a vocabulary of which the tokenizer knows a part."""
    out = tmp_path / "report.json"
    given = ["--shape", "opt-125m", "--part", "overhead", "--no-stock", "--quick", "--repeat", "1"]
    done = CliRunner().invoke(app, ["bench", "serve", *given, "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text("utf-8"))["exact"]
