"""A model that is loaded already: its products are exchanged for quantized ones, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..config import CALIBRATED, QuantizationConfig
from ..errors import about
from ..kernels.arguments import Grid
from . import awq, gptq, smoothquant
from .blocks import quantize_blocks
from .calibration import pack
from .expert_files import names_in_files
from .experts import unfuse
from .linear import QuantizedLinear
from .loading import require_full
from .offload import resident
from .plan import Plan, plan
from .quantizer import Quantizer, WeightConfig


def quantize(model: PreTrainedModel, asked: QuantizationConfig) -> None:
    """Quantize a loaded model in place.

    Raises:
        UnsupportedQuantization: It is quantized already, or nothing of it can be.
        CalibrationFailed: The method needs texts that there are not.
    """
    require_full(model)
    asked = replace(asked, method=asked.effective_method)
    quantizer = Quantizer(WeightConfig(), asked, pre_quantized=False)
    experts = unfuse(model)
    in_files = names_in_files(model)
    try:
        found = plan(model, asked, experts.left)
        quantizer.use(found)
        experts.undo(model, unless=found.chosen)
        with torch.no_grad():
            for name, grid in _grids(model, found, quantizer.notes):
                if experts.hold([name]):
                    experts.whole.clear()  # whose memory is free as soon as their products are quantized
                module: Any = model.get_submodule(name)
                with resident(module, without=[module]):
                    new = QuantizedLinear.from_grid(grid, found.chosen[name], module.bias).train(module.training)
                new.prepare()
                quantizer.names.add(name)
                if type(module) is Conv1D:
                    quantizer.transposed.add(name)
                quantizer.bytes_before += module.weight.numel() * module.weight.element_size()
                model.set_submodule(name, new)
                quantizer.freed.after(module.weight.numel())
    finally:
        experts.undo(model)  # of which nothing was quantized
        if quantizer.names:  # if it was stopped, the model is what it is now, and its files say so
            quantizer.use(found.only(quantizer.names, in_files))
            method = quantizer.quantization_config.quant_method
            vars(model).update(hf_quantizer=quantizer, is_quantized=True, quantization_method=method)
            quantizer.postprocess_model(model)


def _grids(model: PreTrainedModel, plan: Plan, notes: dict[str, str]) -> Iterator[tuple[str, Grid]]:
    """The chosen products, one after the other; who takes one may exchange its module."""
    if plan.config.method in CALIBRATED:
        yield from _calibrated(model, plan, notes)
        return
    for name in tqdm(list(plan.chosen), desc="Quantizing weights"):
        module: Any = model.get_submodule(name)
        with resident(module), about(name):
            weight = module.weight.T if type(module) is Conv1D else module.weight
            grid = plan.grid(weight, plan.chosen[name])
        yield name, grid


def _calibrated(model: PreTrainedModel, plan: Plan, notes: dict[str, str]) -> Iterator[tuple[str, Grid]]:
    """Likewise, by a method that sees what the products read."""
    asked, scheme = plan.config, next(iter(plan.chosen.values()))
    options: dict[str, Any] = {
        "bits": plan.bits, "group_size": plan.group_size, "symmetric": plan.symmetric, "clip": asked.clip,
        "scale_dtype": scheme.scale_dtype(model.dtype),
    }  # fmt: skip
    if asked.method == "gptq":
        options |= {"act_order": asked.act_order, "damping": asked.damping}
    methods: dict[str, Any] = {"gptq": gptq, "awq": awq, "smoothquant": smoothquant}
    quantize_block = methods[asked.effective_method].quantize_block
    tokens = _calibration_tokens(model, asked)
    chosen: dict[str, nn.Module] = {name: model.get_submodule(name) for name in plan.chosen}
    walk = quantize_blocks(
        model, partial(quantize_block, **options), lambda weight: plan.grid(weight, scheme), tokens, chosen,
        resume=asked.resume, settings=repr((asked.method, options)), exact=asked.method == "gptq", notes=notes,
    )  # fmt: skip
    for name, grid in walk:
        del chosen[name]
        yield name, grid


def _calibration_tokens(model: PreTrainedModel, asked: QuantizationConfig) -> Tensor:
    tokenizer = None
    with suppress(Exception):  # token ids need none; for texts, `pack` says that there is none
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    embedding: Any = model.get_input_embeddings()
    tokens = pack(asked.calibration, tokenizer, asked.samples, asked.length, embedding.weight.shape[0])
    if 2 * len(tokens) < asked.samples:
        warnings.warn(
            f"llmopt: the calibration set fills {len(tokens)} of {asked.samples} samples of {asked.length} tokens; a "
            "method that fits few inputs may do worse on others. Give more texts, or say so with samples=.",
            UserWarning,
            stacklevel=2,
        )
    return tokens
