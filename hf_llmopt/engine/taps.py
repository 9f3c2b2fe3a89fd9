"""Hidden states of a pass, for a drafter that reads them: every token's, as they are computed.

`output_hidden_states` would keep those of all layers, and forward hooks would leave the fused path. Here the layers
that are read have another `forward` for the time of a pass, which looks at what it is given. Layers that run in one
call are parted there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..fusion import Joined, Replacement
from ..speculative.eagle.follower import Seen
from .request import Request

Observe = Callable[[Sequence[Seen], Sequence[Tensor]], None]
Move = Callable[[Request, Sequence[tuple[int, int]]], None]


class Taps:
    """Hands out hidden states.

    Args:
        model: Whose.
        layers: How many it has.
        needs: Which are wanted: indices of transformers' `hidden_states`, 0 for what the first layer reads, `layers`
            for what the head reads.
        observe: Called after each pass with the spans of requests that may draft and their states, one
            `[tokens, hidden]` for each of `needs`.
        move: Called with a request and those of its tokens, from and to, that stand at other places since.

    Raises:
        UnsupportedModel: The model's layers cannot be found.
    """

    def __init__(self, model: PreTrainedModel, layers: int, needs: Sequence[int], observe: Observe, move: Move) -> None:
        self._needs, self._observe, self.move = needs, observe, move
        self._points: list[tuple[int, nn.Module]] = []
        stack = _decoder_layers(model, layers)
        for index in sorted(set(needs)):
            point = model.base_model if index == layers else stack[index] if stack else model
            if point is model:
                raise UnsupportedModel(f"{type(model).__name__}: its {layers} decoder layers cannot be found.")
            self._points.append((index, point))
        self._last = layers
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Look at what passes inside the block, in this thread; after replaced modules have come in."""
        self._found = {}
        thread = get_ident()
        former: list[tuple[dict[str, Any], Any]] = []
        try:
            for index, module in self._points:
                forward = module.__dict__.get("forward")
                if isinstance(forward, Replacement) and isinstance(forward.forward, Joined):
                    forward.forward.keep_apart()
                former.append((module.__dict__, forward))
                seen = partial(self._see, index, thread, module.forward)
                module.__dict__["forward"] = Replacement(module, seen)
            yield
        finally:
            for attributes, forward in reversed(former):
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward

    def _see(self, index: int, thread: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread:  # a plain forward
            return forward(*args, **kwargs)
        if index < self._last:
            self._found[index] = args[0] if args else kwargs["hidden_states"]
            return forward(*args, **kwargs)
        gave = forward(*args, **kwargs)
        self._found[index] = gave[0]
        return gave

    def hand_out(self, spans: Sequence[tuple[Request, int]]) -> None:
        """Show what was found in a pass over these spans; whoever fails over it sees nothing more."""
        offset, seen, places = 0, [], list[slice]()
        for request, length in spans:
            if request.most_drafts is not None:
                known = len(request.tokens) - request.drafted - request.masked_tail - 1
                seen.append(Seen(request, request.computed, length, known))
                places.append(slice(offset, offset + length))
            offset += length
        if not seen or not self._points:
            return
        try:
            whole = [self._found[index][0] for index in self._needs]
            if len(seen) < len(spans):
                whole = [torch.cat([state[place] for place in places]) for state in whole]
            self._observe(seen, whole)
        except Exception as error:  # the pass itself went well: whoever generates can do without drafts
            self._points = []
            warnings.warn(f"llmopt: hidden states are not read any more: {type(error).__name__}: {error}", stacklevel=2)
        finally:
            self._found = {}


def _decoder_layers(model: PreTrainedModel, count: int) -> nn.ModuleList | None:
    """The list of the model's layers: each holds the attention of its index."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            own = [[m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")] for layer in stack]
            if [set(indices) for indices in own] == [{index} for index in range(count)]:
                return stack
    return None
