"""Which products a factor can move in front of, by architecture, and that it changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import build
from torch import nn
from transformers import PreTrainedModel

from hf_llmopt.quantization.blocks import find_blocks
from hf_llmopt.quantization.experts import unfuse
from hf_llmopt.quantization.graph import Graph, find

VALUES, MLP = "self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj"
LLAMA = {
    "input_layernorm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    VALUES,
    "post_attention_layernorm -> mlp.gate_proj mlp.up_proj",
    MLP,
}
ONLY_INSIDE = {VALUES, MLP}  # norms stand behind the products, and nothing with weights before them
EXPERTS = "mlp.experts.N.gate_proj mlp.experts.N.up_proj"
FOLDS = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma2": {fold.replace("post_attention", "pre_feedforward") for fold in LLAMA},
    "gemma3_text": {fold.replace("post_attention", "pre_feedforward") for fold in LLAMA},
    "olmo2": ONLY_INSIDE,
    "olmo": ONLY_INSIDE,  # its norms have no weights
    "gpt_neox": {  # another activation than one of two factors stands before the last product
        "input_layernorm -> attention.query_key_value",
        "attention.query_key_value -> attention.dense",
        "post_attention_layernorm -> mlp.dense_h_to_4h",
    },
    "cohere": {
        "input_layernorm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
        VALUES,
        MLP,
    },
    "phi3": {
        "input_layernorm -> self_attn.qkv_proj",
        "self_attn.qkv_proj -> self_attn.o_proj",
        "post_attention_layernorm -> mlp.gate_up_proj",
        "mlp.gate_up_proj -> mlp.down_proj",
    },
    "opt": {
        "self_attn_layer_norm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "self_attn.v_proj -> self_attn.out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",  # relu(x / s) = relu(x) / s
    },
    "gpt2": {"ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"},
    "mixtral": {
        *(fold for fold in LLAMA if "mlp" not in fold),
        f"post_attention_layernorm -> mlp.gate {EXPERTS}",
        "mlp.experts.N.up_proj -> mlp.experts.N.down_proj",
    },
    "qwen3_moe": {
        *(fold for fold in LLAMA if "mlp" not in fold),
        f"post_attention_layernorm -> mlp.gate {EXPERTS}",
        "mlp.experts.N.up_proj -> mlp.experts.N.down_proj",
    },
    "gpt_oss": {  # (up + 1) times the gate: no factor of up is one of the result
        *(fold for fold in LLAMA if "mlp" not in fold),
        f"post_attention_layernorm -> mlp.router {EXPERTS}",
    },
    "deepseek_v3": {
        "input_layernorm -> self_attn.q_a_proj self_attn.kv_a_proj_with_mqa",
        "self_attn.q_a_layernorm -> self_attn.q_b_proj",
        "self_attn.kv_a_layernorm -> self_attn.kv_b_proj",
        "self_attn.kv_b_proj -> self_attn.o_proj",
        f"post_attention_layernorm -> mlp.gate mlp.shared_experts.gate_proj mlp.shared_experts.up_proj {EXPERTS}",
        "mlp.experts.N.up_proj -> mlp.experts.N.down_proj",
        "mlp.shared_experts.up_proj -> mlp.shared_experts.down_proj",
    },
}


def graphs(model: PreTrainedModel) -> list[tuple[nn.Module, Graph]]:
    """Each block with its graph, found with the arguments that the model gives it."""
    _, blocks = find_blocks(model, dict(model.named_modules()))
    given: list[tuple[nn.Module, tuple, dict]] = []
    hooks = [block.register_forward_pre_hook(lambda *call: given.append(call), with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(torch.arange(3, 27).view(2, 12), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(block, find(block, args[0], kwargs, args[1:])) for block, args, kwargs in given]


def words(graph: Graph) -> set[str]:
    """The folds, with one name for all experts."""
    lines = set()
    for fold in graph.folds:
        names = [re.sub(r"\b\d+\b", "N", name) for name in (fold.producer, *fold.consumers)]
        producer, *consumers = names
        lines.add(f"{producer} -> {' '.join(dict.fromkeys(consumers))}")
    return lines


@pytest.mark.parametrize("name", FOLDS)
def test_folds_are_found_and_change_nothing(name: str) -> None:
    model = build(name)
    unfuse(model)
    ids = torch.arange(3, 27).view(2, 12)
    found = graphs(model)
    assert words(found[-1][1]) == FOLDS[name]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        drawn = torch.Generator().manual_seed(0)
        changed = 0
        for block, graph in found:
            for fold in graph.folds:
                scales = fold.shared(0.5 + 1.5 * torch.rand(len(fold.index), generator=drawn))
                for parameter, value in fold.moved(block, scales).items():
                    changed += int(not torch.equal(block.get_parameter(parameter), value))
                    block.get_parameter(parameter).copy_(value)
        assert changed >= 2 * sum(len(graph.folds) for _, graph in found)
        after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_heads_that_share_values_share_factors() -> None:
    model = build("llama")  # 4 query heads of width 16 on 2 heads of values
    (fold,) = (f for f in graphs(model)[0][1].folds if f.producer == "self_attn.v_proj")
    heads = fold.index.view(2, 2, 16)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0].flatten(), torch.arange(32))
    means = fold.shared(torch.arange(64.0)).view(2, 2, 16)
    assert torch.equal(means[:, 0], means[:, 1])
    assert torch.equal(means[0, 0], torch.arange(16.0) + 8)


def test_products_that_no_fold_feeds_are_listed_with_the_reason() -> None:
    left = graphs(build("olmo2"))[0][1].left
    assert set(left) == {f"self_attn.{x}_proj" for x in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert set(left.values()) == {"no norm or product with weights gives its inputs"}
    fused = graphs(build("llama4_text"))[1][1]  # experts stay fused, so the norm before them cannot change
    assert "post_attention_layernorm changes more" in fused.left["feed_forward.shared_expert.up_proj"]


def test_the_block_and_the_random_state_are_left_alone() -> None:
    model = build("qwen3")
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    graphs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_and_zero_weights_do_not_matter() -> None:
    model = build("gemma2", dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.zero_()
    found = graphs(model)[0][1]
    assert words(found) == FOLDS["gemma2"]
    assert {fold.offset for fold in found.folds if "norm" in fold.producer} == {1.0}
