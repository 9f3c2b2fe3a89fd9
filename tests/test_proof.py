"""The engine proves itself against the model's own forward pass, and does without what gives other logits."""

from __future__ import annotations

from typing import Any

import fresh
import pytest
import torch
from architectures import SMALL, UNPROVEN, build
from torch import nn
from transformers import MoshiConfig, MoshiForCausalLM

from hf_llmopt import Engine, errors
from hf_llmopt.engine import EngineLoop
from hf_llmopt.kernels import cpu

KW: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
needs_kernels = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))


def ids(rows: int = 1, tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))


def check(model: Any, served_by: str = "llmopt", tokens: int = 9) -> str:
    """Stock's tokens, served by whom; returns what was fused, or the reason."""
    expected = model.generate(ids(tokens=tokens), llmopt=False, **KW)
    assert torch.equal(model.generate(ids(tokens=tokens), llmopt="kv_cache", **KW), expected)
    stats = model.llmopt.stats
    assert stats.served_by == served_by, stats.reason
    return "; ".join(stats.fused) if served_by == "llmopt" else stats.reason


def wrong(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """A kernel whose proofs all pass, and that is wrong all the same."""
    monkeypatch.setattr("hf_llmopt.fusion.modules.own_rows", lambda *_: 16)  # which is faster must not matter here
    monkeypatch.setattr("hf_llmopt.fusion.watch._Trial.agrees", lambda *_: True)
    monkeypatch.setattr("hf_llmopt.fusion.modules._agrees", lambda *_: True)
    own = getattr(cpu, kernel)
    monkeypatch.setattr(cpu, kernel, lambda *args: own(*args) * 1.5)


@needs_kernels
def test_wrong_layers_run_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "layers")
    model = build("llama")
    fused = check(model)
    assert "decoder layer: eager, together they gave other logits" in fused
    assert "x product" in fused


@needs_kernels
def test_wrong_modules_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "layers")
    wrong(monkeypatch, "linear")
    model = build("llama")
    assert check(model) == "modules: eager, together they gave other logits"


def test_wrong_attention_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = EngineLoop.__init__

    def wrongly(self: EngineLoop, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            read = "hf_llmopt.attention.inputs.StepInputs.read"
            patch.setattr(read, lambda self, module, query, *_: query.transpose(1, 2))
            patch.setattr("hf_llmopt.engine.runner.Fusion", lambda *_: None)
            settle(self, *args)

    monkeypatch.setattr(EngineLoop, "__init__", wrongly)
    model = build("opt")
    with pytest.warns(UserWarning, match="differ from its own"):
        reason = check(model, "transformers")
    assert "logits over pages differ" in reason
    with pytest.raises(errors.UnsupportedModel, match="differ from its own by"):
        Engine(model)


@pytest.mark.parametrize("name", UNPROVEN)
def test_attention_that_nobody_is_told_of(name: str) -> None:
    with pytest.warns(UserWarning, match="not causal" if name == "bert" else "differ from its own"):
        check(build(name), "transformers")


def test_a_window_that_attention_is_not_told_of() -> None:
    config = MoshiConfig(**SMALL, sliding_window=6, audio_vocab_size=64, num_codebooks=2)
    with pytest.warns(UserWarning, match="keeps a window"):
        check(MoshiForCausalLM(config).eval(), "transformers", tokens=20)


def test_a_model_whose_last_layers_were_cut_off() -> None:
    """The config still names the kinds of all of them."""
    model = build("qwen2", num_hidden_layers=4)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    check(model)


def test_what_raises_in_the_model_is_no_verdict() -> None:
    """A hook that raises for now: there is nothing to compare with."""
    model = build("llama")
    fails = [True]

    def hook(module: nn.Module, given: Any) -> None:
        if fails[0] and given[0].shape[1] > 1:
            raise RuntimeError("not now")

    model.lm_head.register_forward_pre_hook(lambda module, given: hook(model.lm_head, given))
    with Engine(model):
        fails[0] = False
    check(model)


@needs_kernels
def test_batch_invariance_is_refused_every_time() -> None:
    """Not only the first time that a model is found to carry a hook."""
    model = build("llama")
    options = {"batch_invariant": True}
    expected = model.generate(ids(), llmopt=options, **KW)
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, given, gave: gave * 1.5)
    for _ in range(2):
        with pytest.raises(errors.UnsupportedModel, match="batch_invariant=True"):
            model.generate(ids(), llmopt=options, **KW)
    hook.remove()
    assert torch.equal(model.generate(ids(), llmopt=options, **KW), expected)


@needs_kernels
def test_heads_that_are_too_wide_for_the_kernels() -> None:
    model = build("qwen3", head_dim=640)
    expected = model.generate(ids(), llmopt=False, **KW)
    assert torch.equal(model.generate(ids(), llmopt={"strict": True}, **KW), expected)
    assert "cpu" not in model.llmopt.stats.attention
    with pytest.raises(errors.UnsupportedModel, match="batch_invariant=True needs the C kernels: heads of up to 512"):
        model.generate(ids(), llmopt={"batch_invariant": True}, **KW)


@pytest.mark.parametrize(("value", "said"), [("off", "HF_LLMOPT_CPU=off"), ("portable", "level portable"), ("sse", "")])
def test_a_level_from_the_environment(value: str, said: str) -> None:
    """In a process of its own: the extension is loaded once."""
    if value == "portable" and not cpu.available():
        pytest.skip(str(cpu.why_not()))
    found = fresh.run("-m", "hf_llmopt", "env", "--json", HF_LLMOPT_CPU=value)
    if value == "sse" and cpu.available():
        assert found.returncode
        assert "HF_LLMOPT_CPU 'sse' does not exist" in found.stderr
    elif said:
        assert said in found.stdout
