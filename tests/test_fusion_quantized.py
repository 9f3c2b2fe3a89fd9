"""Quantized models in joined layers: the tokens of their own modules, in every way to store and to multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_llmopt.errors import UnsupportedModel
from hf_llmopt.fusion import Fusion
from hf_llmopt.kernels import cpu
from hf_llmopt.quantization import QuantizedHead, QuantizedLinear
from hf_llmopt.quantization.formats import Scheme
from hf_llmopt.quantization.grid import make_grid

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

LIMIT = 16
INT4 = Scheme("pack-quantized", bits=4, group_size=32, symmetric=True)
ASYMMETRIC = Scheme("awq", bits=4, group_size=32, symmetric=False)
INT8 = Scheme("int-quantized", bits=8, group_size=-1, symmetric=True)
GREEDY = {"max_new_tokens": 10, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def _no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.fusion.modules.own_rows", lambda *_: LIMIT)


def quantized(name: str, *schemes: Scheme, activations: bool = True, skip: str = "-") -> Any:
    """A model whose products take turns in how they are stored."""
    model = build(name)
    chosen = [
        n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and "head" not in n and skip not in n
    ]
    for place, path in enumerate(chosen):
        module, scheme = model.get_submodule(path), schemes[place % len(schemes)]
        weight = module.weight.detach() if type(module) is nn.Linear else module.weight.detach().T.contiguous()
        grid = make_grid(weight, scheme.bits, scheme.group_size, scheme.symmetric, scale_dtype=torch.float32)
        made = QuantizedLinear.from_grid(grid, scheme, module.bias)
        made.activations = activations
        model.set_submodule(path, made.eval())
    return model


def inputs(*lengths: int) -> dict[str, torch.Tensor]:
    longest, generator = max(lengths), torch.Generator().manual_seed(0)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(3, 112, (len(lengths), longest), generator=generator) * mask,
        "attention_mask": mask,
    }


def tokens(model: Any, llmopt: Any, *lengths: int) -> torch.Tensor:
    output = model.generate(**inputs(*lengths), llmopt=llmopt, **GREEDY)
    if llmopt:
        assert model.llmopt.stats.served_by == "llmopt"
    return output.sequences


def joined(model: Any) -> bool:
    return f"{model.config.num_hidden_layers} x decoder layer" in model.llmopt.stats.fused


WEIGHTS_ONLY = ["llama", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "olmo2"]


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_only_gives_the_own_tokens(name: str) -> None:
    model = quantized(name, INT4, INT8, activations=False)
    theirs = tokens(model, False, 4, 11, 7)
    assert torch.equal(tokens(model, "kv_cache", 4, 11, 7), theirs)
    assert joined(model), model.llmopt.stats.fused


@pytest.mark.parametrize("schemes", [(INT4,), (INT8,), (ASYMMETRIC, INT4, INT8)], ids=["int4", "int8", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_give_the_own_logits(schemes: tuple[Scheme, ...], dtype: torch.dtype) -> None:
    model = quantized("llama", *schemes).to(dtype)
    given = {**inputs(9), "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    for _ in range(4):  # tokens of its own, each by one step
        theirs = model.generate(**given).logits[-1]
        ours = model.generate(**given, llmopt="kv_cache").logits[-1]
        bound = 0.05 if dtype is torch.float32 else 0.15
        assert float((ours - theirs).norm() / theirs.norm()) < bound
        given["input_ids"] = torch.cat([given["input_ids"], theirs.argmax(-1, keepdim=True)], dim=-1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    tokens(model, "kv_cache", 4, 11, 7)
    assert joined(model), model.llmopt.stats.fused


@pytest.mark.parametrize(("limit", "together"), [(1 << 30, True), (80, False)])
def test_prompts_join_as_far_as_the_products_are_ours(
    limit: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what is measured, the products choose one by one."""
    called, layers = list[int](), cpu.layers
    monkeypatch.setattr(cpu.BlockedWeight, "own_rows", lambda *_: limit)
    monkeypatch.setattr(cpu, "layers", lambda x, stages: called.append(len(x)) or layers(x, stages))
    tokens(quantized("llama", INT8), "kv_cache", 100)
    assert (100 in called) == together, called


def test_dense_products_among_quantized_ones() -> None:
    model = quantized("llama", INT4, activations=False, skip="k_proj")
    assert type(model.get_submodule("model.layers.0.self_attn.k_proj")) is nn.Linear
    assert torch.equal(tokens(model, "kv_cache", 9), tokens(model, False, 9))
    assert joined(model)


def test_a_group_across_blocks_stays_apart() -> None:
    """Phi-3's query, key and value are one product: cut between blocks of 16 outputs, or not joined."""
    model = quantized("phi3", INT4, activations=False)
    layer = model.model.layers[1]
    kernel = layer.self_attn.qkv_proj
    kernel.prepare()
    with pytest.raises(ValueError, match="16"):
        kernel.kernel.rows(8, 32)
    whole = kernel.kernel.rows(0, kernel.out_features)
    x = torch.randn(3, kernel.in_features)
    assert torch.equal(kernel.kernel.rows(16, 48).product(x), whole.product(x)[:, 16:48])


def test_a_replaced_weight_is_noticed() -> None:
    model = quantized("llama", INT4, activations=False)
    tokens(model, "kv_cache", 9)
    other = torch.randn(model.model.layers[0].mlp.up_proj.out_features, 64)
    grid = make_grid(other, 4, 32, scale_dtype=torch.float32)
    module = model.model.layers[0].mlp.up_proj
    state = QuantizedLinear.from_grid(grid, INT4).state_dict()
    module.load_state_dict(state)
    assert torch.equal(tokens(model, "kv_cache", 9), tokens(model, False, 9))


def test_weights_that_move_are_noticed() -> None:
    """Sharing memory with another process moves a kernel's tensors; what was there before is somebody else's."""
    model = quantized("llama", INT4, INT8)
    first = tokens(model, True, 9, 5)
    assert joined(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for tensor in module.kernel.tensors.values():
                former = tensor.untyped_storage()
                tensor.data = tensor.clone()
                former.fill_(0)
    assert torch.equal(tokens(model, True, 9, 5), first)


def test_quantized_head_and_batch_invariance() -> None:
    model = quantized("llama", INT4)
    model.lm_head = QuantizedHead.of(model.lm_head, bits=8, group_size=32)
    config = {"batch_invariant": True}
    given = dict(max_new_tokens=6, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    together = model.generate(**inputs(40, 9, 23), **given, llmopt=config)
    assert model.llmopt.stats.served_by == "llmopt"
    whole = inputs(40, 9, 23)
    for row in range(3):
        alone = model.generate(**{n: t[row : row + 1] for n, t in whole.items()}, **given, llmopt=config)
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert torch.equal(a[0], b[row])


def test_batch_invariance_needs_our_layout() -> None:
    model = quantized("llama", INT4)
    specs: list[Any] = [None] * 3
    Fusion(model, specs, layers=False, batch_invariant=True)
    model.model.layers[1].mlp.up_proj.kernel = object()
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj"):
        Fusion(model, specs, layers=False, batch_invariant=True)
