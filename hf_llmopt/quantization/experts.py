"""Mixtures of experts with a module for each product, so that experts are quantized as every other product.

transformers 5 keeps all experts of a layer as two tensors, `gate_up_proj` `[experts, 2 * inner, hidden]` and
`down_proj` `[experts, hidden, inner]`, and whoever looks for `nn.Linear` passes by most of the weights of such a model.
`Experts` takes the place of that module: the weights become `nn.Linear`s, views into the same memory, and the module's
own code goes on to gate. File formats store a linear for each expert too, by just these names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

PARTS = ("gate_proj", "up_proj", "down_proj")


class Layout(NamedTuple):
    """How a fused tensor holds experts.

    Attributes:
        transposed: `[experts, inputs, outputs]`.
        interleaved: Outputs of gate and up in turn, instead of one after the other.
    """

    transposed: bool
    interleaved: bool

    def split(self, name: str, fused: Tensor) -> dict[str, Tensor]:
        """The weight `[outputs, inputs]`, or bias `[outputs]`, of each product that a tensor of one expert holds.

        Weights are views, into a tensor that is free once they are quantized.

        Example:
            >>> import torch
            >>> parts = Layout(transposed=False, interleaved=True).split("gate_up_proj", torch.arange(8).view(4, 2))
            >>> parts["up_proj.weight"].tolist()
            [[2, 3], [6, 7]]
        """
        suffix = ".bias" if name.endswith("_bias") else ".weight"
        rows = fused.T if self.transposed and suffix == ".weight" else fused
        if not name.startswith("gate_up_proj"):
            return {name.removesuffix("_bias") + suffix: rows if suffix == ".weight" else rows.clone()}
        gate, up = (rows[::2], rows[1::2]) if self.interleaved else rows.chunk(2)
        if suffix == ".bias":  # these stay
            gate, up = gate.clone(), up.clone()
        return {"gate_proj" + suffix: gate, "up_proj" + suffix: up}


class Expert(nn.Module):
    """`down(gate(gate(x), up(x)))`, or `down(act(up(x)))` where there is no gate.

    Args:
        products: By name.
        gated: From the outputs of all but the last, as the fused product gives them, to the inputs of the last.
        interleaved: Whether the fused product gives gate and up in turn.
    """

    def __init__(self, products: dict[str, nn.Module], gated: Callable[[Tensor], Tensor], interleaved: bool) -> None:
        super().__init__()
        for name, product in products.items():
            self.add_module(name, product)
        self.gated, self.interleaved = gated, interleaved

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`."""
        *first, down = self._modules.values()
        gave = [product(x) for product in first]  # type: ignore[misc]
        if len(gave) == 1:
            joined = gave[0]
        else:
            joined = torch.stack(gave, dim=-1).flatten(-2) if self.interleaved else torch.cat(gave, dim=-1)
        return down(self.gated(joined))  # type: ignore[misc]


class Experts(nn.ModuleList):
    """All experts of a layer. Each token visits those that the router chose for it.

    Args:
        eager: A module for which `can_unfuse` holds. It is left as it is, and its weights are shared.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> eager = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
        >>> for name, parameter in Experts(eager)[1].named_parameters():
        ...     print(name, list(parameter.shape))
        gate_proj.weight [4, 8]
        up_proj.weight [4, 8]
        down_proj.weight [8, 4]
    """

    def __init__(self, eager: nn.Module) -> None:
        super().__init__()
        fused = {name: parameter.detach() for name, parameter in eager.named_parameters()}
        code: Any = copy.copy(eager)  # only code and numbers
        code._parameters = {}
        self.fused = tuple(fused)
        self.layout, gated = _layout_and_gate(code)
        for expert in range(len(fused["down_proj"])):
            parts: dict[str, Tensor] = {}
            for name, tensor in fused.items():
                parts |= self.layout.split(name, tensor[expert])
            products: dict[str, nn.Module] = {
                name: _linear(parts[f"{name}.weight"], parts.get(f"{name}.bias"))
                for name in PARTS
                if f"{name}.weight" in parts
            }
            self.append(Expert(products, gated, self.layout.interleaved))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the modules of transformers.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: Experts of each token, `[tokens, chosen]`.
            top_k_weights: Their weights, `[tokens, chosen]`.

        Returns:
            `[tokens, hidden]`.
        """
        tokens, chosen = top_k_index.shape
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=len(self)).tolist()
        read = hidden_states[order // chosen]
        gave = [expert(part) for expert, part in zip(self, read.split(counts), strict=True) if len(part)]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # Summed in the order of the choice: a token's result does not depend on the others.
        weighted = torch.cat(gave)[back].view(tokens, chosen, -1) * top_k_weights[..., None]
        return weighted.sum(dim=1).to(hidden_states.dtype)


class RoutedExperts(Experts):
    """Experts whose caller hands to each of them all tokens, already weighted: those of Llama 4.

    A token that the router did not choose for an expert is all zeros there, and is left out.
    """

    def forward(self, routed: Tensor) -> Tensor:  # type: ignore[override]
        """`[experts * tokens, hidden]` to the same, one expert's tokens behind another's."""
        gave = []
        for expert, part in zip(self, routed.chunk(len(self)), strict=True):
            rows = part.any(dim=-1).nonzero()[:, 0]
            none = torch.zeros_like(part)
            gave.append(none.index_copy(0, rows, expert(part[rows])) if len(rows) else none)
        return torch.cat(gave)


def can_unfuse(module: nn.Module) -> bool:
    """Whether a module is experts as transformers' decorator `use_experts_implementation` knows them, or Llama 4's."""
    if _is_routed(module):
        return True
    names = {name for name, _ in module.named_parameters()}
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    biases = {first + "_bias", "down_proj_bias"} if getattr(module, "has_bias", False) else set()
    return (
        hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and not getattr(module, "has_post_expert_norm", False)
        and names == {first, "down_proj"} | biases
    )


def _is_routed(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _layout_and_gate(code: Any) -> tuple[Layout, Callable[[Tensor], Tensor]]:
    """How a module's tensors hold experts, and what stands between their first products and the last."""
    if _is_routed(code):
        return Layout(transposed=True, interleaved=False), partial(_gated, code.act_fn)
    gated = partial(type(code)._apply_gate, code)  # no bound method: pickle looks for these by the function's own name
    return Layout(code.is_transposed, not code.is_concatenated), gated if code.has_gate else code.act_fn


def _gated(act: Callable[[Tensor], Tensor], joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return up * act(gate)


class Unfused(NamedTuple):
    """What became of a model's modules of fused experts.

    Attributes:
        whole: Those that gave their places to `Experts`, by name. As long as they are kept, so is their memory.
        left: Names of those that must stay: they hold three-dimensional weights too, but nothing says how they are
            multiplied.
    """

    whole: dict[str, nn.Module]
    left: list[str]

    def hold(self, products: Iterable[str]) -> bool:
        """Whether one of these products is an expert's."""
        inside = tuple(f"{name}." for name in self.whole)
        return any(name.startswith(inside) for name in products)

    def undo(self, model: nn.Module, unless: Iterable[str] = ()) -> None:
        """Put the modules back, unless one of them holds one of these products: of all layers, or of none."""
        if not self.hold(unless):
            while self.whole:
                name, module = self.whole.popitem()
                Experts(module).load_state_dict(model.get_submodule(name).state_dict())  # what others saw of a change
                model.set_submodule(name, module)


def unfuse(model: nn.Module) -> Unfused:
    """Put `Experts` in the place of every module of fused experts.

    Args:
        model: A model, with weights or on the meta device.
    """
    found = Unfused({}, [])
    for name, module in list(model.named_modules()):
        if can_unfuse(module):
            model.set_submodule(name, RoutedExperts(module) if _is_routed(module) else Experts(module))
            found.whole[name] = module
        elif "Experts" in type(module).__name__ and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            found.left.append(name)
    return found


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
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # made from a config
        found = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    made = conversions(found, model)
    splits = [t for t in made if any(isinstance(operation, _Split) for operation in getattr(t, "operations", ()))]
    model._weight_conversions = [transform for transform in made if transform not in splits]
    for experts in [module for module in model.modules() if isinstance(module, Experts)]:
        for product in experts.modules():
            if type(product) is nn.Linear:  # it was left out: files hold no views
                product.weight.data = product.weight.data.clone(memory_format=torch.contiguous_format)


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
        return dict(zip(self.names, parts, strict=True))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
