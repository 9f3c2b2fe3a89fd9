"""`docs/results/models.json` says how each architecture is served: a sample is tried here, all of them slowly."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep import REPORT, TEXT, TEXT_TO_IMAGES, WITH_IMAGES, sweep
from tiny_models import CAUSAL, IMAGES, architectures_of, build
from torch import nn
from typer.testing import CliRunner

from hf_llmopt.bench import models
from hf_llmopt.cli import app
from hf_llmopt.engine import position_limit

# One of each way to be served, or not: exactly, with limits, by transformers; shared keys, latent keys, images, states
# that lie in modules.
SAMPLE = ["olmo", "gemma4_text", "deepseek_v3", "bloom", "llava", "recurrent_gemma"]


@cache
def committed() -> dict[str, Any]:
    return json.loads(REPORT.read_text("utf-8"))["models"]


def test_a_sample_is_served_as_reported() -> None:
    found = sweep(SAMPLE)
    assert {name for of in found.values() for name in of} == set(SAMPLE)
    for title, of in found.items():
        for name, outcome in of.items():
            assert outcome == committed()[title][name], name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_architecture_is_served_as_reported() -> None:
    """`make models` writes the report again."""
    assert sweep() == committed()


def test_every_architecture_is_reported() -> None:
    assert set(committed()[TEXT]) == set(architectures_of(CAUSAL))
    assert set(committed()[TEXT_TO_IMAGES]) == set(committed()[WITH_IMAGES]) == set(architectures_of(IMAGES))


def test_no_tokens_are_wrong() -> None:
    served = [outcome["served"] for of in committed().values() for outcome in of.values()]
    assert models.WRONG not in served
    assert served.count(models.EXACTLY) > 90


def test_an_image_towers_positions_limit_nothing() -> None:
    """Its 16 patches have a table of positions; the text has rotary ones."""
    model = build("llava", IMAGES)
    assert any(isinstance(m, nn.Embedding) and m.num_embeddings == 17 for m in model.modules())
    assert position_limit(model) is None


def test_wrong_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmo")
    monkeypatch.setattr("hf_llmopt.generation.group.greedy", lambda scores: torch.zeros(len(scores), dtype=torch.long))
    assert models.tried(model).served == models.WRONG


def test_check_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("olmo").save_pretrained(tmp_path / "olmo")
    warned: list[str] = []
    transformers = logging.getLogger("transformers")
    monkeypatch.setattr(transformers, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(transformers.handlers[0], "handle", lambda record: warned.append(record.getMessage()))
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "olmo"), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["served"] == models.EXACTLY
    assert not [line for line in warned if "right-padding" in line]  # it is tried on purpose
    build("bloom").save_pretrained(tmp_path / "bloom")
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "bloom")])
    assert shown.exit_code == 1
    assert "attention interface" in shown.output
