"""The model's own first layers as its draft model (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710).

Behind layer E the final norm and the head follow at once. Models that were trained for early exits guess well so;
others guess poorly, and then few guesses are computed.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidOption

M = TypeVar("M", bound=nn.Module)

SHARE = 4  # one layer in so many drafts, if nobody says how many


def first_layers(model: PreTrainedModel, exit_layer: int | None) -> PreTrainedModel:
    """The model without its later layers. It shares every parameter, and whatever happens to one.

    Only the modules on the way to the list of layers are new objects, with a table of children of their own; all
    others, the config among them, are the model's own.

    Args:
        model: Stays as it is.
        exit_layer: How many layers remain; `None` for about a quarter of them.

    Raises:
        InvalidOption: There is no such layer, or no list of layers is found.
    """
    found = [(name, list(module.children())) for name, module in model.named_modules() if _is_layers(module)]
    if len(found) != 1:
        raise InvalidOption(
            f"method='layer_skip' needs a model whose layers stand in one list, each with its place in it; "
            f"{type(model).__name__} has {len(found)} such lists. Take method='suffix' or a draft_model."
        )
    ((path, layers),) = found
    kept = max(1, len(layers) // SHARE) if exit_layer is None else exit_layer
    if not 1 <= kept < len(layers):
        raise InvalidOption(
            f"method='layer_skip' with exit_layer={exit_layer}: {type(model).__name__} has {len(layers)} layer(s), and "
            f"guesses come from behind one of them that is not the last. Give a number below {len(layers)}, or leave "
            "exit_layer out for about a quarter; method='suffix' needs no layers."
        )
    view = _view(model)
    parent: nn.Module = view
    *way, last = path.split(".")
    for name in way:
        child = _view(parent.get_submodule(name))
        parent._modules[name], parent = child, child
    parent._modules[last] = nn.ModuleList(layers[:kept])
    return view


def _is_layers(module: nn.Module) -> bool:
    """Whether it is a list of layers whose attention knows which one it is in."""
    if not isinstance(module, nn.ModuleList) or not module:
        return False
    places = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in module]
    return places == [{place} for place in range(len(module))]


def _view(module: M) -> M:
    """The same module with a table of children of its own; hooks and a replaced forward stay the module's."""
    view = object.__new__(type(module))
    nn.Module.__init__(view)
    fresh = set(vars(view)) - {"training", "_parameters", "_buffers", "_non_persistent_buffers_set"}
    view.__dict__.update({k: v for k, v in vars(module).items() if k not in fresh | {"forward", "llmopt"}})
    view._modules.update(module._modules)
    return view
