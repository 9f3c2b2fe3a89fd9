"""Mixtures of experts: a module for each product, in memory, while loading and when saved."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_llmopt
from hf_llmopt import QuantizationConfig
from hf_llmopt.errors import CalibrationFailed, UnsupportedQuantization
from hf_llmopt.quantization.experts import Expert, Experts, unfuse
from hf_llmopt.quantization.linear import QuantizedLinear
from hf_llmopt.quantization.plan import ROUTER, plan

# Plain, with shared experts, with two routers, transposed and interleaved with biases, with files that hold them fused,
# and called with all tokens for each expert.
MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss", "deepseek_v3", "granitemoehybrid", "llama4_text")


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 112, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def fused_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() == 3 and min(p.shape) > 1)


@pytest.mark.parametrize("name", MODELS)
def test_unfused_experts_compute_the_same(name: str) -> None:
    model = build(name)
    before, fused, size = logits(model), fused_weights(model), sum(p.numel() for p in model.parameters())
    assert unfuse(model).left == []
    linears = [m for e in model.modules() if isinstance(e, Experts) for m in e.modules() if type(m) is nn.Linear]
    assert sum(m.weight.numel() for m in linears) == fused > 0
    assert fused_weights(model) == 0
    assert sum(p.numel() for p in model.parameters()) == size
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_weights_share_the_memory_of_the_fused_ones() -> None:
    experts = build("mixtral").model.layers[0].mlp.experts
    fused = experts.gate_up_proj
    part = Experts(experts)[3].up_proj.weight
    assert part.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert torch.equal(part, fused[3, len(fused[3]) // 2 :])


def test_a_token_does_not_depend_on_the_others() -> None:
    model = build("qwen3_moe")
    unfuse(model)
    experts = model.model.layers[0].mlp.experts
    x, chosen = torch.randn(7, 64), torch.tensor([[0, 1], [1, 3], [3, 0], [0, 1], [1, 0], [3, 1], [1, 3]])
    weights = torch.rand(7, 2)
    together = experts(x, chosen, weights)
    for i in range(7):
        torch.testing.assert_close(experts(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1])[0], together[i])


def test_experts_that_nothing_is_known_of_stay_and_are_listed() -> None:
    model = build("llama4_text")
    before = logits(model)
    names = ["model.layers.1.feed_forward.experts", "model.layers.3.feed_forward.experts"]
    for name in names:
        experts = model.get_submodule(name)
        experts.__class__ = type("OtherExperts", (type(experts),), {})
    assert unfuse(model).left == names
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match=r"2 product\(s\) stay as they are, as .*cannot be told apart"):
        hf_llmopt.optimize(model, llmopt="int8")
    assert set(names) <= model.llmopt.quantization.skipped.keys()


# Products that choose or weigh experts; other models have modules of their own for that.
ROUTERS = {
    "qwen2_moe": {"shared_expert_gate"},
    "afmoe": {"router.gate"},
    "jetmoe": {"router.layer"},
    "gpt_oss": set(),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_routers_stay_as_they_are(name: str, method: str) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(name)
        config.num_hidden_layers = 3
        model = AutoModelForCausalLM.from_config(config)
    found = plan(model, QuantizationConfig(method), unfuse(model).left)
    routers = {name for name, why in found.skipped.items() if why == ROUTER}
    assert {".".join(name.split(".")[-2:]).removeprefix("mlp.") for name in routers} == ROUTERS[name]
    assert not any(name.split(".")[-2] in ("router", "gate") for name in found.chosen)
    assert any("proj" in name for name in found.chosen)


def test_gradients_pass_through_experts_that_are_handed_all_tokens() -> None:
    model = build("llama4_text")
    x = model.get_input_embeddings()(torch.arange(3, 12)[None]).detach()
    found = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        model(inputs_embeds=given).logits.square().sum().backward()
        found.append(given.grad)
        unfuse(model)
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


GROUPS = {"quantization": {"method": "int4", "group_size": 32}}
CASES = [
    ("mixtral", GROUPS),
    ("qwen3_moe", "int8"),
    ("gpt_oss", GROUPS),
    ("granitemoehybrid", "int8"),
    ("llama4_text", "int8"),
]


@pytest.mark.parametrize(("name", "llmopt"), CASES)
def test_experts_are_quantized_on_every_way(name: str, llmopt: Any, tmp_path: Path) -> None:
    """While loading, after loading and from a quantized file: the same weights, and those of `dequantize`."""
    full = build(name)
    full.save_pretrained(tmp_path / "full")
    loading = AutoModelForCausalLM.from_pretrained(tmp_path / "full", llmopt=llmopt)
    loaded = hf_llmopt.optimize(build(name), llmopt=llmopt)
    loading.save_pretrained(tmp_path / "quantized")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", llmopt=True)
    assert torch.equal(logits(loading), logits(loaded))
    assert torch.equal(logits(loading), logits(again))
    assert tensor_names(tmp_path / "quantized") == tensor_names(tmp_path / "again")

    report = loading.llmopt.quantization
    inside = [name for name in report.quantized if ".experts." in name]
    assert sum(loading.get_submodule(name).grid().codes.numel() for name in inside) == fused_weights(full)
    assert fused_weights(loading) == 0
    assert report.bytes < (0.21 if llmopt is GROUPS else 0.28) * report.bytes_before  # of float32

    for module in loading.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = False
    quantized = logits(loading)
    loading.hf_quantizer.dequantize(loading, torch.float32)
    torch.testing.assert_close(quantized, logits(loading), atol=2e-3, rtol=1e-3)


def test_files_have_the_names_that_others_give(tmp_path: Path) -> None:
    """Those of Mixtral are `w1`, `w2` and `w3`."""
    hf_llmopt.optimize(build("mixtral"), llmopt=GROUPS).save_pretrained(tmp_path)
    names = {name for name in tensor_names(tmp_path) if "layers.0." in name and ".experts.1" in name}
    stored = ("g_idx", "qweight", "qzeros", "scales")
    start = "model.layers.0.block_sparse_moe.experts.1"
    assert names == {f"{start}.{part}.{tensor}" for part in ("w1", "w2", "w3") for tensor in stored}


def test_skipped_experts_are_saved_and_read_again(tmp_path: Path) -> None:
    llmopt = {"quantization": {"method": "int8", "skip": ("experts",)}}
    model = hf_llmopt.optimize(build("mixtral"), llmopt=llmopt)
    assert len(model.llmopt.quantization.quantized) == 4 * 3
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", llmopt=True)
    assert len([module for module in again.modules() if isinstance(module, QuantizedLinear)]) == 4 * 3
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("loading", [True, False], ids=["loading", "loaded"])
@pytest.mark.parametrize(("name", "skip"), [("gpt_oss", "experts.0.down_proj"), ("qwen3_moe", "layers.1")])
def test_files_in_which_some_experts_are_quantized_are_read_again(name, skip, loading, tmp_path: Path) -> None:
    """The others were read as if all were fused: with random weights in their place."""
    llmopt, model = {"quantization": {"method": "int8", "skip": (skip,), "activations": "none"}}, build(name)
    if loading:
        model.save_pretrained(tmp_path / "full")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", llmopt=llmopt)
    else:
        hf_llmopt.optimize(model, llmopt=llmopt)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", llmopt={"quantization": {"activations": "none"}}
    )
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), logits(model))


def test_a_refused_call_leaves_fused_experts(tmp_path: Path) -> None:
    model = build("mixtral")
    before, modules = model.state_dict(), [type(module) for module in model.modules()]
    for refused in ({"group_size": 40}, {"method": "gptq", "calibration": []}, {"skip": ["layers"]}):
        with pytest.raises((UnsupportedQuantization, CalibrationFailed)):
            hf_llmopt.optimize(model, llmopt={"quantization": refused})
        assert [type(module) for module in model.modules()] == modules
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.state_dict().keys() == before.keys()
    hf_llmopt.optimize(model, llmopt={"quantization": {"method": "int8", "skip": ["experts"]}})
    assert fused_weights(model) == fused_weights(build("mixtral")), "what stays is not taken apart"


@pytest.mark.parametrize(("name", "after"), [("qwen3_moe", 5), ("llama4_text", 5), ("mixtral", 17)])
def test_files_of_a_model_whose_quantization_was_stopped(name: str, after: int, tmp_path: Path, monkeypatch) -> None:
    """Among experts; before the first; in a model whose files call them otherwise."""
    made, make = itertools.count(), QuantizedLinear.from_grid

    def from_grid(*args: Any) -> QuantizedLinear:
        if next(made) == after:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(QuantizedLinear, "from_grid", from_grid)
    model = build(name)
    with pytest.raises(KeyboardInterrupt):
        hf_llmopt.optimize(model, llmopt=GROUPS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, llmopt=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), logits(model))


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_quantized_experts_are_pickled() -> None:
    model = hf_llmopt.optimize(build("mixtral"), llmopt="int8")
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "mixtral", "gpt2"])
def test_a_model_that_was_made_dense_is_saved_as_any_other(name: str, tmp_path: Path) -> None:
    """Experts fused, GPT-2's weights transposed: so transformers reads them without us."""
    quantized = hf_llmopt.optimize(build(name), llmopt={"quantization": {"method": "int8", "head_bits": 8}})
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", llmopt=True)
    for number, model in enumerate((quantized, loaded)):
        model.dequantize()
        assert type(model.get_output_embeddings()) is nn.Linear
        model.save_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert again.state_dict().keys() == build(name).state_dict().keys() == model.state_dict().keys()
        assert torch.equal(logits(again), logits(model))


def test_an_expert_without_a_gate() -> None:
    up, down = nn.Linear(4, 6), nn.Linear(6, 4)
    x = torch.randn(3, 4)
    assert torch.equal(Expert({"up_proj": up, "down_proj": down}, torch.relu, False)(x), down(torch.relu(up(x))))
