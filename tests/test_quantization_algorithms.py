"""Quantization's algorithms: grids, GPTQ, the calibration set, and the walk through a model."""

from __future__ import annotations

import itertools
import math
import os
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from architectures import build
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_llmopt
from hf_llmopt.errors import CalibrationFailed, InvalidOption, UnsupportedQuantization
from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization import gptq
from hf_llmopt.quantization.blocks import Block, find_blocks, quantize_blocks
from hf_llmopt.quantization.calibration import documentation, pack
from hf_llmopt.quantization.grid import find_range, make_float8_grid, make_grid

BITS = (2, 3, 4, 8)


def error(weight: torch.Tensor, grid: Grid) -> float:
    return float((dequantize(grid) - weight).square().sum())


def same(one: Grid, other: Grid) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest_of_all(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32)
    grid = make_grid(weight, bits, 16, symmetric)
    zeros = torch.full_like(grid.scales, 2 ** (bits - 1)) if grid.zeros is None else grid.zeros.float()
    first = 1 if symmetric and bits == 8 else 0
    values = grid.scales.float()[..., None] * (torch.arange(first, 2**bits) - zeros.float()[..., None])
    nearest = (weight.view(6, 2, 16, 1) - values[:, :, None]).abs().amin(-1)
    found = (weight - dequantize(grid)).abs().view(6, 2, 16)
    assert torch.allclose(found, nearest, atol=1e-6)
    assert grid.codes.min() >= first
    assert int(grid.codes.max()) < 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_range_against_all_ranges(bits: int, symmetric: bool) -> None:
    """The squared error is close to the best of many scales of either sign, each with its codes."""
    weight = torch.randn(64, 32)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    best = torch.full((64,), torch.inf)
    spread = weight.abs().amax(1)
    for zero in [middle] if symmetric else range(top + 1):
        for share, sign in itertools.product(torch.linspace(0.1, 1.6, 300).tolist(), [1, -1] if symmetric else [1]):
            scale = sign * share * spread / middle
            exact = weight / scale[:, None]
            near = exact.round().clamp(-zero, top - zero)
            best = torch.minimum(best, (exact - near).square().sum(1) * scale.square())
    grid = make_grid(weight, bits, 32, symmetric)
    assert error(weight, grid) < (1.02 if symmetric else 1.06) * best.sum()
    assert error(weight, make_grid(weight, bits, 32, symmetric, clip=False)) > 1.02 * best.sum()


@pytest.mark.parametrize("bits", BITS)
def test_without_clip_every_weight_is_in_range(bits: int) -> None:
    weight = torch.randn(16, 64)
    for symmetric in (True, False):
        grid = make_grid(weight, bits, 32, symmetric, clip=False, scale_dtype=torch.float32)
        assert ((dequantize(grid) - weight).abs() <= grid.scales.abs().repeat_interleave(32, 1) * 0.5001).all()


def test_importance_moves_the_range() -> None:
    weight = torch.randn(32, 64)
    weight[:, 0] = 6.0
    heavy = torch.ones(64)
    heavy[0] = 1e4
    plain, weighted = (find_range(weight, 3, True, True, importance=i)[0] for i in (None, heavy))
    assert (weighted.abs() > plain.abs()).all()


def test_groups_of_zeros_tiny_and_large_weights() -> None:
    weight = torch.randn(4, 64)
    weight[0] = 0
    weight[1] *= 1e-10  # no scale in float16
    weight[2] = weight[2].abs() + 1e4
    for symmetric in (True, False):
        near = dequantize(make_grid(weight, 4, 32, symmetric))
        assert (near[:2] == 0).all()
        assert torch.allclose(near[2], weight[2], rtol=0.1)


def test_int8_leaves_the_lowest_code_free() -> None:
    grid = make_grid(torch.tensor([[-1.0, 0.5, 1.0], [0.1, -0.2, 0.0]]), 8, clip=False)
    assert grid.codes.tolist() == [[1, 192, 255], [192, 1, 128]]
    assert grid.zeros is None


def test_float8() -> None:
    weight = torch.randn(4, 32)
    weight[1] = 0
    grid = make_float8_grid(weight)
    assert grid.codes.dtype == torch.float8_e4m3fn
    assert grid.codes.float().abs().amax(1).tolist() == [448, 0, 448, 448]
    assert torch.allclose(dequantize(grid), weight, rtol=0.0625, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = torch.randn(4, 32)
    weight[2, 3] = bad
    for make in (make_float8_grid, partial(make_grid, bits=4, group_size=16)):
        with pytest.raises(UnsupportedQuantization, match="NaN or infinite"):
            make(weight)


# -------------------------------------------------------------------------------------------------------------- GPTQ


def inputs(tokens: int, width: int) -> torch.Tensor:
    """Correlated, with a few large channels."""
    x = torch.randn(tokens, width) @ torch.randn(width, width) / width**0.5
    x[:, ::11] *= 8
    return x


def loss(weight: torch.Tensor, grid: Grid, x: torch.Tensor) -> float:
    return float((x @ (dequantize(grid) - weight).T).square().sum())


def naive(weight: torch.Tensor, h: torch.Tensor, bits: int, size: int, order: list[int]) -> torch.Tensor:
    """Optimal brain surgeon (the paper's equations 2 and 3): the inverse of what is left, input by input, float64."""
    w, near, left = weight.double().clone(), torch.empty_like(weight), list(order)
    h = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h))
    for position, i in enumerate(order):
        if position % size == 0:
            group = order[position : position + size]
            heavy = torch.stack([1 / torch.linalg.inv(h[left[j:]][:, left[j:]])[0, 0] for j in range(size)])
            scale, zero = find_range(w[:, group].float(), bits, True, True, importance=heavy.float())
        inverse = torch.linalg.inv(h[left][:, left])
        q = ((w[:, i] / scale).round() + zero).clamp(0, 2**bits - 1)
        near[:, i] = (scale * (q - zero)).float()
        w[:, left] -= torch.outer((w[:, i] - near[:, i]) / inverse[0, 0], inverse[0])
        left.remove(i)
    return near


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_the_papers_update(bits: int, act_order: bool) -> None:
    x, weight = inputs(512, 48), torch.randn(8, 48)
    h = x.T @ x / 512
    grid = gptq.gptq(weight, h, bits, 16, act_order=act_order)
    order = list(range(48))
    if act_order:  # groups by their largest diagonal element, inputs inside likewise
        diagonal = h.diagonal().tolist()
        groups = sorted(range(3), key=lambda g: -max(diagonal[16 * g : 16 * g + 16]))
        order = [i for g in groups for i in sorted(range(16 * g, 16 * g + 16), key=lambda i: -diagonal[i])]
    want = naive(weight, h, bits, 16, order)
    assert (dequantize(grid) - want).abs().gt(1e-4).float().mean() < 0.01  # a tie may fall to either side


@pytest.mark.parametrize("size", [-1, 16, 48, 96, 192, 384])
def test_blocks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(1024, 384), torch.randn(16, 384)
    h = x.T @ x
    lazy = gptq.gptq(weight, h, 4, size)
    monkeypatch.setattr(gptq, "_block", lambda size: 384)
    eager = gptq.gptq(weight, h, 4, size)
    assert (dequantize(lazy) - dequantize(eager)).abs().gt(1e-4).float().mean() < 0.02
    assert 0.9 < loss(weight, lazy, x) / loss(weight, eager, x) < 1.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    x, weight = inputs(2048, 128), torch.randn(64, 128)
    grid = gptq.gptq(weight, x.T @ x, bits, 32, symmetric)
    assert loss(weight, grid, x) < 0.7 * loss(weight, make_grid(weight, bits, 32, symmetric), x)
    assert (grid.zeros is None) == symmetric
    assert grid.index is None
    assert grid.scales.dtype == torch.float16


def test_gptq_makes_up_for_what_came_before() -> None:
    """The product is nearer to the one of the inputs that the model had, at first."""
    exact, weight = inputs(2048, 64), torch.randn(32, 64)
    x = dequantize(make_grid(exact, 3, 16))
    hessian = gptq.Hessian(64, x.device)
    for part, there in zip(x.split(500), exact.split(500), strict=True):
        hessian.add(part, there)
    assert torch.allclose(hessian.drift, (exact - x).T @ x / len(x), atol=1e-4)

    def far(drift: torch.Tensor | None) -> float:
        near = dequantize(gptq.gptq(weight, hessian.value, 4, 16, drift=drift))
        return float((exact @ weight.T - x @ near.T).square().sum())

    assert far(hessian.drift) < 0.97 * far(None)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x, weight = inputs(512, 64), torch.randn(16, 64)
    x[:, 10:20] = 0
    near = dequantize(gptq.gptq(weight, x.T @ x, 8, 32))
    assert (near - weight)[:, 10:20].abs().max() < 0.02


def test_damping_grows_until_the_hessian_can_be_inverted() -> None:
    x, weight = inputs(4, 64), torch.randn(16, 64)  # rank 4 of 64
    grid = gptq.gptq(weight, x.T @ x, 4, 32, damping=1e-12)
    assert dequantize(grid).isfinite().all()
    assert loss(weight, grid, x) < loss(weight, make_grid(weight, 4, 32), x)


def test_activations_that_are_not_finite() -> None:
    with pytest.raises(CalibrationFailed, match="NaN or infinite"):
        gptq.gptq(torch.randn(4, 32), torch.full((32, 32), torch.nan), 4, 32)


def test_hessian_is_a_running_mean() -> None:
    x = torch.randn(300, 8)
    hessian = gptq.Hessian(8, x.device)
    for part in x.split([100, 0, 7, 193]):
        hessian.add(part.bfloat16())
    assert torch.allclose(hessian.value, x.bfloat16().float().T @ x.bfloat16().float() / 300, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the calibration set


class Words:
    """A tokenizer: a token for each character."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 50 for c in text]}


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2, 3], [4, 5, 6, 7]],
        [1, 2, 3, 4, 5, 6, 7],
        torch.arange(1, 8),
        [torch.arange(1, 4), torch.arange(4, 8)],
        torch.arange(1, 9).view(2, 4),
        {"input_ids": [[1, 2, 3], [4, 5, 6, 7]]},
        ({"input_ids": [i, i + 1]} for i in (1, 3, 5, 7)),
        ({"input_ids": torch.tensor([[i, i + 1]])} for i in (1, 3, 5, 7)),
    ],
)
def test_ids(given: object) -> None:
    assert pack(given, None, 8, 3, 50)[:2].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "given", ["abcdefgh", ["abc", "defgh"], [{"text": "abcdef", "label": 1}], {"text": ["abcdefg"]}]
)
def test_texts(given: object) -> None:
    assert pack(given, Words(), 8, 3, 50)[:2].tolist() == [[47, 48, 49], [0, 1, 2]]


def test_no_more_is_read_than_is_used() -> None:
    assert pack(([i] * 10 for i in itertools.count()), None, 2, 8, 50).shape == (2, 8)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "nothing in it"),
        ([""], "nothing in it"),
        ("", "nothing in it"),
        (["ab", "c"], "3 tokens, too few for one sample of 8. Give more, or a smaller length="),
        ([[1] * 7 + [50]], "token id 50, the model knows 0 to 49"),
        ([[1] * 7 + [-1]], "token id -1"),
        (7, "got int"),
        ([0.5, 0.25], "got float"),
        (torch.tensor(5), "1 tokens, too few"),
        (b"abcdefghijkl", "got bytes"),
        ([object()], "got object"),
        ([{"label": 1}], "has 'label', not"),
    ],
)
def test_unfit_sets(given: object, says: str) -> None:
    with pytest.raises(CalibrationFailed, match=says):
        pack(given, Words(), 4, 8, 50)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(CalibrationFailed, match="no tokenizer"):
        pack(["text"], None, 4, 8, 50)


def test_documentation_is_the_same_each_time(tmp_path: Path) -> None:
    first = list(itertools.islice(documentation(), 5))
    assert first == list(itertools.islice(documentation(), 5))
    assert pack(None, Words(), 4, 64, 50).shape == (4, 64)
    with pytest.raises(CalibrationFailed, match="no Python source"):
        next(documentation(tmp_path))


# ---------------------------------------------------------------------------------------------------------- the walk

TOKENS = torch.arange(6 * 24).view(6, 24) % 97 + 3
FALLBACK = partial(make_grid, bits=4, group_size=8)
METHOD = partial(gptq.quantize_block, bits=4, group_size=8)


def chosen(model: nn.Module) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}


def walk(model: nn.Module, method=METHOD, **options) -> dict[str, Grid]:
    return dict(quantize_blocks(model, method, FALLBACK, TOKENS, chosen(model), progress=False, **options))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),
        ("phi", ["q_proj k_proj v_proj fc1", "dense | fc2"]),
        ("gpt_neox", ["query_key_value | dense_h_to_4h", "dense | dense_4h_to_h"]),
        (
            "deepseek_v2",
            ["q_a_proj kv_a_proj_with_mqa", "q_b_proj | kv_b_proj", "o_proj", "gate_proj up_proj", "down_proj"],
        ),
    ],
)
def test_stages_follow_from_the_data(name: str, stages: list[str]) -> None:
    found: list[list[str]] = []

    def method(block: Block) -> dict[str, Grid]:
        short = [[[name.rpartition(".")[2] for name in names] for names in stage] for stage in block.stages]
        found.append([" | ".join(" ".join(names) for names in stage) for stage in short])
        return {name: FALLBACK(block.weight(name)) for name in block.products}

    walk(build(name), method)
    assert found[0] == stages


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "phimoe", "llama4_text"])
def test_blocks_see_what_the_model_computes(name: str) -> None:
    """Each block with the mask and positions of its own, and its successor's inputs with it."""
    model = build(name)
    _, layers = find_blocks(model, chosen(model))
    wanted: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: wanted.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    seen: list[torch.Tensor] = []

    def method(block: Block) -> dict[str, Grid]:
        seen.append(torch.cat([block.forward(batch) for batch in range(block.batches)]))
        block.replace = lambda name, grid: None  # type: ignore[method-assign]
        return {name: FALLBACK(block.weight(name)) for name in block.products}

    walk(model, method)
    for found, want in zip(seen, wanted, strict=True):
        assert torch.allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_the_model_is_left_as_it_was_but_for_its_weights(name: str) -> None:
    model = build(name).train()
    before = {
        n: (m._forward_hooks.copy(), m._forward_pre_hooks.copy(), "forward" in vars(m))
        for n, m in model.named_modules()
    }
    state = torch.get_rng_state()
    grids = walk(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert before == {
        n: (m._forward_hooks, m._forward_pre_hooks, "forward" in vars(m)) for n, m in model.named_modules()
    }
    assert grids.keys() == chosen(model).keys()
    for name, module in chosen(model).items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert torch.equal(weight, dequantize(grids[name], weight.dtype))


def test_inputs_come_from_what_is_quantized_already() -> None:
    """The Hessian of a stage is made by the stages and blocks before it, rounded."""
    model = build("llama")
    grids = walk(model)
    layer, seen = model.model.layers[1].mlp, []
    with torch.no_grad(), layer.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0])):
        model(TOKENS, use_cache=False)  # the whole model is quantized now
    original = build("llama").model.layers[1].mlp.down_proj.weight
    x = seen[0].flatten(0, 1)
    grid = gptq.gptq(original, x.T @ x / len(x), 4, 8)
    name = "model.layers.1.mlp.down_proj"
    assert (grids[name].codes == grid.codes).float().mean() > 0.99


def test_inputs_of_the_model_as_it_came_are_shown_beside_them() -> None:
    """And the weights are the rounded ones again afterwards."""
    model, original = build("llama"), build("llama")
    seen: dict[str, list[torch.Tensor]] = {}
    wanted: dict[str, torch.Tensor] = {}

    def method(block: Block) -> dict[str, Grid]:
        for stage in block.stages:
            block.observe(stage, lambda names, x, exact: seen.setdefault(names[0], []).append(exact))
            for name in itertools.chain(*stage):
                block.replace(name, FALLBACK(block.weight(name)))
        return {name: FALLBACK(block.weight(name)) for name in block.products}

    for name, module in chosen(original).items():
        module.register_forward_pre_hook(lambda m, args, name=name: wanted.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        original(TOKENS, use_cache=False)
    walk(model, method, exact=True)
    assert len(seen) == 4 * len(model.model.layers)
    assert all(torch.allclose(torch.cat(parts), wanted[name], atol=1e-4) for name, parts in seen.items())
    assert all(
        torch.equal(module.weight, dequantize(FALLBACK(original.get_submodule(name).weight), module.weight.dtype))
        for name, module in chosen(model).items()
    )


def test_of_products_that_read_some_tokens_nothing_is_shown_beside_them() -> None:
    """In the model as it came, experts read others."""

    class Some(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.mlp(x[:, :9]), x[:, 9:]], dim=1)

    model, shown = build("llama"), {}
    model.model.layers[1].mlp = Some(model.model.layers[1].mlp)

    def method(block: Block) -> dict[str, Grid]:
        for stage in block.stages:
            block.observe(stage, lambda names, x, exact: shown.update(dict.fromkeys(names, exact is not None)))
        return {name: FALLBACK(block.weight(name)) for name in block.products}

    walk(model, method, exact=True)
    assert shown.keys() == chosen(model).keys()
    assert all(there != name.startswith("model.layers.1.mlp.") for name, there in shown.items())


def test_products_that_too_few_tokens_reach_are_listed() -> None:
    model = build("llama")
    model.extra = nn.Linear(64, 64)  # outside of the blocks
    model.model.layers[0].mlp.unused = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match=r"reach 2 product\(s\) .* model\.layers\.0\.mlp\.unused, extra\. More"):
        grids = walk(model)
    assert torch.equal(dequantize(grids["extra"]), model.extra.weight)


def test_a_warning_names_three_of_many_products() -> None:
    with pytest.warns(UserWarning, match=r"reach 21 product\(s\) .*q_proj, [^ ]*k_proj, [^ ]*v_proj, …\. "):
        dict(quantize_blocks(build("llama"), lambda block: {}, FALLBACK, TOKENS[:1], chosen(build("llama"))))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_block_that_fails_is_left_as_it_came(name: str) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.inf
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    asked = {"method": name, "calibration": torch.randint(3, 112, (8, 32)), "samples": 8, "length": 32}
    with pytest.raises(UnsupportedQuantization, match=r"^model\.layers\.0: A weight has NaN"):
        hf_llmopt.optimize(model, llmopt={"quantization": asked})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_models_that_cannot_be_walked() -> None:
    with pytest.raises(CalibrationFailed, match="has no nn"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)), {"0": nn.Linear(2, 2)})
    model = build("llama")
    with pytest.raises(CalibrationFailed, match="Block 0 of LlamaForCausalLM cannot be run"):
        dict(quantize_blocks(model, METHOD, FALLBACK, torch.full((1, 8), 10**6), chosen(model), progress=False))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["gptq", "assigns"])
def test_a_calibration_that_was_killed_goes_on(kind: str, tmp_path: Path) -> None:
    def method(block: Block, last: int = 9) -> dict[str, Grid]:
        calls.append(block.name)
        if block.name.endswith(f".{last}"):
            raise Killed
        if kind == "assigns":
            name = f"{block.name}.input_layernorm.weight"
            block.assign(name, block.module.input_layernorm.weight * 1.25)
        return METHOD(block)

    calls: list[str] = []
    whole, model = build("llama"), build("llama")
    want = walk(whole, method)
    calls.clear()
    with pytest.raises(Killed):
        walk(model, partial(method, last=2), resume=tmp_path)
    assert calls == ["model.layers.0", "model.layers.1", "model.layers.2"]
    calls.clear()
    model = build("llama")
    grids = walk(model, method, resume=tmp_path)
    assert calls == ["model.layers.2"]
    assert all(same(grids[name], want[name]) for name in want)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_calibrations_are_not_used(tmp_path: Path) -> None:
    def begin(**options) -> list[str]:
        calls: list[str] = []

        def method(block: Block) -> dict[str, Grid]:
            calls.append(block.name)
            if block.name.endswith(".1"):
                raise Killed
            return METHOD(block)

        model = options.pop("model", None) or build("llama")
        with pytest.raises(Killed):
            walk(model, method, resume=tmp_path, **options)
        return calls

    assert begin() == ["model.layers.0", "model.layers.1"]
    assert begin() == ["model.layers.1"]
    assert len(begin(settings="bits=3")) == 2
    other = build("llama")
    other.model.layers[2].mlp.up_proj.weight.data += 1e-3
    assert len(begin(model=other)) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])  # torn
    with pytest.warns(UserWarning, match="ignored, and its block quantized again"):
        assert len(begin()) == 2
    assert begin() == ["model.layers.1"]


def test_a_file_that_a_killed_process_began_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            walk(build("llama"), METHOD, resume=tmp_path)
    (begun,) = tmp_path.iterdir()
    assert begun.suffix == ".tmp"
    walk(build("llama"), METHOD, resume=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder_to_resume_from(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for folder in (path, path / "inside"):
        with pytest.raises(InvalidOption, match=r"QuantizationConfig\(resume='.*file.* is no folder"):
            walk(build("llama"), METHOD, resume=folder)


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_offloaded_models(where: str, tmp_path: Path) -> None:
    def method(block: Block) -> dict[str, Grid]:
        block.assign(f"{block.name}.input_layernorm.weight", block.module.input_layernorm.weight * 1.25)
        return METHOD(block)

    want, model = walk(build("llama"), method), build("llama")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    grids = walk(model, method)
    assert all(same(grids[name], want[name]) for name in want)
    norm = model.model.layers[1].input_layernorm
    assert norm.weight.is_meta
    assert torch.equal(
        norm._hf_hook.weights_map["weight"], build("llama").model.layers[1].input_layernorm.weight * 1.25
    )


# --------------------------------------------------------------------------------------------------------- the quality
