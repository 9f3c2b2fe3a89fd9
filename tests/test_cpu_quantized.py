"""Quantized products in C against their twins: every grid, format and instruction set level, both ways to multiply."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.kernels import cpu, reference
from hf_llmopt.kernels.arguments import Grid

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(not cpu.available() and not COMPILER, reason=str(cpu.why_not())),
    pytest.mark.usefixtures("two_threads"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = cpu.levels() or ("none",)
# Share of the largest term that rounding may cost; integers are exact, so that only the order of groups differs.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BITS = [2, 3, 4, 8, "float8"]
# Inputs, and how many share a scale: whole rows and others, filled up or not.
GROUPS = [(64, 32), (128, 64), (256, 128), (384, 128), (192, 192), (896, 896), (70, 70), (8, 8), (48, 16), (40, 20)]


def draw_grid(data: st.DataObject, outputs: int, inputs: int, group: int, bits: int | str) -> Grid:
    groups = inputs // group
    scales = torch.rand(outputs, groups) * 0.1 + 0.01
    index = None
    if data.draw(st.booleans(), label="act-order"):
        index = (torch.arange(inputs) // group)[torch.randperm(inputs)].int()
    if isinstance(bits, str):
        return Grid(torch.randn(outputs, inputs).to(torch.float8_e4m3fn), scales, None, 8, index)
    codes = torch.randint(2**bits, (outputs, inputs), dtype=torch.uint8)
    zeros = None
    if data.draw(st.booleans(), label="zeros"):
        zeros = torch.randint(min(2**bits + 1, 256), (outputs, groups), dtype=torch.uint8)
    return Grid(codes, scales, zeros, bits, index)


def packed(grid: Grid) -> cpu.BlockedWeight:
    weight = cpu.BlockedWeight.pack(grid)
    assert weight is not None
    return weight


def same(a: Grid, b: Grid) -> None:
    for one, other in zip(a, b, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        else:
            assert one == other


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_quantized_linear(dtype: torch.dtype, level: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, outputs = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 13, 17, 33, 50])), data.draw(st.integers(1, 70))
    (inputs, group), bits = data.draw(st.sampled_from(GROUPS)), data.draw(st.sampled_from(BITS))
    grid = draw_grid(data, outputs, inputs, group, bits)
    weight = packed(grid)
    x = torch.randn(rows, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if data.draw(st.booleans()) else None
    residual = torch.randn(rows, outputs).to(dtype) if data.draw(st.booleans()) else None
    share = weight.share if data.draw(st.booleans(), label="int8 activations") and group % 8 == 0 else 0
    with cpu.using(level):
        ours = cpu.quantized_linear(x, weight, bias, residual, share)
        alone = [
            cpu.quantized_linear(
                x[row : row + 1], weight, bias, None if residual is None else residual[row : row + 1], share
            )
            for row in range(rows)
        ]
    theirs = reference.quantized_linear(x, grid, bias, residual, share)
    scale = (x.float().abs() @ reference.dequantize(grid).abs().T).max() + 4
    assert ours.dtype == theirs.dtype
    assert float((ours.float() - theirs.float()).abs().max() / scale) <= BOUND[dtype]
    assert torch.equal(ours, torch.cat(alone)), "a row must not depend on its neighbours"


@pytest.mark.skipif("amx" not in LEVELS, reason="no AMX here")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tiles_give_the_bits_of_vectors(data: st.DataObject) -> None:
    """Integers are exact and what follows is in one order: whatever the tiles, blocks, panels and threads."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, outputs = data.draw(st.sampled_from([12, 13, 16, 17, 31, 32, 100, 513, 540])), data.draw(st.integers(1, 130))
    group = data.draw(st.sampled_from([32, 40, 64, 96, 112, 120, 128, 192, 256]))
    inputs, bits = group * data.draw(st.integers(1, 12)), data.draw(st.sampled_from([2, 4, 5, 8]))
    weight = packed(draw_grid(data, outputs, inputs, group, bits))
    x = torch.randn(rows, inputs).to(data.draw(st.sampled_from(DTYPES)))
    bias = torch.randn(outputs).to(x.dtype) if data.draw(st.booleans()) else None
    threads = data.draw(st.sampled_from([1, 2]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cpu.using("amx"):
            tiles = cpu.quantized_linear(x, weight, bias, group=weight.share)
    finally:
        torch.set_num_threads(before)
    with cpu.using("avx512vnni"):
        assert torch.equal(tiles, cpu.quantized_linear(x, weight, bias, group=weight.share))


@pytest.mark.skipif("amx" not in LEVELS, reason="no AMX here")
def test_tiles_in_several_panels() -> None:
    weight = packed(Grid(torch.randint(256, (40, 16384), dtype=torch.uint8), torch.rand(40, 1), None, 8))
    x = torch.randn(130, 16384).bfloat16()
    ours = []
    for level in ("amx", "avx512vnni"):
        with cpu.using(level):
            ours.append(cpu.quantized_linear(x, weight, group=weight.share))
    assert torch.equal(*ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_activations_are_rounded_as_a_division_says(level: str, dtype: torch.dtype) -> None:
    """Also close to the middle between two integers, and for very small and very large numbers."""
    weight = packed(Grid((torch.eye(128) + 128).to(torch.uint8), torch.ones(128, 1), None, 8))
    halves = (torch.arange(128) - 63.5) * torch.rand(60, 1)
    drawn = torch.randn(60, 128) * 10 ** torch.linspace(-12, 30, 60)[:, None]
    halves[:, 0] = 127 * halves.diff(dim=1)[:, 0]  # the largest: so that a step is about one between neighbours
    x = torch.cat([halves, drawn]).to(dtype)
    with cpu.using(level):
        ours = cpu.quantized_linear(x.float(), weight, group=128)
    codes, scales = reference.quantize_rows(x, 128)
    assert torch.equal(ours, codes.float() * scales)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_unpack_and_dequantize(level: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    (inputs, group), bits = data.draw(st.sampled_from(GROUPS)), data.draw(st.sampled_from(BITS))
    grid = draw_grid(data, data.draw(st.integers(1, 70)), inputs, group, bits)
    weight = packed(grid)
    same(weight.unpack(), grid)
    with cpu.using(level):
        for dtype in [*DTYPES, torch.float64]:
            assert torch.equal(weight.dequantize(dtype), reference.dequantize(grid, dtype))


def test_every_float8_is_read_as_it_is() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].view(1, -1)
    grid = Grid(torch.nn.functional.pad(codes.view(torch.uint8), (0, 2)).view(torch.float8_e4m3fn), torch.ones(1, 1))
    for level in LEVELS:
        with cpu.using(level):
            assert torch.equal(packed(grid).dequantize(torch.float32), grid.codes.float())


def test_codes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.kernels.cpu.quantized.CHUNK", 2048)
    grid = Grid(torch.randint(16, (75, 64), dtype=torch.uint8), torch.rand(75, 2))
    same(packed(grid).unpack(), grid)


def test_groups_of_unequal_length() -> None:
    """A last group that the inputs do not fill, as files with activation order have it."""
    index = (torch.arange(100) // 32)[torch.randperm(100)].int()
    grid = Grid(torch.randint(16, (33, 100), dtype=torch.uint8), torch.rand(33, 4), None, 4, index)
    weight, x = packed(grid), torch.randn(5, 100)
    same(weight.unpack(), grid)
    torch.testing.assert_close(weight.product(x, activations=False), x @ reference.dequantize(grid).T)
    rounded = weight.product(x)
    torch.testing.assert_close(rounded, x @ reference.dequantize(grid).T, atol=0.5, rtol=0.05)
    assert not torch.equal(rounded, weight.product(x, activations=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float, level: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 128).to(dtype)
    x[1, 77] = bad
    weight = packed(Grid(torch.randint(1, 8, (20, 128), dtype=torch.uint8), torch.rand(20, 2) + 0.1))
    with cpu.using(level):
        for activations in (False, True):
            finite = weight.product(x, activations=activations).isfinite()
            assert finite[[0, 2]].all()
            assert not finite[1].any()


def test_other_formats_and_strides() -> None:
    grid = Grid(torch.randint(256, (20, 64), dtype=torch.uint8), torch.rand(20, 2), None, 8)
    weight, x = packed(grid), torch.randn(64, 2, 3, dtype=torch.float64)
    exact = x.transpose(0, 2) @ reference.dequantize(grid, torch.float64).T
    ours = weight.product(x.transpose(0, 2), torch.ones(20, dtype=torch.bfloat16), activations=False)
    assert ours.dtype is torch.float64
    torch.testing.assert_close(ours, exact + 1, atol=1e-3, rtol=1e-5)


def test_memory() -> None:
    """Four bits in groups of 128 take at most 0.28 of what bfloat16 does."""
    weight = packed(Grid(torch.zeros(512, 1024, dtype=torch.uint8), torch.ones(512, 8)))
    assert sum(tensor.nbytes for tensor in weight.tensors.values()) <= 0.28 * 2 * 512 * 1024


def test_grids_of_other_devices_and_formats() -> None:
    assert cpu.BlockedWeight.pack(Grid(torch.zeros(16, 8, dtype=torch.uint8, device="meta"), torch.ones(16, 1))) is None
    assert cpu.BlockedWeight.pack(Grid(torch.zeros(16, 8, dtype=torch.float8_e5m2), torch.ones(16, 1))) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_what_is_faster_does_not_decide_what_is_rounded(
    order: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    index = (torch.arange(160) // 20)[torch.randperm(160)].int() if order else None
    weight = packed(Grid(torch.randint(2**bits, (33, 160), dtype=torch.uint8), torch.rand(33, 8), None, bits, index))
    x = torch.randn(2, 10, 160)
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(cpu.BlockedWeight, "own_rows", lambda *_, limit=limit: limit)
        found.append(weight.product(x))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))
    apart = float((weight.product(x, activations=False) - found[0]).norm() / found[0].norm())
    assert apart > 1e-3  # so that the former could fail
