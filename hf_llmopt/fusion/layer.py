"""A whole decoder layer as one call into C, in the place of the eager one.

Which structure a layer has is found by watching it; if none gives its own result, it stays eager. Layers that differ
only in their weights are watched once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention import StepInputs, current_step
from ..attention.inputs import CPU
from ..errors import UnsupportedModel
from ..kernels import cpu
from ..kernels.arguments import Layer, Seen, Stage, Turns
from .kinds import inside
from .proved import Proofs, Proved
from .structure import Candidate, Structure

APART = (
    "The model changed its hidden states between two decoder layers that were joined, or left one out. They are apart "
    "from now on, and the pass can be run again."
)


def in_c(
    structure: Structure, bound: Layer, layer: int, x: Tensor, step: StepInputs, turns: tuple[Tensor, Tensor] | None
) -> Tensor:
    """As `Compute`."""
    how = structure.turns(step.slots(layer, CPU), turns)
    return cpu.layers(x, [Stage(bound, step.seen(layer, structure.scaling, structure.softcap), how, structure.heads)])


class Joined(Proved):
    """A decoder layer in C.

    Where a pass has shown that the next layer reads what this one gives, both run in one call of the pass that
    follows: the next one's turn then only hands on what it is given.

    Args:
        layer: The eager layer.
        found: From `recognise`.
        proofs: Those of the model.
        before: The layer before it.
    """

    compute = staticmethod(in_c)

    def __init__(self, layer: nn.Module, found: Candidate, proofs: Proofs, before: Joined | None) -> None:
        super().__init__(layer, found, proofs)
        self._before = before
        self._next: Joined | None = None
        self._apart = False  # something was done to what the layer before gives
        self._told: tuple[int | float, ...] | None = None  # weights that move are seen by `Fusion.refresh`
        self._order: int = 0 if before is None else before._order + 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer on `[1, tokens, hidden]`; the eager layer where C does not serve."""
        step: Any = current_step(self.found.config) if inside.now else None
        turns = kwargs.get("position_embeddings")
        if not isinstance(step, StepInputs) or step.watched or not self._serves(args, turns):
            return self._eager(*args, **kwargs)
        hidden_states: Tensor = args[0]
        ahead: _Ahead | None = step.ahead
        follows = ahead is not None and ahead.is_read(hidden_states, turns)
        if ahead is not None and self._order <= ahead.last._order:
            if not follows or self._before is not ahead.reached:
                self._part()
                raise UnsupportedModel(APART)
            ahead.reached = self
            return hidden_states
        if self._structure(hidden_states, kwargs) is None:
            return self._eager(hidden_states, **kwargs)
        if self._before is not None:
            joined = follows and ahead is not None and ahead.last is self._before and not self._apart
            self._before._next = self if joined else None
        known: dict[Any, tuple[Seen, Turns]] = {}
        stages, last = [self._stage(step, turns, known)], self
        while last._next is not None and last._next.found.limit >= hidden_states.shape[1]:
            last = last._next
            stages.append(last._stage(step, turns, known))
        step.note("cpu")
        x = hidden_states[0]
        gave = cpu.layers(x if x.is_contiguous() else x.contiguous(), stages)[None]
        step.ahead = _Ahead(gave, _version(gave), turns, self, last)
        return gave

    def keep_apart(self) -> None:
        """Never run in one call with the layer before: somebody wants to see what that gives."""
        self._apart = True
        if self._before is not None:
            self._before._next = None

    def _part(self) -> None:
        """Join the layers that ran together never again."""
        first = self
        while first._before is not None and first._before._next is first:
            first = first._before
        layer: Joined | None = first
        while layer is not None:
            layer._apart = True
            layer._next, layer = None, layer._next

    def _stage(self, step: StepInputs, turns: Any, known: dict[Any, tuple[Seen, Turns]]) -> Stage:
        """This layer of a pass; `known` is what layers of a structure and a cache group share but for their pages."""
        structure, layer, store = self._proofs.structures[self._signature], self.found.layer, step.store
        assert structure is not None
        if self._told is None:
            self._told = cpu.layer_numbers(self._bind(structure))
        key = id(structure), store.group_of[layer]
        if key not in known:
            seen = step.seen(layer, structure.scaling, structure.softcap)
            known[key] = seen, structure.turns(step.slots(layer, CPU), turns)
        seen, how = known[key]
        seen = seen._replace(keys=store.keys[layer], values=store.values[layer])
        return Stage(self._bind(structure), seen, how, structure.heads, self._told)


@dataclass
class _Ahead:
    """What layers of a pass have computed in one call.

    Attributes:
        gave: The result of the last of them.
        version: How often that was written to.
        turns: Cosine and sine.
        reached: The layer whose turn came last.
        last: The last layer of the call.
    """

    gave: Tensor
    version: int
    turns: Any
    reached: Joined
    last: Joined

    def is_read(self, hidden_states: Tensor, turns: Any) -> bool:
        """Whether the next layer reads just this: the same tensor, not written to since."""
        return hidden_states is self.gave and turns is self.turns and _version(hidden_states) == self.version

    def close(self) -> None:
        """The pass is over: every layer of the call must have had its turn.

        Raises:
            UnsupportedModel: The model left some out.
        """
        if self.reached is not self.last:
            self.last._part()
            raise UnsupportedModel(APART)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not say."""
    return 0 if tensor.is_inference() else tensor._version
