"""File formats of quantized weights: bit for bit there and back, what others wrote, and what is wrong said early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_llmopt.errors import InvalidCheckpoint, UnsupportedQuantization
from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.quantization.formats import Scheme, obstacle, pack, tensors, unpack
from hf_llmopt.quantization.formats.bits import pack_bits, unpack_bits

LINEAR = nn.Linear(1, 1)
DOWN, HEAD = "model.layers.0.mlp.down_proj", "lm_head"


def random_grid(scheme: Scheme, outputs: int, inputs: int, seed: int, dtype: torch.dtype = torch.float16) -> Grid:
    """A grid that the scheme can hold, with every code and zero possible."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = scheme.groups(inputs), 2**scheme.bits

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=generator).to(torch.uint8)

    rows = outputs if scheme.rows == -1 else scheme.rows
    scales = torch.rand(-(-outputs // rows), groups, generator=generator) + 0.01
    scales = scales.to(scheme.scale_dtype(dtype)).repeat_interleave(rows, 0)[:outputs]
    if scheme.format in ("float-quantized", "fp8"):
        values = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
        ragged = scheme.group_size != -1 and inputs % scheme.group_size
        index = torch.arange(inputs, dtype=torch.int32) // scheme.group_size if ragged else None
        return Grid(values, scales, None, 8, index)
    zeros = None if scheme.symmetric else codes(outputs, 1 if scheme.rows == -1 else groups)
    if zeros is not None and scheme.rows == -1:
        zeros = zeros[:1].repeat(outputs, 1)
    index = None
    if scheme.act_order:
        index = (torch.arange(inputs) // (inputs // groups))[torch.randperm(inputs, generator=generator)].int()
    return Grid(codes(outputs, inputs), scales, zeros, scheme.bits, index)


def assert_same(one: Grid, other: Grid) -> None:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert b.is_contiguous()
        else:
            assert a == b


# ------------------------------------------------------------------------------------------------------ there and back


@st.composite
def weights(draw: st.DrawFn) -> tuple[Scheme, int, int]:
    """A scheme of every kind, and a shape it can hold."""
    name = draw(st.sampled_from(sorted(["gptq", "gptq_v2", "awq", "awq_gemv", "pack-quantized", "int-quantized"])))
    bits = 4 if name.startswith("awq") else draw(st.sampled_from([2, 3, 4, 8]))
    group = draw(st.sampled_from([-1, 32, 64, 128]))
    free = name in ("pack-quantized", "int-quantized")  # these hold any shape
    inputs = draw(st.integers(1, 5)) * (group if group != -1 else 1 if free else 128)
    outputs = draw(st.integers(1, 70)) if free else 32 * draw(st.integers(1, 3))
    act_order = not name.startswith("awq") and group != -1 and draw(st.booleans()) and inputs > group
    rows = -1 if free and group == -1 and draw(st.booleans()) else 1
    return Scheme(name, bits, group, draw(st.booleans()), act_order, rows=rows), outputs, inputs


@settings(max_examples=150, deadline=None)
@given(weights(), st.integers(0, 2**31), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_integers_there_and_back(weight: tuple[Scheme, int, int], seed: int, dtype: torch.dtype) -> None:
    scheme, outputs, inputs = weight
    grid = random_grid(scheme, outputs, inputs, seed, dtype)
    stored = pack(grid, scheme, dtype)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == tensors(scheme, outputs, inputs, dtype)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    back = unpack(stored, scheme, outputs, inputs)
    assert_same(grid, back)
    for name, again in pack(back, scheme, dtype).items():
        assert torch.equal(again, stored[name])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["float-quantized", "fp8"]),
    st.sampled_from([(-1, -1), (-1, 1), (64, 1), (128, 128), (16, 32)]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2**31),
)
def test_floats_there_and_back(name: str, block: tuple[int, int], outputs: int, inputs: int, seed: int) -> None:
    """Blocks at the edges may be smaller."""
    group, rows = block
    scheme = Scheme(name, 8, group, True, activations=True, rows=rows)
    inputs = 64 * (inputs % 5 + 1) if rows == 1 else inputs
    grid = random_grid(scheme, outputs, inputs, seed, torch.bfloat16)
    stored = pack(grid, scheme, torch.bfloat16)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == tensors(scheme, outputs, inputs, torch.bfloat16)
    assert_same(grid, unpack(stored, scheme, outputs, inputs))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_a_row_of_codes_is_one_number(bits: int, rows: int, count: int, seed: int) -> None:
    """The definition: word for word, the codes are digits in base `2**bits` of one long number."""
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    for row, stored in zip(codes.tolist(), packed, strict=True):
        number = sum(code << place * bits for place, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(stored.tolist())) == number
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("offset", range(9))
def test_parts_of_tensors(offset: int) -> None:
    """Wherever the codes lie in memory."""
    codes = torch.arange(200, dtype=torch.uint8)[offset : offset + 64].view(2, 32) % 16
    assert torch.equal(unpack_bits(pack_bits(codes, 4), 4, 32), codes)
    assert torch.equal(unpack_bits(pack_bits(codes.T, 4), 4, 2), codes.T)


# ------------------------------------------------------------------------------------------------- layouts, by the byte


def test_gptq_words() -> None:
    """Input r * 8 + j of an output stands at bit 4 * j of word r; zeros along outputs, less one in version 1."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[5, 8:16] = torch.arange(1, 9)
    grid = Grid(
        codes, torch.ones(32, 1, dtype=torch.float16), torch.arange(1, 33).remainder(15).add(1)[:, None].to(torch.uint8)
    )
    stored = pack(grid, Scheme("gptq_v2", 4, 32, False), torch.float16)
    assert stored["qweight"][1, 5] == -0x789ABCDF  # 0x87654321
    assert stored["qweight"].count_nonzero() == 1
    assert [hex(word & 0xFFFFFFFF) for word in stored["qzeros"][0].tolist()] == [
        "0x98765432", "0x21fedcba", "0xa9876543", "0x321fedcb"
    ]  # fmt: skip
    first = pack(grid, Scheme("gptq", 4, 32, False), torch.float16)
    assert [hex(word & 0xFFFFFFFF) for word in first["qzeros"][0].tolist()] == [
        "0x87654321", "0x10edcba9", "0x98765432", "0x210edcba"
    ]  # fmt: skip


def test_awq_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:8, 3] = torch.arange(8)
    stored = pack(Grid(codes, torch.ones(32, 1, dtype=torch.float16)), Scheme("awq", 4, 32, False), torch.float16)
    assert stored["qweight"][3].tolist() == [0x75316420, 0, 0, 0]
    assert stored["qzeros"].tolist() == [[0x88888888 - 2**32] * 4]


def test_awq_gemv_pads_its_groups() -> None:
    for group, width in ((128, 1), (64, 2), (32, 4)):
        layout = tensors(Scheme("awq_gemv", 4, group, False), 32, 256, torch.float16)
        assert layout["qzeros"][0] == (32, width)
        assert layout["scales"][0] == (32, width * 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("field", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_zeros_tell_the_version(bits: int, field: str, written: str) -> None:
    """Tools have written version 2 and called it version 1."""
    scheme = Scheme(written, bits, 32, True)
    grid = random_grid(scheme, 32, 64, 0)
    stored = pack(grid, scheme, torch.float16)
    assert_same(grid, unpack(stored, replace(scheme, format=field), 32, 64))


def test_the_field_tells_where_zeros_do_not() -> None:
    scheme = Scheme("gptq", 4, 32, False)
    grid = random_grid(scheme, 32, 64, 0)
    stored = pack(grid, scheme, torch.float16)
    as_v2 = unpack(stored, replace(scheme, format="gptq_v2"), 32, 64)
    assert not torch.equal(as_v2.zeros, grid.zeros)


def test_symmetric_file_with_other_zeros_keeps_them() -> None:
    scheme = Scheme("gptq", 4, 32, True)
    grid = random_grid(replace(scheme, symmetric=False), 32, 64, 0)
    assert_same(grid, unpack(pack(grid, scheme, torch.float16), scheme, 32, 64))


# ------------------------------------------------------------------------------------------------ what is wrong, early

GPTQ = Scheme("gptq", 4, 32, True)


def stored_gptq(**changes: Tensor) -> dict[str, Tensor]:
    return pack(random_grid(GPTQ, 32, 64, 0), GPTQ, torch.float16) | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qweight": torch.zeros(7, 32, dtype=torch.int32)}, r"'qweight' should be \[8, 32\] and is \[7, 32\]"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int64)}, r"'qweight' should be in torch.int32"),
        ({"scales": torch.ones(2, 32, dtype=torch.int32)}, r"'scales' should be in float16, bfloat16 or float32"),
        ({"scales": torch.full((2, 32), float("nan"))}, r"'scales' has values that are not finite"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"groups beyond the 2 that there are"),
        ({"g_idx": torch.full((64,), -3, dtype=torch.int32)}, r"groups beyond the 2 that there are"),
    ],
)
def test_damaged_tensors(changes: dict[str, Tensor], says: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=says) as caught:
        unpack(stored_gptq(**changes), GPTQ, 32, 64)
    assert "A weight [32, 64] stored as gptq, 4 bits, groups of 32" in str(caught.value)


def test_missing_tensors() -> None:
    stored = stored_gptq()
    del stored["qzeros"]
    with pytest.raises(InvalidCheckpoint, match=r"no 'qzeros', only g_idx, qweight, scales; files are missing"):
        unpack(stored, GPTQ, 32, 64)
    with pytest.raises(InvalidCheckpoint, match="no 'qweight', only nothing"):
        unpack({}, GPTQ, 32, 64)


def test_an_index_may_only_be_missing_without_act_order() -> None:
    stored = stored_gptq()
    del stored["g_idx"]
    assert unpack(stored, GPTQ, 32, 64).index is None
    with pytest.raises(InvalidCheckpoint, match="no 'g_idx'"):
        unpack(stored, replace(GPTQ, act_order=True), 32, 64)


def test_another_shape_than_the_file_says() -> None:
    scheme = Scheme("pack-quantized", 4, -1, True)
    stored = pack(random_grid(scheme, 8, 30, 0), scheme, torch.float16)
    with pytest.raises(InvalidCheckpoint, match=r"weight_shape says \[8, 30\], and the model wants \[8, 31\]"):
        unpack(stored, scheme, 8, 31)


def test_integers_of_more_bits_than_said() -> None:
    scheme = Scheme("int-quantized", 8, -1, True)
    stored = pack(random_grid(scheme, 8, 32, 0), scheme, torch.float16)
    with pytest.raises(InvalidCheckpoint, match="more than 4 bits"):
        unpack(stored, replace(scheme, bits=4), 8, 32)


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        (Scheme("gptq", 4, 64, True), (32, 96), "96 inputs are no multiple of the group size 64"),
        (Scheme("gptq", 3, -1, True), (32, 40), "40 inputs of 3 bits do not fill whole words"),
        (Scheme("awq", 4, 32, True), (12, 32), "12 outputs of 4 bits do not fill whole words"),
        (Scheme("awq_gemv", 4, 16, True), (32, 32), "group size is 16, and awq_gemv has 32, 64"),
        (Scheme("pack-quantized", 4, 64, True), (32, 96), "96 inputs are no multiple of the group size 64"),
        (Scheme("float-quantized", 8, 64, True), (32, 96), "96 inputs are no multiple of the group size 64"),
    ],
)
def test_shapes_that_do_not_fit(scheme: Scheme, shape: tuple[int, int], says: str) -> None:
    assert says in str(obstacle(scheme, *shape))
    with pytest.raises(UnsupportedQuantization, match=says):
        tensors(scheme, *shape, torch.float16)
    with pytest.raises(UnsupportedQuantization, match=says):
        unpack({}, scheme, *shape)


SMALL = Grid(torch.full((32, 64), 9, dtype=torch.uint8), torch.ones(32, 2))


@pytest.mark.parametrize(
    ("grid", "scheme", "says"),
    [
        (SMALL._replace(bits=8), GPTQ, "codes of 8 bits, not 4"),
        (SMALL._replace(codes=SMALL.codes.int()), GPTQ, r"codes in torch.int32, not torch.uint8"),
        (SMALL._replace(codes=SMALL.codes + 7), GPTQ, "codes beyond 4 bits"),
        (SMALL._replace(zeros=torch.full((32, 2), 16, dtype=torch.uint8)), GPTQ, "zeros beyond 4 bits"),
        (SMALL, replace(GPTQ, group_size=64), r"has scales \(32, 2\)"),
        (SMALL._replace(scales=SMALL.scales * 1e6), GPTQ, "scales as torch.float16, and some are beyond its range"),
        (SMALL._replace(scales=SMALL.scales * 1e-9), GPTQ, "scales as torch.float16, and some are beyond its range"),
        (
            SMALL._replace(zeros=torch.ones(32, 2, dtype=torch.uint8)),
            Scheme("pack-quantized", 4, 32, True),
            "has zeros, which a symmetric one does not store",
        ),
        (
            SMALL._replace(index=torch.arange(64, dtype=torch.int32) % 2),
            Scheme("awq", 4, 32, True),
            "groups out of order",
        ),
        (SMALL, Scheme("fp8", 8, 32, True), "codes of 4 bits, not 8"),
        (
            Grid(torch.zeros(32, 64).to(torch.float8_e4m3fn), torch.rand(32, 2), None, 8),
            Scheme("fp8", 8, 32, True, rows=32),
            "Outputs that share a scale",
        ),
    ],
)
def test_grids_that_a_format_cannot_hold(grid: Grid, scheme: Scheme, says: str) -> None:
    with pytest.raises(UnsupportedQuantization, match=says):
        pack(grid, scheme, torch.float16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("exl2", 4, 128, True), "'exl2' cannot be read. These can: gptq, gptq_v2, awq"),
        (("gptq", 5, 128, True), "gptq with 5 bits cannot be read, only with 2, 3, 4, 8"),
        (("gptq", "4", 128, True), "gptq with '4' bits"),
        (("gptq", 4, 0, True), "a positive number, or -1 for all, got 0"),
        (("gptq", 4, 64.0, True), "a positive number, or -1 for all, got 64.0"),
        (("fp8", 8, 128, True, False, False, -1), "one scale for all outputs and several groups"),
    ],
)
def test_schemes_that_do_not_exist(fields: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UnsupportedQuantization, match=says):
        Scheme(*fields)
