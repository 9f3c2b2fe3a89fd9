"""AWQ and SmoothQuant: factors in front of products, and ranges for what they read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_llmopt
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization import awq, smoothquant
from hf_llmopt.quantization.blocks import ROUNDED, Block, quantize_blocks
from hf_llmopt.quantization.experts import unfuse
from hf_llmopt.quantization.graph import Fold
from hf_llmopt.quantization.grid import make_grid


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def products(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"}


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def quantize(model: PreTrainedModel, method: Any, ids: Tensor, bits: int = 4) -> dict[str, Any]:
    rtn = partial(make_grid, bits=bits, group_size=32, symmetric=False)
    return dict(quantize_blocks(model, method, rtn, ids, products(model), progress=False))


def inputs_with_outliers(draw: torch.Generator, tokens: int = 512, inputs: int = 64) -> Tensor:
    x = torch.randn(tokens, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    x[:, ::16] *= 30
    return x


def error(weight: Tensor, near: Tensor, x: Tensor) -> float:
    return float(((near - weight) @ x.T).square().sum())


def test_factors_make_the_products_better(draw: torch.Generator) -> None:
    x = inputs_with_outliers(draw)
    weights = [torch.randn(48, 64, generator=draw), torch.randn(32, 64, generator=draw)]
    nearest = partial(make_grid, bits=4, group_size=32, symmetric=False, clip=False)
    scales = awq.find_scales(weights, x, Fold("norm", ("a", "b"), torch.arange(64)), 32, nearest)
    assert scales[::16].min() > 2 * scales.median()
    for weight in weights:
        assert error(weight, dequantize(nearest(weight * scales)) / scales, x) < 0.5 * error(
            weight, dequantize(nearest(weight)), x
        )


def test_shared_inputs_have_one_factor(draw: torch.Generator) -> None:
    index = torch.arange(32).repeat(2)
    nearest = partial(make_grid, bits=4, group_size=32, symmetric=False, clip=False)
    weight = torch.randn(48, 64, generator=draw)
    scales = awq.find_scales([weight], inputs_with_outliers(draw), Fold("v", ("o",), index), 32, nearest)
    assert torch.equal(scales[:32], scales[32:])
    assert scales.unique().numel() > 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, -1])
def test_ranges_make_the_product_better(draw: torch.Generator, bits: int, symmetric: bool, group_size: int) -> None:
    x, weight = inputs_with_outliers(draw), torch.randn(48, 64, generator=draw)
    grid = awq.search_ranges(weight, x.T @ x, bits, group_size, symmetric)
    rounded = make_grid(weight, bits, group_size, symmetric)
    assert error(weight, dequantize(grid), x) < 0.9 * error(weight, dequantize(rounded), x)
    assert int(grid.codes.max()) < 2**bits
    assert (grid.zeros is None) == symmetric
    assert grid.scales.dtype is torch.float16


def test_weights_of_zeros_stay_zeros() -> None:
    grid = awq.search_ranges(torch.zeros(8, 32), torch.eye(32), 4, 16, False)
    assert torch.equal(dequantize(grid), torch.zeros(8, 32))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_awq_is_nearer_to_the_model_than_rounding(name: str) -> None:
    ids = torch.randint(3, 112, (16, 32), generator=torch.Generator().manual_seed(0))
    truth, model, rounded = logits(build(name), ids), build(name), build(name)
    unfuse(model)
    unfuse(rounded)
    grids = quantize(model, partial(awq.quantize_block, group_size=32), ids)
    assert grids.keys() == products(model).keys()
    plain = partial(make_grid, bits=4, group_size=32, symmetric=False)
    quantize(rounded, lambda block: {name: plain(block.weight(name)) for name in block.products}, ids)
    off, off_rounded = ((logits(m, ids) - truth).square().mean() for m in (model, rounded))
    assert off < 0.9 * off_rounded


def test_experts_with_few_tokens_are_rounded() -> None:
    model = build("mixtral")
    unfuse(model)
    listed: list[str] = []

    def method(block: Block) -> Any:
        made = awq.quantize_block(block, group_size=32)
        listed.extend(name for name, why in block.notes.items() if why == ROUNDED)
        return made

    with pytest.warns(UserWarning, match="too few tokens"):
        quantize(model, method, torch.arange(3, 99).view(4, 24))
    assert listed
    assert all(".experts." in name and name.endswith("down_proj") for name in listed)


def test_notes_of_blocks_that_were_done_before_a_stop_are_kept(tmp_path: Path) -> None:
    ids = torch.arange(3, 99).view(4, 24)

    def walk(blocks: int, notes: dict[str, str]) -> None:
        model, seen = build("olmo2"), set()
        grids = quantize_blocks(
            model, smoothquant.quantize_block, lambda weight: make_grid(weight, 8, -1), ids, products(model),
            progress=False, resume=tmp_path, notes=notes,
        )  # fmt: skip
        for name, _ in grids:
            seen.add(name.split(".")[2])
            if len(seen) > blocks:
                return

    whole: dict[str, str] = {}
    walk(1, {})
    assert list(tmp_path.iterdir())
    walk(99, whole)
    assert {name.split(".")[2] for name in whole} == {
        str(layer) for layer in range(build("olmo2").config.num_hidden_layers)
    }


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smoothquant_moves_outliers_into_weights(name: str) -> None:
    ids = torch.randint(3, 112, (8, 32), generator=torch.Generator().manual_seed(0))
    model = build(name)
    norm = next(module for name, module in model.named_modules() if "layers.0" in name and "norm" in name)
    norm.weight.data[5] = 100.0
    truth = logits(model, ids)
    grids = quantize(model, smoothquant.quantize_block, ids)
    assert norm.weight[5].abs() < 30
    assert {(grid.bits, grid.zeros) for grid in grids.values()} == {(8, None)}
    off = (logits(model, ids) - truth).square().mean() / truth.square().mean()
    assert off < 1e-2


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_by_the_keyword(method: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 112, (16, 32), generator=torch.Generator().manual_seed(0))
    config = {"method": method, "calibration": ids.tolist(), "samples": 16, "length": 32, "activations": "none"}
    model = hf_llmopt.optimize(build("llama"), llmopt={"quantization": config})
    assert len(model.llmopt.quantization.quantized) == 3 * 7
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, llmopt={"quantization": {**config, "calibration": None}})
    assert torch.equal(logits(again, ids[:2]), logits(model, ids[:2]))
