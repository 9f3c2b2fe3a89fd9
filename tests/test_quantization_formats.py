"""File formats of quantized weights: bit for bit there and back, what others wrote, and what is wrong said early."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_llmopt.errors import InvalidCheckpoint, UnsupportedQuantization
from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization.formats import Recipe, Scheme, obstacle, pack, stored_in, tensors, unpack
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


def test_what_the_files_hold() -> None:
    """Full weights beside quantized ones are a checkpoint; weights of which a part is there are not."""
    plain, up = Scheme("int-quantized", 8, -1, True), "model.layers.0.mlp.up_proj"
    gptq = [f"{DOWN}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx", "bias")]
    assert stored_in([*gptq, f"{up}.weight"], {DOWN: GPTQ, up: GPTQ}) == {DOWN: GPTQ}
    assert stored_in([*gptq, f"{up}.weight", f"{up}.weight_scale"], {DOWN: GPTQ, up: plain}) == {DOWN: GPTQ, up: plain}
    assert stored_in([f"{up}.weight", f"{up}.bias"], {up: Scheme("fp8", 8, 128, True, rows=128)}) == {}
    with pytest.raises(InvalidCheckpoint, match="lacks weight_scale and has bias, weight"):
        stored_in([f"{up}.weight", f"{up}.bias"], {up: plain})
    with pytest.raises(InvalidCheckpoint, match=r"1 of 2 .* lacks qweight, qzeros, scales and has nothing. Files are"):
        stored_in(gptq, {DOWN: GPTQ, up: GPTQ})
    with pytest.raises(InvalidCheckpoint, match=r"1 of 1 .* lacks qzeros and has bias, g_idx, qweight, scales"):
        stored_in([name for name in gptq if "qzeros" not in name], {DOWN: GPTQ})
    with pytest.raises(InvalidCheckpoint, match="lacks qweight, qzeros and has scales, weight"):
        stored_in([f"{up}.weight", f"{up}.scales"], {up: GPTQ})
    with pytest.raises(InvalidCheckpoint, match=r"1 weights are quantized .*down_proj has bias, g_idx, qweight"):
        stored_in(gptq, {}, dense=[DOWN, up])
    many = {f"layers.{n}.up": GPTQ for n in range(9)}
    with pytest.raises(InvalidCheckpoint, match=r"9 of 9 .*; …\. Files"):
        stored_in([], many)


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


# --------------------------------------------------------------------------------------------- files that others wrote

DATA = Path(__file__).parent / "data" / "quantized"


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def cases() -> Iterator[Any]:
    for file in sorted(DATA.glob("*.json")):
        for case in json.loads(file.read_text("utf-8")):
            yield pytest.param(file.stem, case, id=f"{file.stem}-{case['name']}")


@pytest.mark.parametrize(("package", "case"), list(cases()))
def test_weights_of_other_packages(package: str, case: dict[str, Any]) -> None:
    """The same weight, bit for bit, as the package that wrote it reads; and its files again."""
    recipe = Recipe.from_dict(case["quantization_config"])
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    scheme = recipe.scheme_of(DOWN, LINEAR)
    assert scheme is not None
    assert recipe.scheme_of(HEAD, LINEAR) is None or recipe.method == "compressed-tensors"
    prefix = f"{case['name']}."
    everything = load_file(DATA / f"{package}.safetensors")
    stored = {name.removeprefix(prefix): t for name, t in everything.items() if name.startswith(prefix)}
    grid = unpack(stored, scheme, case["outputs"], case["inputs"])
    dtype = getattr(torch, case["dtype"])
    assert digest(dequantize(grid, dtype)) == case["sha256"]
    again = pack(grid, scheme, dtype)
    assert again.keys() == stored.keys()
    for name, tensor in again.items():
        kept = stored[name]
        assert tensor.dtype == kept.dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), kept.flatten().view(torch.uint8))


def test_every_package_wrote_something() -> None:
    written = {case.values[0] for case in cases()}
    assert written == {"auto-gptq", "autoawq", "compressed-tensors", "gptqmodel", "transformers"}
    assert sum(file.stat().st_size for file in DATA.rglob("*")) < 300_000


@pytest.mark.parametrize("package", ["autoawq", "compressed-tensors", "gptqmodel"])
def test_checkpoints_of_other_packages(package: str, tmp_path: Path) -> None:
    """Loaded by transformers, the weights are those that the package reads; saved again, the files hold the same."""
    folder = DATA / f"{package}-llama"
    model = AutoModelForCausalLM.from_pretrained(folder, llmopt="kv_cache", dtype="auto")
    hashes = json.loads((folder / "weights.json").read_text("utf-8"))
    assert len(hashes) == 7
    for name, expected in hashes.items():
        assert digest(dequantize(model.get_submodule(name).grid(), torch.float16)) == expected
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    configs = [json.loads((path / "config.json").read_text("utf-8")) for path in (folder, tmp_path)]
    assert len({Recipe.from_dict(config["quantization_config"]) for config in configs}) == 1


# ------------------------------------------------------------------------------------------------- quantization_config


def read(**config: Any) -> Recipe:
    """A recipe, and its dict read again."""
    recipe = Recipe.from_dict(config)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    return recipe


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def group(targets: list[str], bits: int = 4, kind: str = "int", inputs: Any = None, **weights: Any) -> dict[str, Any]:
    made = {"num_bits": bits, "type": kind, "symmetric": True, **weights}
    return {"targets": targets, "weights": made, "input_activations": inputs}


def compressed(*groups: dict[str, Any], stored: str = "pack-quantized", **config: Any) -> dict[str, Any]:
    numbered = {f"group_{number}": one for number, one in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": numbered, **config}


def test_the_first_dialects() -> None:
    """AutoGPTQ's quantize_config.json and AutoAWQ's first names."""
    old = read(bits=3, group_size=-1, damp_percent=0.01, desc_act=True, sym=False, true_sequential=True)
    assert old.scheme_of(DOWN, LINEAR) == Scheme("gptq", 3, -1, False)  # one group has no order
    old = read(w_bit=4, q_group_size=64, zero_point=True, version="GEMV")
    assert old.scheme_of(DOWN, LINEAR) == Scheme("awq_gemv", 4, 64, False)
    assert read(**GPTQ_CONFIG, format="gptq_v2").scheme_of(DOWN, LINEAR) == Scheme("gptq_v2", 4, 128, True)


def test_only_linear_layers_in_blocks() -> None:
    recipe = read(**GPTQ_CONFIG)
    assert recipe.scheme_of(DOWN, LINEAR) == Scheme("gptq", 4, 128, True)
    assert recipe.scheme_of(DOWN, nn.Embedding(1, 1)) is None
    assert recipe.scheme_of("model.embed_out", LINEAR) is None
    assert recipe.scheme_of(HEAD, LINEAR) is None
    assert read(**GPTQ_CONFIG, lm_head=True).scheme_of(HEAD, LINEAR) == Scheme("gptq", 4, 128, True)


def test_dynamic_rules() -> None:
    """The first that matches decides, from the start of the name."""
    dynamic = {r"-:.*\.1\.": {}, r"+:.*down_proj": {"bits": 8, "mse": 2.4}, r".*layers\.[02].*": {"group_size": -1}}
    recipe = read(**{**GPTQ_CONFIG, "desc_act": True}, dynamic=dynamic)
    base = Scheme("gptq", 4, 128, True, act_order=True)
    assert recipe.scheme_of("model.layers.1.mlp.down_proj", LINEAR) is None
    assert recipe.scheme_of("model.layers.0.mlp.down_proj", LINEAR) == replace(base, bits=8)
    assert recipe.scheme_of("model.layers.2.mlp.up_proj", LINEAR) == replace(base, group_size=-1, act_order=False)
    assert recipe.scheme_of("model.layers.3.mlp.up_proj", LINEAR) == base
    assert read(**GPTQ_CONFIG, dynamic={"-:down_proj": {}}).scheme_of(DOWN, LINEAR) is not None


def test_modules_in_blocks() -> None:
    recipe = read(**GPTQ_CONFIG, modules_in_block_to_quantize=[["mlp.down_proj"], ["self_attn.q_proj", "k_proj"]])
    names = ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.xdown_proj", "smlp.down_proj")
    found = [name for name in names if recipe.scheme_of(f"model.layers.0.{name}", LINEAR)]
    assert found == ["mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"]


def test_names_that_are_not_converted() -> None:
    """AWQ: parts of names; fp8: whole parts between dots."""
    gate, gate_proj = "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"
    awq = read(**AWQ_CONFIG, modules_to_not_convert=["visual", "mlp.gate"])
    assert awq.scheme_of(gate, LINEAR) is awq.scheme_of(gate_proj, LINEAR) is None
    assert awq.scheme_of("visual.blocks.0.fc", LINEAR) is None
    assert awq.scheme_of(DOWN, LINEAR) == Scheme("awq", 4, 128, False)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "mlp.gate"]}
    fp8 = read(**config)
    assert fp8.scheme_of(gate, LINEAR) is None
    assert fp8.scheme_of(gate_proj, LINEAR) == Scheme("fp8", 8, 128, True, activations=True, rows=128)


def test_targets_of_compressed_tensors() -> None:
    """A name before a regular expression, that before a class; what is ignored comes first."""
    dynamic = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config = compressed(
        group(["Linear"], 4, strategy="group", group_size=64, symmetric=False, actorder="static"),
        group([r"re:.*\.mlp\..*"], 8, strategy="channel", inputs=dynamic) | {"format": "int-quantized"},
        group([DOWN], 8, "float", strategy="block", block_structure=[128, 64]) | {"format": "float-quantized"},
        ignore=["lm_head", r"re:.*gate$"],
    )
    recipe = read(**config)
    assert recipe.scheme_of("model.layers.0.self_attn.q_proj", LINEAR) == Scheme("pack-quantized", 4, 64, False)
    assert recipe.scheme_of("model.layers.0.mlp.up_proj", LINEAR) == Scheme("int-quantized", 8, -1, True, False, True)
    assert recipe.scheme_of(DOWN, LINEAR) == Scheme("float-quantized", 8, 64, True, rows=128)
    assert recipe.scheme_of(HEAD, LINEAR) is recipe.scheme_of("model.layers.0.mlp.gate", LINEAR) is None
    assert recipe.scheme_of("model.embed_tokens", nn.Embedding(1, 1)) is None
    assert recipe.to_dict()["format"] == "mixed-precision"


def test_strategies_of_compressed_tensors() -> None:
    def scheme(**weights: Any) -> Scheme | None:
        return read(**compressed(group(["Linear"], **weights))).scheme_of(DOWN, LINEAR)

    assert scheme(strategy="tensor") == scheme() == Scheme("pack-quantized", 4, -1, True, rows=-1)
    assert scheme(strategy="channel") == scheme(group_size=-1) == Scheme("pack-quantized", 4, -1, True)
    assert scheme(group_size=32) == Scheme("pack-quantized", 4, 32, True)
    assert scheme(group_size=32, actorder="group") == Scheme("pack-quantized", 4, 32, True, act_order=True)
    naive = read(**compressed(group(["Linear"], 8, "float", strategy="tensor"), stored="naive-quantized"))
    assert naive.scheme_of(DOWN, LINEAR) == Scheme("float-quantized", 8, -1, True, rows=-1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quant_method 'bitsandbytes' cannot be read. These can",
        ),
        ({"quant_method": "auto-round", "bits": 4}, "quant_method 'auto-round'"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "GPTQ's format 'marlin'"),
        (GPTQ_CONFIG | {"is_marlin_format": True}, "GPTQ's format 'marlin'"),
        (GPTQ_CONFIG | {"bits": 5}, "gptq with 5 bits cannot be read, only with 2, 3, 4, 8"),
        (GPTQ_CONFIG | {"pack_dtype": "int64"}, "packed in 'int64'"),
        (GPTQ_CONFIG | {"dynamic": {"+:.*": {"bits": 6}}}, "gptq with 6 bits"),
        (AWQ_CONFIG | {"version": "gemv_fast"}, "AWQ's version 'gemv_fast'"),
        (AWQ_CONFIG | {"version": "llm-awq"}, "AWQ's version 'llm-awq'"),
        (AWQ_CONFIG | {"bits": 8}, "awq with 8 bits cannot be read, only with 4"),
        (compressed(group(["Linear"]), stored="marlin-24"), "format 'marlin-24'"),
        (compressed(group(["Linear"], 4, "float"), stored="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(group(["Linear"]), stored="dense"), "format 'dense'"),
        (compressed(group(["Linear"], 5)), "pack-quantized with 5 bits"),
        (compressed(group(["Linear"], 4, "float")), "pack-quantized of weights"),
        (compressed(group(["Linear"], inputs={"num_bits": 4}), stored="int-quantized"), "int-quantized of weights"),
        (compressed(group(["Linear"], strategy="tensor_group", group_size=16)), "strategy 'tensor_group'"),
        (compressed(group(["Linear"]), sparsity_config={"format": "sparse-24-bitmask"}), "a sparsity_config"),
        (compressed(group(["Linear"]), transform_config={"config_groups": {"u": {}}}), "a transform_config"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "the preset 'W4A16'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt='e5m2'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with expert_dtype='fp4'"),
    ],
)
def test_configs_that_cannot_be_read(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedQuantization, match=says):
        Recipe.from_dict(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "has no quant_method"),
        ({"quant_method": "gptq", "group_size": 128}, "lacks 'bits'"),
        ({"quant_method": "awq", "bits": 4}, "lacks 'group_size'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "lacks 'config_groups'"),
        (compressed({"targets": ["Linear"], "weights": None}), "no group with weights"),
        (compressed(group(["Linear"], strategy="block")), "lacks 'block_structure'"),
        (compressed(group(["re:[a"])), r"'\[a', which is no regular"),
        (GPTQ_CONFIG | {"dynamic": {"-:(a": {}}}, r"'\(a', which is no regular"),
    ],
)
def test_configs_that_lack_something(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=says):
        Recipe.from_dict(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GPTQ_CONFIG | {"quant_method": ["gptq"]}, r"'quant_method' is a string, got \['gptq'\]"),
        (GPTQ_CONFIG | {"bits": "4"}, "'bits' is a positive integer, got '4'"),
        (GPTQ_CONFIG | {"bits": 4.0}, "'bits' is a positive integer, got 4.0"),
        (GPTQ_CONFIG | {"bits": None}, "'bits' is a positive integer, got null"),
        (GPTQ_CONFIG | {"bits": -4}, "'bits' is a positive integer, got -4"),
        (GPTQ_CONFIG | {"group_size": "128"}, "'group_size' is a positive integer, or -1 for all inputs, got '128'"),
        (GPTQ_CONFIG | {"group_size": 0}, "'group_size' is .* got 0"),
        (GPTQ_CONFIG | {"group_size": -128}, "'group_size' is .* got -128"),
        (GPTQ_CONFIG | {"group_size": [128]}, r"'group_size' is .* got \[128\]"),
        (GPTQ_CONFIG | {"sym": "false"}, "'sym' is true or false, got 'false'"),
        (GPTQ_CONFIG | {"desc_act": 1}, "'desc_act' is true or false, got 1"),
        (GPTQ_CONFIG | {"lm_head": "no"}, "'lm_head' is true or false"),
        (GPTQ_CONFIG | {"dynamic": ["-:.*"]}, "'dynamic' is an object"),
        (GPTQ_CONFIG | {"dynamic": {".*": {"bits": "8"}}}, "'bits' is a positive integer, got '8'"),
        (GPTQ_CONFIG | {"modules_to_not_convert": "lm_head"}, "'modules_to_not_convert' is a list of strings"),
        (GPTQ_CONFIG | {"modules_in_block_to_quantize": "up_proj"}, "'modules_in_block_to_quantize' is a list"),
        ({"quant_method": "gptq", "bits": 4, "groupsize": 128}, "lacks 'group_size'. Is 'groupsize' meant to be it"),
        (AWQ_CONFIG | {"zero_point": "true"}, "'zero_point' is true or false"),
        (AWQ_CONFIG | {"modules_to_not_convert": [7]}, r"got \[7\]"),
        (compressed() | {"config_groups": []}, "'config_groups' is an object"),
        (compressed({"targets": "Linear", "weights": {"num_bits": 4}}), "'targets' is a list of strings"),
        (compressed({"targets": ["Linear"], "weights": [4]}), "'weights' is an object"),
        (compressed({"targets": ["Linear"], "weights": {"num_bits": "4"}}), "'num_bits' is a positive integer"),
        (compressed(group(["Linear"], strategy="group", group_size="128")), "'group_size' is"),
        (compressed(group(["Linear"], strategy="block", block_structure="128x128")), "'block_structure' is two"),
        (compressed(group(["Linear"]), ignore="lm_head"), "'ignore' is a list of strings"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "'weight_block_size' is two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "'weight_block_size' is two positive integers"),
    ],
    ids=str,
)
def test_odd_values_are_refused_by_name_and_with_what_is_allowed(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"{says}.*correct it"):
        Recipe.from_dict(config)


def test_null_is_as_good_as_nothing_and_fields_of_others_are_ignored() -> None:
    nulls = dict.fromkeys(("desc_act", "sym", "lm_head", "dynamic", "modules_to_not_convert", "static_groups"))
    assert Recipe.from_dict(GPTQ_CONFIG | nulls | {"damp": [1], "meta": "x"}).to_dict() == (
        Recipe.from_dict({k: v for k, v in GPTQ_CONFIG.items() if k not in nulls}).to_dict()
    )
    assert Recipe.from_dict(AWQ_CONFIG | {"zero_point": None}) == Recipe.from_dict(AWQ_CONFIG | {"zero_point": True})


ODD = (None, True, -3, 0, 1.5, "", "4", "x", [], ["x"], [[1]], {}, {"x": None}, {"x": {"bits": []}})


@pytest.mark.parametrize(
    "config",
    [
        GPTQ_CONFIG | dict.fromkeys(("dynamic", "sym", "lm_head", "modules_in_block_to_quantize", "format")),
        AWQ_CONFIG | dict.fromkeys(("version", "w_bit", "pack_dtype")),
        compressed(group(["Linear"], inputs={"num_bits": 8}), ignore=[], sparsity_config={}, transform_config={}),
        {"quant_method": "fp8"} | dict.fromkeys(("fmt", "scale_fmt", "weight_block_size", "ignored_layers")),
    ],
    ids=lambda config: config["quant_method"],
)
def test_whatever_stands_in_a_field_is_read_or_refused_in_our_words(config: dict[str, Any]) -> None:
    def places(inner: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
        for key, value in inner.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from places(value, (*path, key))

    for *path, last in places(config):
        for value in ODD:
            changed = copy.deepcopy(config)
            inner = changed
            for key in path:
                inner = inner[key]
            inner[last] = value
            with suppress(InvalidCheckpoint, UnsupportedQuantization):
                recipe = Recipe.from_dict(changed)
                assert recipe.scheme_of(DOWN, LINEAR) in (None, *(scheme for _, scheme in recipe.groups))


SKIPPED = ("lm_head", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("asked", "method", "scheme"),
    [
        (("gptq", 4, 128, True), "gptq", Scheme("gptq", 4, 128, True)),
        (("gptq", 3, 64, True), "gptq", Scheme("gptq", 3, 64, True)),
        (("int4", 8, 64, True), "gptq", Scheme("gptq", 8, 64, True)),
        (("awq", 4, 64, False), "awq", Scheme("awq", 4, 64, False)),
        (("int4", 4, 64, False), "awq", Scheme("awq", 4, 64, False)),
        (("int4", 2, 64, False), "compressed-tensors", Scheme("pack-quantized", 2, 64, False)),
        (("int8", 8, -1, True), "compressed-tensors", Scheme("int-quantized", 8, -1, True, activations=True)),
        (("int8", 8, 64, True), "gptq", Scheme("gptq", 8, 64, True)),
        (("smoothquant", 8, -1, True), "compressed-tensors", Scheme("int-quantized", 8, -1, True, activations=True)),
        (("fp8", 8, -1, True), "compressed-tensors", Scheme("float-quantized", 8, -1, True, activations=True)),
    ],
)
def test_what_we_write(asked: tuple[str, int, int, bool], method: str, scheme: Scheme) -> None:
    made = Recipe.for_method(*asked, act_order=True, skipped=SKIPPED)
    recipe = read(**made.to_dict())
    assert recipe == made
    assert recipe.method == method
    assert recipe.scheme_of(DOWN, LINEAR) == recipe.scheme_of("model.layers.11.mlp.up_proj", LINEAR) == scheme
    assert recipe.scheme_of(HEAD, LINEAR) is recipe.scheme_of(SKIPPED[1], LINEAR) is None
    assert made.to_dict().get("static_groups", False) == (asked[0] == "gptq")
    assert not made.to_dict().get("desc_act")
