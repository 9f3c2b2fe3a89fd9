"""A decoder layer of which each process has a share, by transformers' tensor parallel: what this process computes.

Products of the first kind (`colwise`) give this process's heads and neurons. Products of the second kind (`rowwise`)
read those, and give a part of a sum over all processes (Megatron-LM, Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import getclosurevars
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..walk import sharded_forward

Reduce = Callable[[Tensor], Tensor]


class Share(NamedTuple):
    """This process's share of a layer.

    Attributes:
        layer: A copy of it with the shares of its weights, which runs its classes' code and no collective operation.
        parts: Names of the products that give a part of a sum.
        reduce: The sum; called by all processes, it may overwrite what it is given.
    """

    layer: nn.Module
    parts: frozenset[str]
    reduce: Reduce


def share_of(layer: nn.Module) -> Share | None:
    """The share of a sharded layer; `None` if it is not sharded, or in a way that is not known.

    Example:
        >>> share_of(nn.Linear(2, 2)) is None
        True
    """
    sharded = {name: module for name, module in layer.named_modules() if "forward" in vars(module)}
    if not sharded or isinstance(layer, (PreTrainedModel, nn.ModuleList)):
        return None
    kinds = {name: _kind(module) for name, module in sharded.items()}
    meshes = {sharded[name].weight.device_mesh for name, kind in kinds.items() if kind not in (None, "alike")}
    if None in kinds.values() or len(meshes) != 1:
        return None
    group = meshes.pop().get_group()
    # What cannot be seen through is shared with the layer.
    known: dict[int, Any] = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    for module in layer.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                known[id(tensor)] = _local(tensor)
    parts = frozenset(name for name, kind in kinds.items() if kind == "rowwise")
    for name in parts:  # a bias belongs to the sum, not to each part of it
        bias: Any = sharded[name].bias
        if bias is not None and group.rank():
            known[id(bias)] = nn.Parameter(torch.zeros_like(_local(bias)), requires_grad=False)
    own = copy.deepcopy(layer, known)
    for name in sharded:
        del vars(own.get_submodule(name))["forward"]

    def reduce(part: Tensor) -> Tensor:
        dist.all_reduce(part, group=group)
        return part

    return Share(own, parts, reduce)


def _kind(module: Any) -> str | None:
    """How transformers shards a module: `"colwise"`, `"rowwise"`, or `"alike"` on all processes; else `None`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # takes a while to import, and few need it
    from transformers.distributed import tensor_parallel

    forward = sharded_forward(module)
    if forward is None:
        return None
    if forward.__qualname__.startswith(tensor_parallel.ReplicatedWithGradAllReduce.__name__):
        return "alike"
    style: Any = getclosurevars(forward).nonlocals.get("self")
    if type(module) is not nn.Linear or type(module.weight) is not DTensor:
        return None
    colwise = type(style) is tensor_parallel.ColwiseParallel and module.weight.placements == (Shard(0),)
    if colwise and style.input_layouts == Replicate() and style.output_layouts == Shard(-1):
        return "colwise"
    rowwise = type(style) is tensor_parallel.RowwiseParallel and module.weight.placements == (Shard(1),)
    if rowwise and style.input_layouts == Shard(-1) and style.output_layouts == Replicate():
        return "rowwise"
    return None


def _local(tensor: Any) -> Tensor:
    """The part of a tensor that lies here."""
    local = tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor
    return nn.Parameter(local, requires_grad=False) if isinstance(tensor, nn.Parameter) else local
