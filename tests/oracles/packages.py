"""What other packages write for a quantized weight, and what weight they read from it: each through its own code.

`write(weight, scheme)` and `read(stored, scheme, outputs, inputs)` of each package take and give what ours do; a weight
that is read is `[outputs, inputs]` in the dtype of its scales.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization.formats import Recipe, Scheme

Stored = dict[str, Tensor]


def as_linear(grid: Grid, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer whose weight lies on the grid, which packages are given to quantize."""
    linear = nn.Linear(grid.codes.shape[1], grid.codes.shape[0], bias=False)
    linear.weight = nn.Parameter(dequantize(grid, dtype), requires_grad=False)
    return linear


def zeros_of(grid: Grid) -> Tensor:
    """Also of a symmetric grid."""
    return torch.full_like(grid.scales, 2 ** (grid.bits - 1)) if grid.zeros is None else grid.zeros


# ---------------------------------------------------------------------------------------------------------- auto-gptq


def _auto_gptq(name: str) -> ModuleType:
    """A file of the package, which itself no longer imports."""
    found = importlib.util.find_spec("auto_gptq")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "nn_modules" / "qlinear" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _auto_gptq_layer(scheme: Scheme, outputs: int, inputs: int) -> Any:
    made = _auto_gptq("qlinear_cuda" if scheme.act_order else "qlinear_cuda_old").QuantLinear
    return made(scheme.bits, scheme.group_size, inputs, outputs, bias=False)


def auto_gptq_write(grid: Grid, scheme: Scheme) -> Stored:
    layer = _auto_gptq_layer(scheme, *grid.codes.shape)
    index = layer.g_idx if grid.index is None else grid.index
    layer.pack(as_linear(grid, torch.float16), grid.scales, zeros_of(grid).half(), index)
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def auto_gptq_read(stored: Stored, scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    layer = _auto_gptq_layer(scheme, outputs, inputs)
    layer.load_state_dict(stored)
    return layer(torch.eye(inputs, dtype=torch.float16)).T  # on the CPU, it dequantizes and multiplies


# ---------------------------------------------------------------------------------------------------------- gptqmodel


def _gptqmodel_layer(scheme: Scheme, outputs: int, inputs: int) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_order, inputs, outputs)


def gptqmodel_write(grid: Grid, scheme: Scheme) -> Stored:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = _gptqmodel_layer(scheme, *grid.codes.shape)
    index = layer.g_idx if grid.index is None else grid.index
    layer.pack_original(as_linear(grid), grid.scales.float(), zeros_of(grid).float(), index)
    if scheme.format == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=scheme.bits, group_size=scheme.group_size))
    return {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales", "g_idx")}


def gptqmodel_read(stored: Stored, scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    layer = _gptqmodel_layer(scheme, outputs, inputs)
    layer.load_state_dict({name: tensor.clone() for name, tensor in stored.items()})
    if scheme.format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, scheme.bits, torch.int32)
    layer.post_init()
    return layer.dequantize_weight().T


# ------------------------------------------------------------------------------------------------------------ autoawq


def autoawq_write(grid: Grid, scheme: Scheme) -> Stored:
    if scheme.format == "awq":
        from awq.modules.linear.gemm import WQLinear_GEMM as Layer

        scales, zeros = grid.scales.T.contiguous(), zeros_of(grid).T.contiguous()
    else:
        from awq.modules.linear.gemv import WQLinear_GEMV as Layer

        scales, zeros = grid.scales, zeros_of(grid)
    layer = Layer.from_linear(as_linear(grid), 4, scheme.group_size, False, scales.float(), zeros.float())
    return {name: getattr(layer, name).contiguous() for name in ("qweight", "qzeros", "scales")}


def autoawq_read(stored: Stored, scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    from awq.utils.packing_utils import dequantize_gemm

    size = inputs if scheme.group_size == -1 else scheme.group_size
    return dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, size).T


# ------------------------------------------------------------------------------------------------- compressed-tensors


def _compressor(scheme: Scheme) -> tuple[Any, Any]:
    """Their code for a format, and what their config says of ours."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(**Recipe("compressed-tensors", ((("Linear",), scheme),)).to_dict())
    return BaseCompressor.get_value_from_registry(scheme.format), config.config_groups["group_0"]


def compressed_tensors_write(grid: Grid, scheme: Scheme) -> Stored:
    compressor, theirs = _compressor(scheme)
    shared = grid.scales
    if scheme.rows != 1:
        shared = grid.scales[:1, 0] if scheme.rows == -1 else grid.scales[:: scheme.rows].contiguous()
    stored = {"weight": as_linear(grid).weight.data, "weight_scale": shared}
    if not scheme.symmetric:
        zeros = (zeros_of(grid).to(torch.int16) - 2 ** (scheme.bits - 1)).to(torch.int8)
        stored["weight_zero_point"] = zeros[:1, 0] if scheme.rows == -1 else zeros
    return dict(compressor.compress(stored, theirs))


def compressed_tensors_read(stored: Stored, scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    compressor, theirs = _compressor(scheme)
    return compressor.decompress(dict(stored), theirs)["weight"]


# ------------------------------------------------------------------------------------------------------- transformers


def transformers_write(grid: Grid, scheme: Scheme) -> Stored:
    """Fine-grained fp8 quantizes by itself: the grid only gives a weight."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    block = None if scheme.rows == -1 else (scheme.rows, scheme.group_size)
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(weight_block_size=block))
    made = Fp8Quantize(quantizer).convert({"layer.weight": as_linear(grid).weight.data})
    return {name.removeprefix("layer."): tensor for name, tensor in made.items()}


def transformers_read(stored: Stored, scheme: Scheme, outputs: int, inputs: int) -> Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    block = None if scheme.rows == -1 else [scheme.rows, scheme.group_size]
    return _dequantize_fp8_weight(stored["weight"], stored["weight_scale_inv"], block, torch.float32)
