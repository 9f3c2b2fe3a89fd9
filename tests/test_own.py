"""Drafters, eviction methods, kernels and file formats of a user's own: the templates run, and mistakes are told."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_llmopt
from hf_llmopt import AttentionConfig, KVCacheConfig, QuantizationConfig, SpeculativeConfig, demo
from hf_llmopt.config import OWN
from hf_llmopt.errors import InvalidCheckpoint, InvalidOption
from hf_llmopt.kv_cache.eviction import Eviction

TEMPLATES = Path(__file__).parent.parent / "examples" / "templates"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Names end with the test that gave them."""
    before = {kind: dict(names) for kind, names in OWN.items()}  # docstrings and pages register too
    for names in OWN.values():
        names.clear()
    bar = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    for kind, names in OWN.items():
        names.clear()
        names.update(before[kind])


def run(name: str, run_name: str = "__main__") -> None:
    if name == "kernel":
        pytest.importorskip("triton")
    runpy.run_path(str(TEMPLATES / f"{name}.py"), run_name=run_name)


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.py")))
def test_templates_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each asserts what it shows: served by llmopt, through what it registered."""
    run(name)
    assert capsys.readouterr().out.strip()
    assert sum(map(len, OWN.values())) == 1


def test_templates_are_the_kinds() -> None:
    kinds = {"drafter": "drafter", "eviction": "eviction", "file_format": "format", "kernel": "attention"}
    assert {path.stem for path in TEMPLATES.glob("*.py")} == kinds.keys()
    assert set(kinds.values()) == OWN.keys()


@pytest.mark.parametrize(
    ("kind", "name", "made", "message"),
    [
        ("evicton", "mine", Eviction, "Did you mean 'eviction'"),
        ("eviction", "sink", Eviction, "does not know yet; it knows 'sink', 'snapkv'"),
        ("attention", "auto", len, "it knows 'auto'"),
        ("format", "gptq", len, "it knows 'awq'"),
        ("drafter", "", len, "the name is a text"),
        ("drafter", "mine", "lookup", "can be called, got str"),
    ],
)
def test_mistakes(kind: str, name: str, made: object, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        hf_llmopt.register(kind, name, made)  # type: ignore[arg-type]
    assert not any(OWN.values())


def test_names_are_taken_only_once_they_are_registered() -> None:
    for config in (AttentionConfig, SpeculativeConfig, lambda name: KVCacheConfig(eviction=name)):
        with pytest.raises(InvalidOption, match="'mine' does not exist"):
            config("mine")
    hf_llmopt.register("eviction", "mine", Eviction)
    assert KVCacheConfig(eviction="mine").eviction == "mine"
    with pytest.raises(InvalidOption, match="Did you mean 'mine'"):
        KVCacheConfig(eviction="mien")
    with pytest.raises(InvalidOption, match="'mine' does not exist"):
        AttentionConfig("mine")


def test_files_of_a_format_that_is_not_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are named, instead of loaded as if they held full weights; registered, all ways to them agree."""
    run("file_format", run_name="imported")
    logging.disable_progress_bar()
    keyword = {"quantization": QuantizationConfig("int4", format="nibbles", skip="down_proj")}
    model = hf_llmopt.optimize(demo.load()[0], llmopt=keyword)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, llmopt=True)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    OWN["format"].clear()
    with pytest.raises(InvalidCheckpoint, match="'nibbles', which nobody knows"):
        AutoModelForCausalLM.from_pretrained(tmp_path, llmopt=True)
