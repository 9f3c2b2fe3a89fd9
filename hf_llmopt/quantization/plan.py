"""Which products of a model are quantized, and how: what was asked for, made concrete for one model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import EIGHT_BITS, QuantizationConfig
from ..errors import UnsupportedQuantization, unknown
from ..kernels.arguments import Grid
from . import formats
from .expert_files import names_in_files
from .experts import Experts
from .formats import Recipe, Scheme
from .grid import make_float8_grid, make_grid

GROUP_SIZES = (128, 64, 32)  # where the user leaves it open
HEAD = "the output head, or tied to one"
OUTSIDE = "stands outside of the decoder blocks, which are all that its file format has quantized"
STOPPED = "quantization was stopped before its turn"
ALIKE = "its name contains that of one that stays, and the file format tells them apart by that"
FUSED = "experts whose products cannot be told apart"
ADAPTER = "part of an adapter"
ROUTER = "chooses or weighs experts: small, and its errors are choices"
with torch.device("meta"):
    AS_LINEAR = nn.Linear(1, 1)  # what a product will be to a file format, whatever its class is now


@dataclass(frozen=True)
class Plan:
    """What is done to each product of a model.

    Attributes:
        config: What was asked for.
        bits: Of a code.
        group_size: Inputs that share a scale, -1 for all.
        symmetric: No zeros.
        chosen: The format of each product that is quantized, by name.
        skipped: Why each other product is not.
    """

    config: QuantizationConfig
    bits: int
    group_size: int
    symmetric: bool
    chosen: dict[str, Scheme]
    skipped: dict[str, str]
    recipe: Recipe

    def only(self, names: set[str], in_files: Callable[[str], str]) -> Plan:
        """The plan for some of the chosen products, the others left as they are; `in_files` as `names_in_files`."""
        left = {name: STOPPED for name in self.chosen if name not in names}
        if not left:
            return self
        chosen = {name: scheme for name, scheme in self.chosen.items() if name in names}
        skipped = self.skipped | left
        how = self.config.effective_method, self.bits, self.group_size, self.symmetric, self.config.act_order
        recipe = Recipe.for_method(*how, map(in_files, skipped), self.config.format)
        return replace(self, chosen=chosen, skipped=skipped, recipe=recipe)

    def grid(self, weight: Tensor, scheme: Scheme) -> Grid:
        """The codes of a weight `[outputs, inputs]`, found from the weight alone."""
        scale_dtype = scheme.scale_dtype(weight.dtype)
        if self.config.method == "fp8":
            return make_float8_grid(weight, scale_dtype)
        return make_grid(weight, self.bits, self.group_size, self.symmetric, self.config.clip, scale_dtype)


def inputs_and_outputs(module: nn.Module) -> tuple[int, int] | None:
    """Of a module that multiplies with its weight and may be quantized; `None` for other modules."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if type(module) is Conv1D:  # GPT-2's, whose weight is the transposed one
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def plan(model: PreTrainedModel, config: QuantizationConfig, fused: Collection[str] = ()) -> Plan:
    """What `config` means for a model.

    Args:
        model: The model, its experts apart.
        config: What was asked for.
        fused: Names of experts that could not be taken apart.

    Raises:
        UnsupportedQuantization: Nothing of the model can be quantized so.
    """
    bits = 8 if config.method in EIGHT_BITS else config.bits or 4
    symmetric = config.method != "awq" if config.symmetric is None else config.symmetric
    products = {name: found for name, module in model.named_modules() if (found := inputs_and_outputs(module))}
    modules = [name for name, _ in model.named_modules()]
    for pattern in config.skip:
        if not any(matches(name, pattern) for name in modules):
            raise unknown(
                "QuantizationConfig(skip=...): module", pattern, {name.rpartition(".")[2] for name in products}
            )
    heads = _heads(model)
    skipped = {name: HEAD for name in products if name in heads}
    skipped |= dict.fromkeys(fused, FUSED)
    skipped |= dict.fromkeys(_routers(model, fused, products), ROUTER)
    skipped |= {name: ADAPTER for name in products if _in_adapter(model, name)}
    skipped |= {name: "named in skip" for name in products if any(matches(name, pattern) for pattern in config.skip)}
    left = {name: shape for name, shape in products.items() if name not in skipped}
    group_size = config.group_size
    if group_size is None:
        group_size = -1 if config.method in EIGHT_BITS else _largest_group(left)
    how = config.effective_method, bits, group_size, symmetric, config.act_order
    in_files = names_in_files(model)
    trial = Recipe.for_method(*how, own_format=config.format)
    for name, (inputs, outputs) in left.items():
        scheme = trial.scheme_of(in_files(name), AS_LINEAR)
        reason = OUTSIDE if scheme is None else formats.obstacle(scheme, outputs, inputs)
        if reason is not None:
            skipped[name] = reason
    if set(left) <= set(skipped):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "it has no nn.Linear"
        common = gcd(*(inputs for inputs, _ in left.values()))
        best = max((size for size in range(1, GROUP_SIZES[0] + 1) if common % size == 0), default=0)
        sizes = f"Leave group_size out, or choose a divisor of {common}, as {best}."
        remedy = sizes if left and config.group_size else "Skip less." if config.skip else "Load it without a method."
        raise UnsupportedQuantization(
            f"No product of {type(model).__name__} can be quantized with {config!r} ({reasons}). {remedy}"
        )
    while True:
        recipe = Recipe.for_method(*how, [in_files(name) for name in skipped], config.format)
        schemes = {name: recipe.scheme_of(in_files(name), AS_LINEAR) for name in left if name not in skipped}
        chosen = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        if chosen.keys() == schemes.keys():
            break
        skipped |= dict.fromkeys(schemes.keys() - chosen.keys(), ALIKE)
    return Plan(config, bits, group_size, symmetric, chosen, skipped, recipe)


def matches(name: str, pattern: str) -> bool:
    """Whether a module has this name, or one that ends so or lies inside."""
    return re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) is not None


def _routers(model: nn.Module, fused: Collection[str], products: Mapping[str, tuple[int, int]]) -> list[str]:
    """Products beside a layer's experts that give a number for each of them, or one for those that all tokens visit."""
    counts = {name: len(module) for name, module in model.named_modules() if isinstance(module, Experts)}
    counts |= {name: len(next(p for p in model.get_submodule(name).parameters() if p.dim() == 3)) for name in fused}
    found = []
    for experts, count in counts.items():
        around = experts.rpartition(".")[0] + "."
        for name, (_, outputs) in products.items():
            if outputs in (1, count) and name.startswith(around) and not name.startswith(f"{experts}."):
                found.append(name)
    return found


def _in_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to an adapter of PEFT, beside the module that it adapts."""
    parts = name.split(".")
    outer = [(model.get_submodule(".".join(parts[:depth])), part) for depth, part in enumerate(parts)]
    return any(isinstance(getattr(m, "base_layer", None), nn.Module) and part != "base_layer" for m, part in outer)


def _heads(model: PreTrainedModel) -> set[str]:
    """Names of the output head, of what is tied to another weight, and of what must stay in float32."""
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names |= {key.removesuffix(".weight") for key in (*tied, *tied.values())}
    wide = model._keep_in_fp32_modules or ()
    return names | {name for name, _ in model.named_modules() if any(matches(name, pattern) for pattern in wide)}


def _largest_group(products: dict[str, tuple[int, int]]) -> int:
    """The group size that fits the most weights; the largest of those."""
    fitting: Counter[int] = Counter()
    for inputs, outputs in products.values():
        for size in GROUP_SIZES:
            fitting[size] += inputs * outputs if inputs % size == 0 else 0
    return max(GROUP_SIZES, key=lambda size: (fitting[size], size))


def dividing_group(inputs: int) -> int:
    """The largest of the usual group sizes that divides the inputs; -1 if none does."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), -1)
