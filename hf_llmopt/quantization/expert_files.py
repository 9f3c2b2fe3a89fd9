"""How files name the products of experts, and hold them fused or apart: what transformers does to them on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from .experts import Experts, Layout


def conversions(found: list[WeightTransform], model: nn.Module) -> list[WeightTransform]:
    """What transformers does to names and tensors of files while it loads them, for a model with `Experts`.

    Args:
        found: The model's own list, which merges the linears that files hold for each expert. Here they are renamed,
            whatever they store: `experts.3.w1.qweight` is `experts.3.gate_proj.qweight`, and has its name again when
            the model is saved. What files hold fused is split.
        model: The model, after `unfuse`.
    """
    experts = {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, Experts)}
    parts = {f"{leaf}.{fused}": module for leaf, module in experts.items() for fused in module.fused}
    kept: list[WeightTransform] = []
    for transform in found:
        target, sources = transform._original_target_patterns[0], transform._original_source_patterns
        part = next((part for part in parts if f".{target}".endswith(f".{part}")), None)
        if part is None or not isinstance(transform, WeightConverter):
            kept.append(transform)
        elif all("*." in source for source in sources):
            names = parts[part].layout.split(part.rpartition(".")[2], torch.empty(2, 2))
            kept += filter(None, map(_renaming, sources, names))
        else:
            kept.append(_splitting(parts.pop(part), part, sources, _Split(transform.operations, target)))
    return kept + [
        _splitting(module, part, [rf"(?<!\w){re.escape(part)}$"], _Split()) for part, module in parts.items()
    ]


def keep_apart(model: Any) -> None:
    """Let files of a model hold its experts' products apart, by the names that other tools give them."""
    if getattr(model, "_weight_conversions", None) is None:  # made from a config
        keep_whole(model)
    made = conversions(model._weight_conversions, model)
    splits = [t for t in made if any(isinstance(operation, _Split) for operation in getattr(t, "operations", ()))]
    model._weight_conversions = [transform for transform in made if transform not in splits]
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        for product in experts.modules():
            if type(product) is nn.Linear:  # it was left out: files hold no views
                product.weight.data = product.weight.data.clone(memory_format=torch.contiguous_format)


def keep_whole(model: Any) -> None:
    """Let files of a model have the names and tensors that transformers gives them."""
    found = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [transform for transform in found if not isinstance(transform, PrefixChange)]


def names_in_files(model: Any) -> Callable[[str], str]:
    """From the names of modules in `Experts` to those that they have in files; other names stay as they are."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Experts))
    found = conversions(get_model_conversion_mapping(model, add_legacy=False), model) if experts else []
    renamings = [t.reverse_transform() for t in reversed(found) if type(t) is WeightRenaming]

    def name_in_files(name: str) -> str:
        if not name.startswith(experts):
            return name
        key = f"{name}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(".weight")

    return name_in_files


def _renaming(source: str, ours: str) -> WeightRenaming | None:
    """From the name that files give a product of an expert, as `.experts.*.w1.weight`, to ours, `gate_proj.weight`."""
    before, _, theirs = source.removesuffix(".weight").partition("*.")
    ours = ours.removesuffix(".weight")
    if theirs == ours:
        return None
    return WeightRenaming(rf"{re.escape(before)}(\d+)\.{theirs}\.", rf"{before}\1.{ours}.")


def _splitting(module: Experts, part: str, sources: list[str], split: _Split) -> WeightConverter:
    leaf, fused = part.rsplit(".", 1)
    names = module.layout.split(fused, torch.empty(2, 2))
    targets = [f"{leaf}.{expert}.{name}" for expert in range(len(module)) for name in names]
    split.layout, split.fused, split.names = module.layout, fused, targets
    return WeightConverter(list(sources), targets, [split])


class _Split(ConversionOps):
    """The fused tensor of all experts, which other operations may give first, becomes one for each product."""

    supports_many_to_many = True
    layout: Layout
    fused: str
    names: list[str]

    def __init__(self, before: list[ConversionOps] | None = None, target: str = "") -> None:
        self.before, self.target = before or [], target

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        for operation in self.before:
            input_dict = operation.convert(input_dict, **{**kwargs, "target_patterns": [self.target]})
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        parts = [part for expert in tensor for part in self.layout.split(self.fused, expert).values()]
        if self.fused.endswith("_bias"):  # these stay, and files hold no views
            parts = [part.clone() for part in parts]
        return dict(zip(self.names, parts, strict=True))
