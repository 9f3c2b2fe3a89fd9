"""Quantized copies of a model: how they are made, what they hold, and how near they are to their own weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import LLMOptConfig, optimize
from hf_llmopt.config import QuantizationConfig
from hf_llmopt.generation import handle_of
from hf_llmopt.kernels import reference
from hf_llmopt.quantization import QuantizedLinear

# The range of a group is searched for the least error where quality is measured: it makes no product faster or slower.
METHODS = {
    "int8": QuantizationConfig("int8", clip=False),
    "int8, head too": QuantizationConfig("int8", clip=False, head_bits=8),
    "int4": QuantizationConfig("int4", clip=False),
    "int4, head too": QuantizationConfig("int4", clip=False, head_bits=4),
    "fp8": QuantizationConfig("fp8"),
}
"""What speed is measured with; a calibrated method gives the same format and so the same speed."""


def quantize(model: PreTrainedModel, config: QuantizationConfig) -> PreTrainedModel:
    """A quantized copy of a model."""
    return optimize(copy.deepcopy(model), LLMOptConfig(quantization=config))


def dequantized(model: PreTrainedModel, full: PreTrainedModel) -> PreTrainedModel:
    """A copy of a full-precision model with the parameters of a quantized one and the weights its codes stand for.

    Args:
        model: The quantized model.
        full: What it was made from.
    """
    dense = copy.deepcopy(full)
    with torch.no_grad():
        theirs = dict(dense.named_parameters())
        for name, parameter in model.named_parameters():  # some methods also change norms
            if name in theirs and theirs[name].shape == parameter.shape:
                theirs[name].copy_(parameter)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                weight: Any = dense.get_submodule(name).weight
                weight.copy_(reference.dequantize(module.grid(), weight.dtype))
    return dense


def round_activations(model: PreTrainedModel, allowed: bool) -> None:
    """Whether products may round what they read to int8."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = allowed


def held(model: PreTrainedModel) -> int:
    """Bytes of the model's parameters and buffers, a kernel's layout included."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def memory(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a quantized model, of its quantized products, and of the same products before."""
    report = handle_of(model).quantization
    assert report is not None
    return {"bytes": held(model), "products": report.bytes, "products_before": report.bytes_before}


@torch.no_grad()
def output_errors(model: PreTrainedModel, full: PreTrainedModel, rows: Sequence[int], seed: int) -> dict[str, float]:
    """How far a quantized model is from its dequantized weights in torch: the error of what the output head reads.

    A root mean square, in units of that of the states themselves; the largest over the numbers of rows. In bfloat16
    there is one without int8 activations too: both round after each operation, in different places.

    Args:
        model: The quantized model.
        full: What it was made from.
        rows: How many rows products have.
        seed: Of the tokens.

    Returns:
        `"activations"`, with int8 activations where the products choose so, and `"weights"`, without.
    """
    dense = dequantized(model, full)
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embeddings.weight.shape[0], (1, max(rows)), generator=generator).to(model.device)
    found = {"activations": 0.0, "weights": 0.0}
    for count in sorted(set(rows)):
        expected = _states(dense, ids[:, :count])
        for name, worst_yet in found.items():
            round_activations(model, name == "activations")
            error = (_states(model, ids[:, :count]) - expected).square().mean().sqrt()
            found[name] = max(worst_yet, float(error / expected.square().mean().sqrt()))
    round_activations(model, True)
    return found


def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    body: Any = model.base_model
    states: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
    return states.float()
