"""`bench peers`: the same work in every way, who is missing, and what happens if one refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import build
from typer.testing import CliRunner

from hf_llmopt.bench import generate, llama_cpp, openvino, pages, peers
from hf_llmopt.bench.peers import LATENCY, OPENVINO, OURS, STOCK, Work
from hf_llmopt.cli import app

pytestmark = pytest.mark.usefixtures("cheap_guesses")
WORKS = (Work(1, 6, 4), Work(2, 6, 4))


class Wrong:
    """A peer whose tokens are others."""

    def __init__(self, model: torch.nn.Module, threads: int) -> None:
        del model, threads

    def generate(self, ids: torch.Tensor, new_tokens: int) -> peers.Answer:
        return [[3] * new_tokens for _ in ids], 0.5, 0.1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is installed."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def test_all_ways_do_the_same_work(alone) -> None:
    model, seen = build("llama"), []
    report = peers.bench(model, build("llama", seed=1), WORKS, repeats=1, on_run=seen.append)
    assert report["passed"], report["reasons"]
    assert len(seen) == peers.runs_of(model, model, WORKS, 1, compiled=False)
    assert set(report["missing"]) == {"llama.cpp", "OpenVINO", "optimum-intel", "vLLM"}
    single, double = (case["groups"][0] for case in report["cases"])
    both = {STOCK, "stock, static cache", "stock, continuous batching", OURS, LATENCY}
    assert set(double["ways"]) == both
    assert set(single["ways"]) == both | {"stock, prompt lookup", "stock, assistant"}
    for group in (single, double):
        assert all(outcome["same"] for outcome in group["equality"].values())
        assert set(group["ratios"]) == set(group["ways"]) - {OURS}
    shown = "\n".join(" ".join(row) for table in peers.tables(json.loads(json.dumps(report))) for row in table.rows)
    assert "stock, static cache (float32)" in shown
    assert "pip install openvino" in shown
    assert pages.TABLES["peers"] is peers.tables


def test_peers_that_are_wrong_or_refuse(monkeypatch) -> None:
    """Another engine's other tokens are shown, and do not fail the report; one that raises is named with its reason."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in llama_cpp.NEEDED else object())
    monkeypatch.setattr(peers, "version", lambda package: "1")
    monkeypatch.setattr(openvino, "Peer", Wrong)
    monkeypatch.setattr(peers, "_batched", lambda *_: 1 / 0)
    report = peers.bench(build("llama"), None, WORKS[:1], repeats=1)
    (group,) = report["cases"][0]["groups"]
    assert report["passed"]
    assert not group["equality"][OPENVINO]["same"]
    assert group["refused"] == {"stock, continuous batching": "ZeroDivisionError: division by zero"}
    assert any("did not run" in row for row in peers.tables(report)[0].rows)


def test_our_other_tokens_fail_it(alone, monkeypatch) -> None:
    asked = peers._generate

    def wrong(model, ids, work, **arguments):
        tokens, *times = asked(model, ids, work, **arguments)
        return ([[3] * len(row) for row in tokens] if arguments.get("llmopt") is True else tokens), *times

    monkeypatch.setattr(peers, "_generate", wrong)
    monkeypatch.setattr(peers, "_batched", lambda *_: 1 / 0)
    report = peers.bench(build("llama"), None, WORKS[:1], repeats=1)
    assert report["reasons"] == ["1 x 6 + 4 tokens: llmopt=True: other tokens than stock"]
    assert report["cases"][0]["groups"][0]["ratios"] == {}


@pytest.mark.parametrize("rows", [1, 3])
def test_openvino_gives_our_tokens(rows: int) -> None:
    pytest.importorskip("openvino")
    model = build("llama")
    ids = torch.randint(3, 100, (rows, 7), generator=torch.Generator().manual_seed(0))
    tokens, seconds, first = openvino.Peer(model, 1).generate(ids, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock = generate(model, inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tokens == stock.output[:, 7:].tolist()
    assert 0 < first < seconds


@pytest.mark.slow
def test_command(tmp_path: Path, alone, monkeypatch) -> None:
    monkeypatch.setattr(peers, "QUICK", WORKS[:1])
    output = tmp_path / "peers.json"
    done = CliRunner().invoke(app, ["bench", "peers", "--quick", "--repeat", "1", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "stock, assistant" in done.stdout  # the embedded pair has a draft model
    assert json.loads(output.read_text())["model"]["name"] == "demo"
