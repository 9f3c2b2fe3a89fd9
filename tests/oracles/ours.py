"""Whole checkpoints of ours in the packages that wrote the formats first: the same weights, bit for bit, and logits."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packages
import torch
from models import GROUP, small_llama, small_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import hf_llmopt
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.quantization.formats import Scheme

Weights = dict[str, Tensor]
IDS = torch.arange(3, 67)[None]


def gptqmodel(folder: Path) -> tuple[Weights, nn.Module]:
    """Their loader, and the weights of their layers."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TorchLinear)}
    return {name: layer.dequantize_weight().T for name, layer in layers.items()}, model


def autoawq(folder: Path) -> tuple[Weights, None]:
    """Their code for the weights; their loader wants an extension for a CPU that is no longer made."""
    scheme, weights, stored = Scheme("awq", 4, GROUP, False), {}, load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
        of_layer = {leaf: stored[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")}
        outputs, inputs = of_layer["scales"].shape[1], of_layer["qweight"].shape[0]
        weights[name] = packages.autoawq_read(of_layer, scheme, outputs, inputs)
    return weights, None


def compressed_tensors(folder: Path) -> tuple[Weights, nn.Module]:
    """transformers with their package."""
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}, model


CASES: list[tuple[str, dict[str, Any], Callable[[Path], tuple[Weights, nn.Module | None]]]] = [
    ("gptq", {"method": "int4", "group_size": GROUP}, gptqmodel),
    ("gptq", {"method": "int8", "group_size": GROUP}, gptqmodel),
    ("gptq", {"method": "int4", "bits": 3, "group_size": GROUP, "skip": ["o_proj"]}, gptqmodel),
    ("awq", {"method": "int4", "group_size": GROUP, "symmetric": False}, autoawq),
    ("compressed-tensors", {"method": "int8"}, compressed_tensors),
    ("compressed-tensors", {"method": "int4", "bits": 3, "group_size": GROUP, "symmetric": False}, compressed_tensors),
    ("compressed-tensors", {"method": "fp8"}, compressed_tensors),
]


def compare(written: str, asked: dict[str, Any], load: Callable[[Path], tuple[Weights, nn.Module | None]]) -> bool:
    """Quantize, save, load there; whether nothing differs."""
    model = hf_llmopt.optimize(small_llama(), llmopt={"quantization": asked})
    report = model.llmopt.quantization
    assert report.config["quant_method"] == written
    ours = {name: dequantize(model.get_submodule(name).grid(), torch.float16) for name in report.quantized}
    with tempfile.TemporaryDirectory() as room, contextlib.chdir(room):
        folder = Path(room, "model")
        model.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        weights, theirs = load(folder)
    right = {name for name, weight in ours.items() if torch.equal(weights[name], weight)}
    same = right == ours.keys() and (load is compressed_tensors or weights.keys() == ours.keys())
    error = "not run there"
    if theirs is not None:
        plain = small_llama()
        for name, weight in ours.items():
            plain.get_submodule(name).weight = nn.Parameter(weight)
        wanted = plain.float()(IDS).logits
        distance = (theirs(IDS).logits.float() - wanted).norm() / wanted.norm()
        error, same = f"{distance:.1e}", same and bool(distance < 1e-2)
    print(f"ours, {asked} as {written}, in {load.__name__}: {len(right)} of {len(ours)} weights same, ", end="")
    print(f"error of logits {error}")
    return same


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    wrong = sum(not compare(*case) for case in CASES)
    print(f"{wrong} differ")
    sys.exit(bool(wrong))
