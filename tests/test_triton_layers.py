"""A decoder layer from Triton kernels against its twin: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, ragged
from torch import Tensor

from hf_llmopt.engine import runner
from hf_llmopt.fusion import head, launched
from hf_llmopt.kernels import reference
from hf_llmopt.kernels.arguments import Norm, Product, Turns
from hf_llmopt.quantization import make_grid

pytest.importorskip("triton")
from hf_llmopt.kernels.triton import argmax, int_linear, leaders, weight, wide
from hf_llmopt.kernels.triton import few as few_rows
from hf_llmopt.kernels.triton import layer as layers
from hf_llmopt.kernels.triton.few import Tile, few
from hf_llmopt.kernels.triton.gated import gated
from hf_llmopt.kernels.triton.norm import norm
from hf_llmopt.kernels.triton.rotary import Pages, place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, truth: Tensor, roundings: float = 2) -> None:
    """Equal but for so many roundings of the format, relative to the largest value."""
    assert (ours.dtype, ours.shape) == (truth.dtype, truth.shape)
    roundings *= 1 if ours.is_cuda else 2  # the interpreter cuts bfloat16 where a GPU rounds
    bound = roundings * torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps
    assert float((ours.float() - truth.float()).abs().max()) <= bound * float(truth.float().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("centre", "variant"), [(False, 0), (False, 1), (False, 2), (True, 0), (True, 1)])
def test_norms(dtype: torch.dtype, centre: bool, variant: int) -> None:
    weight, bias = random(24, dtype=dtype, seed=1), random(24, dtype=dtype, seed=2) if centre else None
    how = Norm(weight, bias, 24, 1e-3, centre, variant)
    wide = random(3, 60, dtype=dtype)
    x = wide[:, 5:53]  # two heads of wider rows
    close(norm(x, how), reference.norm(x.reshape(3, 2, 24), how).flatten(1))
    plain = Norm(None, None, 24, 1e-3, centre)
    close(norm(x, plain), reference.norm(x.reshape(3, 2, 24), plain).flatten(1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2047, 5000])
def test_argmax(dtype: torch.dtype, width: int) -> None:
    x = random(7, width + 3, dtype=dtype)[:, :width]
    x[1, width // 2] = float("nan")
    x[2] = float("-inf")
    x[3, [width // 3, -1]] = 100  # the first of equals
    x[4, -1] = float("inf")
    x[5, 0] = x[5, -1] = float("nan")
    assert argmax.serves(x)
    assert argmax.argmax(x).tolist() == reference.argmax(x).tolist()
    assert not argmax.serves(x.T) or width == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 40), (2100, 128), (4500, 64)])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_leaders_are_settled(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> None:
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    weight[outputs // 2 :: 7] = weight[outputs // 3]  # ties
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    copied = torch.round(weight.float() / scale) * scale
    error, size = (weight.float() - copied).norm(dim=1), float(copied.norm(dim=1).max())
    estimates = (x.float() @ copied.T).to(dtype)
    given = estimates.clone()
    ours = leaders.settle(estimates, x, weight, error, size)
    theirs = reference.settle(given, x, weight, error, size)
    whole = reference.linear(x, weight)
    close(ours, theirs)
    nowhere = torch.full_like(weight, float("nan"))  # shows what is multiplied
    multiplied = leaders.settle(given.clone(), x, nowhere, error, size).isnan()
    assert torch.equal(multiplied, reference.settle(given, x, nowhere, error, size).isnan())
    assert torch.equal(theirs.argmax(1), whole.argmax(1))
    exact = ours.gather(1, ours.argmax(1, keepdim=True)), ours.gather(1, whole.argmax(1, keepdim=True))
    assert torch.equal(*exact)  # the same token, or one whose product is as large
    x[0, 0] = float("nan")
    assert bool(leaders.settle(given, x, weight, error, size)[0].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu", "relu2"])
def test_activations(dtype: torch.dtype, kind: str) -> None:
    gate, up = random(3, 50, dtype=dtype).split([20, 30], dim=1)
    up = up[:, :20]
    close(gated(gate, up, kind), reference.gated(gate, up, kind))
    close(gated(10 * gate, None, kind), reference.gated(10 * gate, None, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [0, 8, 12])
@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_turns_and_pages(dtype: torch.dtype, rotated: int, pairs: int, normed: bool) -> None:
    """Two query heads, one key head of 12, of values of 5, which lie in one row behind one another."""
    row = random(3, 2 * 12 + 12 + 5, dtype=dtype)
    query, key, value = row.split([24, 12, 5], dim=1)
    query, key, value = query.unflatten(1, (2, 12)), key.unflatten(1, (1, 12)), value.unflatten(1, (1, 5))
    exact = torch.float32 if pairs == 1 else dtype
    angles = [random(3, rotated, dtype=exact, seed=seed) for seed in (3, 4)] if rotated else [None, None]
    turns = Turns(*angles, torch.tensor([4, 0, 2], device=DEVICE), pairs)
    norms = [Norm(random(12, dtype=dtype, seed=seed), None, 12, 1e-5) if normed else None for seed in (5, 6)]
    pages = Pages(*(torch.full((6, 1, width), float("nan"), dtype=dtype, device=DEVICE) for width in (12, 5)))
    found = place(query, key, value, (norms[0], norms[1]), turns, pages)
    for ours, x, how in zip(found, (query, key), norms, strict=True):
        x = x if how is None else reference.norm(x, how)
        close(ours, reference.rotate(x, turns))
    assert torch.equal(pages.keys[turns.slots], found[1])
    assert torch.equal(pages.values[turns.slots], value)
    assert bool(pages.keys[[1, 3, 5]].isnan().all() and pages.values[[1, 3, 5]].isnan().all())
    assert all(map(torch.equal, place(query, key, value, (norms[0], norms[1]), turns, None), found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("inputs", [64, 40])
def test_products_of_few_rows(dtype: torch.dtype, rows: int, inputs: int) -> None:
    x, tile = random(rows, inputs, dtype=dtype), Tile(16, 32, 1, 2)
    of = [Product(random(n, inputs, dtype=dtype, seed=n), random(n, dtype=dtype, seed=n + 1), 0.5) for n in (24, 16, 7)]

    def truth(product: Product) -> Tensor:
        return reference.linear(x, product.weight, product.bias) * product.factor

    close(few(x, of, None, None, tile), torch.cat([truth(product) for product in of], dim=1))
    residual = random(rows, 24, dtype=dtype, seed=9)
    close(few(x, of[:1], None, residual, tile), truth(of[0]) + residual)
    pair = [product._replace(weight=product.weight[:7], bias=None, factor=1.0) for product in of[:2]]
    both = [reference.linear(x, product.weight) for product in pair]
    close(few(x, pair, "silu", None, tile), reference.gated(*both, "silu"), 4)
    close(few(x, pair[:1], "gelu", None, tile), reference.gated(both[0], None, "gelu"), 4)


def test_ways_of_a_product_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in one launch; more, or weights that are not alike, apart."""
    launches: list[int] = []
    monkeypatch.setattr(layers, "few", lambda *args: launches.append(1) or few(*args))
    of = [Product(random(16, 32, seed=1)), Product(random(8, 32, seed=2), random(8, seed=3))]
    for x in (random(2, 32), random(few_rows.ROWS + 1, 32)):
        for some in (of, of[:1]):
            launches.clear()
            for ours, product in zip(layers.products(x, some), some, strict=True):
                close(ours, reference.linear(x, product.weight, product.bias), 8)
            assert bool(launches) == (len(x) <= few_rows.ROWS and some is not of)
        same = [of[0], of[0]._replace(weight=of[0].weight + 1)]
        close(layers.products(x, same, "silu")[0], reference.gated(*(x @ p.weight.T for p in same), "silu"), 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_quantized_products_in_one_launch(
    bits: int, symmetric: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three weights of few bits in one launch, or gate and up with the activation, and a residual."""
    launches: list[int] = []
    monkeypatch.setattr(layers, "deep", lambda *args: launches.append(1) or int_linear.deep(*args))
    monkeypatch.setattr(layers, "wide", lambda *args: launches.append(1) or wide.wide(*args))
    small = {1: ((1, 16, 1, 2, 1),), 8: ((8, 16, 2, 2, 2),)}
    monkeypatch.setattr(layers, "DEEP", small if DEVICE == "cpu" else layers.DEEP)
    dtype, error = (torch.bfloat16, 6) if rows > 16 and DEVICE == "cuda" else (torch.float32, 64)
    x = random(rows, 256, dtype=dtype)
    grids = [make_grid(random(n, 256, seed=n), bits, 16 * bits, symmetric) for n in (24, 16, 24)]
    of = [Product(weight.TritonWeight.pack(grid), random(len(grid.codes), dtype=dtype, seed=7), 0.5) for grid in grids]
    truth = [reference.quantized_linear(x, grid, p.bias) * 0.5 for grid, p in zip(grids, of, strict=True)]
    residual = random(rows, 24, dtype=dtype, seed=8)
    assert all(p.weight is not None for p in of)
    for ours, expected in zip(layers.products(x, of), truth, strict=True):
        close(ours, expected, error)
    close(layers.products(x, of[::2], "silu")[0], reference.gated(truth[0], truth[2], "silu"), error)
    close(layers.products(x, of[:1], residual=residual)[0], truth[0] + residual, error)
    assert len(launches) >= 3
    mixed = [of[0], of[1]._replace(bias=None)]
    launches.clear()
    close(layers.products(x, mixed)[1], reference.quantized_linear(x, grids[1]) * 0.5, error)
    assert not launches


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here() -> None:
    """For A100 and H100; and no kernel decodes into registers that tensor cores still read."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compiled.py"
    done = subprocess.run([sys.executable, script], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80


SLOW = [
    "qwen3",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi3",
    "olmo2",
    "cohere",
    "stablelm",
    "opt",
    "gpt_neox",
    "granite",
    "nemotron",
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are launched where the tests run. The interpreter takes as long for a program of 4 outputs as of 32."""
    monkeypatch.setattr(launched, "LAUNCHES", {DEVICE})
    if DEVICE == "cpu":
        monkeypatch.setattr(layers, "SINGLE", (Tile(32, 64, 4, 1),))


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("name", "count"),
    [("llama", 1), *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ["llama", *SLOW])],
)
def test_models(name: str, count: int) -> None:
    """A prompt's tokens and single ones, of a model whose layers are launched: stock's tokens."""
    model = build(name, num_hidden_layers=count).to(DEVICE)
    inputs = {key: tensor.to(DEVICE) for key, tensor in ragged().items()}
    arguments: dict[str, Any] = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None}
    stock = model.generate(**inputs, **arguments)
    assert torch.equal(model.generate(**inputs, **arguments, llmopt={"strict": True}), stock)
    assert model.llmopt.stats.fused == (f"{count} x decoder layer",)


@pytest.mark.usefixtures("launches")
def test_heads_are_read_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the best tokens count; the graph of a pass knows whether they do."""
    seen: list[int] = []
    settle = leaders.settle

    def watched(estimates: Tensor, x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return settle(estimates, x, *rest)

    monkeypatch.setattr(head, "LEAST", 0)
    monkeypatch.setattr(head, "pack", weight.TritonWeight.pack)
    monkeypatch.setattr(leaders, "settle", watched)
    model = build("llama", num_hidden_layers=1, vocab_size=300).to(DEVICE)
    inputs = {key: tensor.to(DEVICE) for key, tensor in ragged().items()}
    arguments: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    stock = model.generate(**inputs, **arguments, output_logits=True, return_dict_in_generate=True)
    shown = model.generate(
        **inputs, **arguments, output_logits=True, return_dict_in_generate=True, llmopt={"strict": True}
    )
    torch.testing.assert_close(torch.stack(shown.logits), torch.stack(stock.logits), atol=1e-3, rtol=1e-3)
    assert not seen
    assert torch.equal(model.generate(**inputs, **arguments, llmopt={"strict": True}), stock.sequences)
    assert seen
    assert "output head" in model.llmopt.stats.fused[-1]
    rows = len(stock.sequences)
    new = torch.randn(model.lm_head.weight.shape[1], device=DEVICE)
    with torch.no_grad():
        model.lm_head.weight[7] = 9 * new  # counted
    assert torch.equal(
        model.generate(**inputs, **arguments, llmopt={"strict": True}), model.generate(**inputs, **arguments)
    )
    model.lm_head.weight.data[9] = -9 * new
    model.llmopt.weights_changed()
    seen.clear()
    assert torch.equal(
        model.generate(**inputs, **arguments, llmopt={"strict": True}), model.generate(**inputs, **arguments)
    )
    assert rows in seen


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_offloaded_pages(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What launches write to a layer's copies on the device is written back."""
    monkeypatch.setattr(runner, "OFFLOADED", {DEVICE})
    model = build("llama", num_hidden_layers=2).to(DEVICE)
    inputs = {key: tensor[:1].to(DEVICE) for key, tensor in ragged().items()}
    arguments: dict[str, Any] = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    pages = {"page_size": 4, "dtype": dtype}
    there = {"strict": True, "graphs": False, "kv_cache": pages}
    expected = model.generate(**inputs, **arguments, llmopt=False if dtype == "auto" else there)
    offloaded = {"strict": True, "kv_cache": {**pages, "offload": True}}
    assert torch.equal(model.generate(**inputs, **arguments, llmopt=offloaded), expected)
    assert model.llmopt.stats.fused == ("2 x decoder layer",)
