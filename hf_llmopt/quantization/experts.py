"""Mixtures of experts with a module for each product, so that experts are quantized as every other product.

transformers 5 keeps all experts of a layer as two tensors, `gate_up_proj` `[experts, 2 * inner, hidden]` and
`down_proj` `[experts, hidden, inner]`, and whoever looks for `nn.Linear` passes by most of the weights of such a model.
`Experts` takes the place of that module: the weights become `nn.Linear`s, views into the same memory, and the module's
own code goes on to gate. File formats store a linear for each expert too, by just these names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

        They are views, into a tensor that is free once the weights are quantized.

        Example:
            >>> import torch
            >>> parts = Layout(transposed=False, interleaved=True).split("gate_up_proj", torch.arange(8).view(4, 2))
            >>> parts["up_proj.weight"].tolist()
            [[2, 3], [6, 7]]
        """
        suffix = ".bias" if name.endswith("_bias") else ".weight"
        rows = fused.T if self.transposed and suffix == ".weight" else fused
        if not name.startswith("gate_up_proj"):
            return {name.removesuffix("_bias") + suffix: rows}
        gate, up = (rows[::2], rows[1::2]) if self.interleaved else rows.chunk(2)
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
        self.fused = {name: tensor.shape for name, tensor in fused.items()}
        self.layout, gated = _layout_and_gate(code)
        self._code = (code,)  # in a tuple it is no module of this one
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

    def products(self) -> list[nn.Module]:
        """Those of all experts."""
        return [product for expert in self for product in expert._modules.values() if product is not None]

    @torch.no_grad()
    def write(self, whole: nn.Module) -> None:
        """Put the weights into the parameters of a module of fused experts."""
        for name, fused in whole.named_parameters():
            for expert, rows in zip(self, fused, strict=True):
                for part, view in self.layout.split(name, rows).items():
                    view.copy_(expert.get_parameter(part))

    def fuse(self) -> nn.Module:
        """A module of fused experts with these weights, all of them `nn.Linear`s."""
        whole: Any = copy.copy(self._code[0])
        like = next(self.parameters())
        made = {name: torch.empty(shape, dtype=like.dtype, device=like.device) for name, shape in self.fused.items()}
        whole._parameters = {name: nn.Parameter(tensor) for name, tensor in made.items()}
        self.write(whole)
        return whole

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
                apart: Any = model.get_submodule(name)
                apart.write(module)  # what a calibration has changed
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


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)  # it stays, and files hold no views
    return linear
