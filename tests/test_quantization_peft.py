"""PEFT's adapters beside quantized weights: they train, serve, and are merged into dense weights only."""

import gc
import warnings

import peft
import pytest
import torch
from architectures import build
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig, QuantizationConfig, QuantizedLinear
from hf_llmopt.errors import UnsupportedQuantization
from hf_llmopt.quantization import traced

# Names that transformers has renamed, and PEFT asks for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)`:FutureWarning"
)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
EXACT = {"quantization": {"method": "int4", "activations": "none"}}
IDS = torch.arange(3, 15).view(1, 12)


def quantized(llmopt="int4", name: str = "llama", **options):
    return hf_llmopt.optimize(build(name, **options), llmopt=llmopt)


def adapted(llmopt="int4", name: str = "llama", **options):
    torch.manual_seed(0)
    return peft.get_peft_model(quantized(llmopt, name), peft.LoraConfig(**{**LORA, **options}))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def steps(model, count: int = 12) -> list[float]:
    """Losses of a few steps on one row."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_adapters_train_beside_weights_that_stay(method) -> None:
    model = adapted(method)
    bases = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(bases) == 21
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in bases.items()}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    losses = steps(model.train())
    assert losses[-1] < 0.5 * losses[0]
    for name, module in bases.items():
        assert all(torch.equal(tensor, before[name][k]) for k, tensor in module.state_dict().items())


def test_gradients_are_those_over_the_dequantized_weights() -> None:
    model = adapted(EXACT, init_lora_weights=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for p in model.parameters():
        p.grad = None
    model.get_base_model().dequantize()
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    model(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in theirs)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-5, rtol=1e-3)


def test_a_training_step_keeps_no_dense_weight() -> None:
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    model = quantized()
    module = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, module.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert torch.Size([module.out_features, module.in_features]) not in kept
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.dense(torch.float32).sum(0).expand_as(x))


def test_a_bias_may_train() -> None:
    model = adapted(EXACT, "qwen2", bias="all")
    biases = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith("q_proj.base_layer.bias")}
    assert biases
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in biases.values())


def test_under_autocast_and_gradient_checkpointing() -> None:
    model = adapted(init_lora_weights=False).train()
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_generate_and_requests_serve_what_was_trained() -> None:
    model = adapted(EXACT)
    before = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, llmopt="kv_cache")
    steps(model.train())
    model.eval()
    base = model.get_base_model()
    theirs = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, llmopt=False)
    ours = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, llmopt="kv_cache")
    assert base.llmopt.stats.served_by == "llmopt"
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)
    with Engine(base) as engine:
        one, none = (
            engine.submit(IDS[0].tolist(), max_new_tokens=6, adapter=adapter) for adapter in ("default", "__base__")
        )
        assert one.result()[-6:] == theirs[0, -6:].tolist()
        assert none.result()[-6:] == before[0, -6:].tolist()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_merging_is_refused_until_the_model_is_dense(method, safe) -> None:
    model = adapted(method, init_lora_weights=False)
    before = logits(model)
    with pytest.raises(UnsupportedQuantization, match="dequantize"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), before)
    base = model.get_base_model()
    assert len(base.llmopt.quantization.quantized) == 21
    base.dequantize()
    dense = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(merged), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"target_modules": "all-linear"}, {"use_rslora": True}], ids=str
)
def test_variants(options) -> None:
    model = adapted(**options)
    losses = steps(model.train(), 6)
    assert losses[-1] < losses[0]


def test_initializations_that_write_to_the_weight_are_refused() -> None:
    with pytest.raises(UnsupportedQuantization, match="cannot be written"):
        adapted(init_lora_weights="pissa")


def test_transformers_own_adapters_are_saved_alone_and_come_back(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", llmopt=EXACT)
    model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full", llmopt=EXACT)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_what_stands_below_an_adapter_can_be_quantized_and_the_adapter_stays() -> None:
    model = build("llama")
    model.add_adapter(peft.LoraConfig(**{**LORA, "r": 32}, init_lora_weights=False))
    expected = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    hf_llmopt.optimize(model, llmopt="int4")
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, QuantizedLinear)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if "lora_" in n)
    assert sum("lora_" in n for n, _ in model.named_parameters()) == len(expected)
    report = model.llmopt.quantization
    assert not any("lora_" in name for name in report.quantized)
    assert any(why == "part of an adapter" for why in report.skipped.values())


def test_the_trainer_trains_adapters_and_refuses_to_train_without(tmp_path) -> None:
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(adapted(), arguments, train_dataset=rows).train()
        with pytest.raises(ValueError, match="adapters"):
            Trainer(quantized(), arguments, train_dataset=rows)


def test_a_module_that_is_gone_is_not_kept_alive_by_its_operator() -> None:
    gc.collect()
    before = len(traced._modules)
    model = adapted(LLMOptConfig(quantization=QuantizationConfig("int4", head_bits=8)))
    steps(model, 1)
    assert len(traced._modules) > before
    del model
    gc.collect()
    assert len(traced._modules) == before
