"""A whole decoder layer as about ten launches on a GPU, in the place of the eager one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Call, StepInputs, current_step
from ..attention.gpu import why_not
from ..kernels.arguments import Layer, Turns
from .kinds import inside
from .proved import Proofs, Proved
from .sharded import Reduce, Share
from .structure import ROTATIONS, Candidate, Structure

LAUNCHES = {"cuda"}  # types of devices on which layers are launched


def launches(device: torch.device) -> bool:
    """Whether layers on a device are replaced by launches of Triton kernels."""
    return device.type in LAUNCHES and why_not(device) is None


def by_launches(
    structure: Structure,
    bound: Layer,
    layer: int,
    x: Tensor,
    step: StepInputs,
    turns: tuple[Tensor, Tensor] | None,
    reduce: Reduce | None = None,
) -> Tensor:
    """As `Compute`; `reduce` as in the kernels' `layer`."""
    from ..kernels.triton import layer as kernels  # Triton may be missing where nothing is launched
    from ..kernels.triton.rotary import Pages

    store, slots = step.store, step.slots(layer, x.device)
    how = Turns(None, None, slots)
    if structure.rotation != "none" and turns is not None:
        cosine, sine = (part[0].contiguous() for part in turns)
        how = Turns(cosine, sine, slots, ROTATIONS.index(structure.rotation))
    keys, values = store.keys[layer], store.values[layer]
    pages = Pages(keys, values) if store.layers[layer].form is None else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if pages is None:
            store.write(layer, slots, key, value)
        else:
            store.written(layer)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        call = Call(layer, query, key, value, structure.scaling, structure.softcap, None)
        return step.attend(step, call)[0].flatten(1)

    return kernels.layer(x, bound, structure.heads, store.layers[layer].shape, how, pages, attend, reduce)


class Launched(Proved):
    """A decoder layer on a GPU; the eager layer where ours does not serve.

    Args:
        layer: The eager layer.
        found: From `recognise`.
        proofs: Those of the model.
        share: What of the layer this process computes, if it is sharded.
    """

    compute = staticmethod(by_launches)

    def __init__(self, layer: nn.Module, found: Candidate, proofs: Proofs, share: Share | None) -> None:
        super().__init__(layer if share is None else share.layer, found, proofs)
        self._eager = layer.forward
        self._share = share

    def _structure(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Structure | None:
        found = super()._structure(hidden_states, kwargs)
        if found is None or self._share is None or found.last() == self._share.parts:
            return found
        self._proofs.structures[self._signature] = None  # sums elsewhere than before the residual
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer on `[1, tokens, hidden]`."""
        step: Any = current_step(self.found.config) if inside.now else None
        turns = kwargs.get("position_embeddings")
        if not isinstance(step, StepInputs) or not self._serves(args, turns):
            return self._eager(*args, **kwargs)
        structure = self._structure(args[0], kwargs)
        if structure is None:
            return self._eager(*args, **kwargs)
        x = args[0][0]
        x = x if x.is_contiguous() else x.contiguous()
        reduce = None if self._share is None else self._share.reduce
        return by_launches(structure, self._bind(structure), self.found.layer, x, step, turns, reduce)[None]
