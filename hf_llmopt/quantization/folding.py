"""Folds on a block of the walk: what its products read, and factors moved inside it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .blocks import Block
from .experts import Experts
from .graph import Fold, find

SAMPLE = 2048  # tokens


def folds_of(block: Block) -> list[Fold]:
    """The folds of a block, watched with the arguments that its model gives it; it notes what none scales."""
    given: list[dict[str, Any]] = []
    handle = block.module.register_forward_pre_hook(
        lambda module, args, kwargs: given.append({**kwargs, "args": args[1:]}), with_kwargs=True
    )
    try:
        block.forward(0)
    finally:
        handle.remove()
    kwargs = {name: value for name, value in given[0].items() if name not in ("hidden_states", "args")}
    graph = find(block.module, block.inputs(0).to(next(block.module.parameters()).device), kwargs, given[0]["args"])
    for name, why in graph.left.items():
        if f"{block.name}.{name}" in block.products:
            block.notes[f"{block.name}.{name}"] = f"its inputs could not be scaled: {why}"
    return graph.folds


def reader(block: Block, fold: Fold) -> str:
    """Of a fold's consumers, one that reads all tokens, if one does: experts read only their own."""
    inside = tuple(name + "." for name, module in block.module.named_modules() if isinstance(module, Experts))
    return next((name for name in fold.consumers if not name.startswith(inside)), fold.consumers[0])


def samples(block: Block, names: Collection[str]) -> dict[str, Tensor]:
    """What modules of a block read: up to `SAMPLE` tokens of all batches, float32 `[tokens, inputs]`.

    Modules that no token reached are missing.
    """
    share = -(-SAMPLE // block.batches)
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            seen.setdefault(name, []).append(x[:: -(-len(x) // share)].float() if len(x) else x.float())

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(block.module.get_submodule(name).register_forward_pre_hook(note(name)))
        for batch in range(block.batches):
            block.forward(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def move(block: Block, fold: Fold, scales: Tensor) -> None:
    """Multiply the inputs of a fold's products by `scales`, and divide what gives them."""
    for name, value in fold.moved(block.module, scales).items():
        owner = f"{block.name}.{name.rpartition('.')[0]}"
        if name.endswith(".weight") and owner in block.products:
            block.module.get_parameter(name).data = value  # is replaced anyway, once it is quantized
        else:
            block.assign(f"{block.name}.{name}", value)
