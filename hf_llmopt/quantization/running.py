"""Runs one block of a model on calibration samples, inside the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CalibrationFailed

BATCH = 4096  # tokens that run through a block at once


class Reached(Exception):
    """Ends a forward pass once what was wanted is there."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Runner:
    """Runs block `index` on batches of samples, whose hidden states before it are kept on the CPU.

    Attributes:
        index: Of the block.
        hidden: What it reads, of each batch `[samples, length, hidden]`.
        exact: What it reads in the model as it came; `None` if nobody wants to know.
    """

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, exact: bool = False) -> None:
        self.index = 0
        self._model = model
        self._blocks = blocks
        self._tuples: dict[int, int] = {}  # how many values a block returns, where it returns a tuple
        self._tokens = tokens.split(max(1, BATCH // tokens.shape[1]))
        with torch.no_grad():
            self.hidden = [
                self._reach(ids, lambda forward, args, kwargs: _first(args, kwargs)).cpu() for ids in self._tokens
            ]
        self.exact = list(self.hidden) if exact else None

    def __call__(self, batch: int, first: int | None = None, exact: bool = False) -> Tensor:
        """The block's output for a batch, or its `first` samples; under `enable_grad`, as a function of the input."""
        before = self._before(exact)[batch][:first]

        def call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden = before.to(_first(args, kwargs).device)
            if torch.is_grad_enabled():
                hidden.requires_grad_()
            output = forward(hidden, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": hidden})
            if isinstance(output, tuple):
                self._tuples[self.index] = len(output)
                return output[0]
            return output

        return self._reach(self._tokens[batch][:first], call)

    @torch.no_grad()
    def advance(self, exact: bool = False) -> None:
        """Replace the hidden states by what the block makes of them."""
        if self.index + 1 < len(self._blocks):
            before = self._before(exact)
            for batch in range(len(before)):
                before[batch] = self(batch, exact=exact).cpu()

    def _before(self, exact: bool) -> list[Tensor]:
        return self.exact if exact and self.exact is not None else self.hidden

    def _reach(self, ids: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """Run the model up to block `index`, skipping those before; `call` gets its forward and arguments."""
        block = self._blocks[self.index]
        forward = block.forward
        embeddings: Any = self._model.get_input_embeddings()
        device: torch.device = embeddings.weight.device  # meta: offloaded, and its hook takes ids from anywhere

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise Reached(call(forward, args, kwargs))

        def skip(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, values = _first(args, kwargs), self._tuples.get(index)
                return hidden if values is None else (hidden, *[None] * (values - 1))

            return forward

        with ExitStack() as stack:
            for index in range(self.index):
                stack.enter_context(_patched(self._blocks[index], skip(index)))
            stack.enter_context(_patched(block, stop))
            try:
                self._model(input_ids=ids if device.type == "meta" else ids.to(device), use_cache=False)
            except Reached as reached:
                return reached.value
            except Exception as error:
                raise CalibrationFailed(
                    f"Block {self.index} of {type(self._model).__name__} cannot be run by itself on the calibration "
                    f"set: {type(error).__name__}: {error}"
                ) from error
        raise CalibrationFailed(f"{type(self._model).__name__} does not call block {self.index} of its list.")


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward` for a while; accelerate may have given it one already."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
