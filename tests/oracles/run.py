"""Ours against those who wrote the formats: `make oracles`.

Every package writes small weights, which must load here to the weights that it reads itself, bit for bit; they are kept
in tests/data/quantized for the tests that run without the packages. And what is written here must load there, to the
same weights. Ends with an error if one differs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import packages
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization.formats import Recipe, Scheme, pack, unpack

FIXTURES = Path(__file__).parent.parent / "data" / "quantized"
SHAPE = 32, 64
BLOCKS = 48, 96


class Package(NamedTuple):
    """Who writes and reads which schemes; without `read` or `write`, where it has no code that runs on a CPU."""

    write: Callable[[Grid, Scheme], dict[str, Tensor]]
    read: Callable[[dict[str, Tensor], Scheme, int, int], Tensor]
    schemes: list[Scheme]


def gptq(*formats: str, symmetric: bool, bits: tuple[int, ...] = (2, 3, 4, 8), group: int = 32) -> list[Scheme]:
    return [Scheme(name, b, group, symmetric) for name in formats for b in bits]


def compressed(name: str, bits: int, group: int, symmetric: bool, rows: int = 1, activations: bool = False) -> Scheme:
    return Scheme(name, bits, group, symmetric, activations=activations, rows=rows)


PACKAGES = {
    "auto-gptq": Package(
        packages.auto_gptq_write,
        packages.auto_gptq_read,
        [
            *gptq("gptq", symmetric=True),
            *gptq("gptq", symmetric=False),
            *gptq("gptq", symmetric=True, bits=(4,), group=-1),
            Scheme("gptq", 4, 32, True, act_order=True),
            Scheme("gptq", 3, 32, False, act_order=True),
        ],
    ),
    "gptqmodel": Package(
        packages.gptqmodel_write,
        packages.gptqmodel_read,
        [
            *gptq("gptq", "gptq_v2", symmetric=True),
            *gptq("gptq", "gptq_v2", symmetric=False),
            Scheme("gptq_v2", 4, 32, True, act_order=True),
        ],
    ),
    "autoawq": Package(
        packages.autoawq_write,
        packages.autoawq_read,
        [Scheme("awq", 4, 32, False), Scheme("awq_gemv", 4, 32, False), Scheme("awq_gemv", 4, 64, False)],
    ),
    "compressed-tensors": Package(
        packages.compressed_tensors_write,
        packages.compressed_tensors_read,
        [
            *(
                compressed("pack-quantized", bits, 32, symmetric)
                for bits in (2, 3, 4, 8)
                for symmetric in (True, False)
            ),
            compressed("pack-quantized", 4, -1, True),
            compressed("pack-quantized", 3, -1, False),
            compressed("pack-quantized", 4, -1, True, rows=-1),
            *(compressed("int-quantized", 8, -1, symmetric, activations=True) for symmetric in (True, False)),
            compressed("int-quantized", 8, -1, False, rows=-1, activations=True),
            compressed("int-quantized", 4, 32, True, activations=True),
            *(compressed("float-quantized", 8, -1, True, rows, activations=True) for rows in (1, -1)),
            compressed("float-quantized", 8, 32, True, 16, activations=True),
        ],
    ),
    "transformers": Package(
        packages.transformers_write,
        packages.transformers_read,
        [compressed("fp8", 8, 32, True, 16, activations=True), compressed("fp8", 8, -1, True, -1, activations=True)],
    ),
}
METHODS = {"transformers": "fp8", "compressed-tensors": "compressed-tensors", "autoawq": "awq"}


def made_grid(scheme: Scheme, package: str, seed: int) -> Grid:
    """Random codes, scales and zeros; each output uses the first and the last code, so that casts to fp8 are exact."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = BLOCKS if scheme.rows > 1 else SHAPE
    groups, top = scheme.groups(inputs), 2**scheme.bits
    rows = outputs if scheme.rows == -1 else scheme.rows
    scales = (torch.rand(outputs // rows, groups, generator=generator) / 64 + 1 / 256).half()
    scales = scales.repeat_interleave(rows, 0)
    if scheme.format in ("float-quantized", "fp8"):
        codes = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
        return Grid(codes, scales, None, 8)
    lowest = 1 if package == "auto-gptq" else 0  # its zeros run into each other where one is 0
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(lowest, top, (outputs // rows, groups), generator=generator).to(torch.uint8)
        zeros = zeros.repeat_interleave(rows, 0)
    index = None
    if scheme.act_order:
        order = torch.randperm(inputs, generator=generator)
        index = (torch.arange(inputs, dtype=torch.int32) // scheme.group_size)[order]
    codes = torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8)
    return Grid(codes, scales, zeros, scheme.bits, index)


def config_of(scheme: Scheme, package: str) -> dict[str, Any]:
    """The `quantization_config` that the package itself would write."""
    if package == "auto-gptq":  # BaseQuantizeConfig.to_dict of 0.7.1, which no longer imports
        return {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "damp_percent": 0.01,
            "desc_act": scheme.act_order,
            "static_groups": False,
            "sym": scheme.symmetric,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
            "quant_method": "gptq",
        }
    if package == "gptqmodel":
        from gptqmodel.quantization import QuantizeConfig

        sizes = {"bits": scheme.bits, "group_size": scheme.group_size}
        kinds = {"sym": scheme.symmetric, "desc_act": scheme.act_order, "format": scheme.format}
        made = QuantizeConfig(**sizes, **kinds, offload_to_disk=False)  # else the config names a folder of this machine
        return json.loads(json.dumps(made.to_dict(), default=str))
    if package == "autoawq":
        from awq.models._config import AwqConfig

        gemm = "gemm" if scheme.format == "awq" else "gemv"
        sizes = {"w_bit": scheme.bits, "q_group_size": scheme.group_size}
        return AwqConfig(**sizes, zero_point=not scheme.symmetric, version=gemm).to_transformers_dict()
    ours = Recipe(METHODS[package], ((("Linear",), scheme),)).to_dict()
    if package == "transformers":
        from transformers import FineGrainedFP8Config

        return FineGrainedFP8Config.from_dict(ours).to_dict()
    from compressed_tensors.quantization import QuantizationConfig

    return json.loads(QuantizationConfig(**ours).model_dump_json())


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def digest(weight: Tensor) -> str:
    """Of the bytes of a weight."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def compare(package: str) -> int:
    """Both directions for every scheme of a package; writes its fixtures and returns how many differ."""
    write, read, schemes = PACKAGES[package]
    kept: dict[str, Tensor] = {}
    cases, wrong = [], 0
    for number, scheme in enumerate(schemes):
        grid = made_grid(scheme, package, number)
        theirs = write(grid, scheme)
        outputs, inputs = grid.codes.shape
        here = unpack(theirs, scheme, outputs, inputs)
        dtype = here.scales.dtype
        # AutoAWQ has no code for gemv on a CPU. What it was given is on the grid, so that it must be what it wrote.
        expected = dequantize(grid, dtype) if scheme.format == "awq_gemv" else read(theirs, scheme, outputs, inputs)
        answers = {"theirs here": same(dequantize(here, dtype), expected)}
        if scheme.format != "awq_gemv":
            ours = pack(grid, scheme, torch.float16)
            answers["ours there"] = same(read(ours, scheme, outputs, inputs), dequantize(grid, ours_dtype(ours)))
        name = "_".join(str(part) for part in (number, scheme.format, scheme.bits))
        kept |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in theirs.items()}
        config = config_of(scheme, package)
        read_back = Recipe.from_dict(config).groups[0][1]
        answers["config"] = replace(read_back, activations=scheme.activations) == scheme
        case = {"name": name, "outputs": outputs, "inputs": inputs, "dtype": str(dtype).removeprefix("torch.")}
        cases.append({**case, "sha256": digest(expected), "quantization_config": config})
        wrong += not all(answers.values())
        said = ", ".join(f"{what}: {'same' if right else 'DIFFERENT'}" for what, right in answers.items())
        print(f"{package} {version(package)}  {scheme.format} {scheme.bits} bits, group {scheme.group_size}, ", end="")
        print(f"{'symmetric' if scheme.symmetric else 'asymmetric'}{', act-order' * scheme.act_order}: {said}")
    FIXTURES.mkdir(parents=True, exist_ok=True)
    save_file(kept, FIXTURES / f"{package}.safetensors")
    (FIXTURES / f"{package}.json").write_text(json.dumps(cases, indent=1) + "\n")
    return wrong


def ours_dtype(stored: dict[str, Tensor]) -> torch.dtype:
    """Of the scales."""
    return next(tensor.dtype for name, tensor in stored.items() if "scale" in name)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    wrong = sum(compare(package) for package in PACKAGES)
    print(f"{wrong} differ")
    sys.exit(bool(wrong))
