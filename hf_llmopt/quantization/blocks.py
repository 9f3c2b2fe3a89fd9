"""The walk through a model, block by block: what calibration sees, in bounded memory.

Only one block's inputs, of all samples, are kept, and only one block's statistics live. A block is run inside the model
itself, whose other blocks are skipped: so it gets the masks, positions and whatever else its model hands to just this
block, and none of it is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import CalibrationFailed
from ..kernels.arguments import Grid
from ..kernels.reference import dequantize
from .finished import Finished, fingerprint
from .offload import resident
from .stages import Flow, Stage

ROUNDED = "rounded to nearest: too few tokens of the calibration set reach it"
BATCH = 4096  # tokens that run through a block at once


class Block:
    """One decoder block, and all calibration samples in front of it.

    Attributes:
        name: Of the block in the model.
        module: The block. Its products hold what `replace` wrote.
        products: The chosen `nn.Linear` and `Conv1D` in it, by their name in the model.
        stages: Products by what they depend on, see `stages.Stage`. Products that no sample reached are in none.
        batches: Into how many batches the samples are divided.
        assigned: Other tensors that were changed, by their name in the model.
        notes: Products for which the method could not do all that it does for others, and why.
    """

    def __init__(
        self, name: str, module: nn.Module, products: dict[str, nn.Module], run: _Runner, fallback: Fallback
    ) -> None:
        self.name = name
        self.module = module
        self.products = products
        self.assigned: dict[str, Tensor] = {}
        self.notes: dict[str, str] = {}
        self.stages: list[Stage] = []
        self.batches = len(run.hidden)
        self._run = run
        self._fallback = fallback

    def trace(self) -> None:
        """Find the stages: one sample is enough, but where experts choose their tokens."""
        flow = Flow(self.products)
        for batch in range(self.batches):
            flow.trace(lambda batch=batch: self._run(batch, first=1 if batch == 0 else None))  # type: ignore[misc]
            if len(flow.levels) == len(self.products):
                break
        self.stages = flow.stages()

    def weight(self, name: str) -> Tensor:
        """The weight of a product in float32, `[outputs, inputs]`."""
        module: Any = self.products[name]
        weight: Tensor = module.weight.detach().float()
        return weight.T if isinstance(module, Conv1D) else weight

    @torch.no_grad()
    def replace(self, name: str, grid: Grid) -> None:
        """From now on a product multiplies with what the grid stands for."""
        module: Any = self.products[name]
        near = dequantize(grid, module.weight.dtype).to(module.weight.device)
        module.weight.data = near.T.contiguous() if isinstance(module, Conv1D) else near

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Change another parameter of the block, as a norm's weight; a run that is resumed changes it too."""
        parameter = self.module.get_parameter(name.removeprefix(f"{self.name}."))
        parameter.data = value.to(parameter)
        self.assigned[name] = parameter.data

    def fall_back(self, name: str) -> Grid:
        """Round a product to nearest, as too few tokens reach it; the user is told."""
        self.notes[name] = ROUNDED
        return self._fallback(self.weight(name))

    def inputs(self, batch: int) -> Tensor:
        """What the block reads, `[samples, length, hidden]`, on the CPU."""
        return self._run.hidden[batch]

    @torch.no_grad()
    def forward(self, batch: int) -> Tensor:
        """What the block makes of a batch as it is now, `[samples, length, hidden]`, on its device."""
        return self._run(batch)

    @torch.no_grad()
    def observe(self, stage: Stage, see: Callable[[tuple[str, ...], Tensor], None]) -> None:
        """Show what the products of a stage read, of all samples.

        Args:
            stage: One of `stages`.
            see: Called with the names of products that read the same tensor, and the tensor, `[tokens, inputs]`.
        """
        for batch in range(self.batches):
            waiting = {names[0] for names in stage}

            def watch(names: tuple[str, ...], waiting: set[str] = waiting) -> Callable[..., None]:
                def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    see(names, args[0].flatten(0, -2))
                    waiting.discard(names[0])
                    if not waiting:  # the rest of the block is not needed
                        raise _Reached(args[0])

                return hook

            with ExitStack() as stack:
                for names in stage:
                    stack.enter_context(self.products[names[0]].register_forward_pre_hook(watch(names)))
                self._run(batch)


Method = Callable[[Block], Mapping[str, Grid]]
Fallback = Callable[[Tensor], Grid]


def quantize_blocks(
    model: PreTrainedModel,
    method: Method,
    fallback: Fallback,
    tokens: Tensor,
    chosen: Mapping[str, nn.Module],
    *,
    resume: str | Path | None = None,
    settings: str = "",
    progress: bool = True,
    notes: dict[str, str] | None = None,
) -> Iterator[tuple[str, Grid]]:
    """Quantize the products of a model, one block after another, on calibration samples.

    Each block is quantized while it reads what the quantized blocks before it made. A block's grids are yielded as soon
    as it is done, so that its modules can be exchanged at once. If they stay they hold the rounded weights, unless they
    are offloaded.

    Args:
        model: A causal language model, on one device, several, or offloaded by accelerate: then one block at a time is
            brought to its device.
        method: Gets a `Block` and returns a grid for each of its `products`. Written for each: `gptq.quantize_block`.
        fallback: Rounds a weight, float32 `[outputs, inputs]`, without samples: for products outside the blocks, and
            those that too few tokens reach. They are listed in a warning.
        tokens: Token ids, `[samples, length]`, as `calibration.pack` makes them.
        chosen: The modules to quantize by their name in the model, `nn.Linear` or `Conv1D`. Those whose grid was
            yielded may be removed from it, which frees them.
        resume: A folder for the grids of blocks that are done. A second run with the same model, settings and tokens
            finds them, and returns the same grids bit for bit. They are removed once all blocks are done.
        settings: Whatever else decides about the grids: everything that `method` was told.
        progress: Show a bar, unless `transformers.utils.logging` switched bars off.
        notes: Gets the blocks' `Block.notes`.

    Yields:
        Each chosen name once, with its grid.

    Raises:
        CalibrationFailed: The model has no list of blocks, or a block cannot be run.
    """
    prefix, blocks = find_blocks(model, chosen)
    finished = None if resume is None else Finished(resume, fingerprint(model, tokens, chosen, settings))
    notes = {} if notes is None else notes
    training = model.training
    model.eval()
    try:
        run = _Runner(model, blocks, tokens)
        for index in logging.tqdm(range(len(blocks)), desc="Quantizing blocks", disable=not progress):
            name = f"{prefix}.{index}"
            products = {key: module for key, module in chosen.items() if key.startswith(f"{name}.")}
            run.index = index
            with resident(blocks[index], without=products.values()):
                block = Block(name, blocks[index], products, run, fallback)
                found = finished.load(block) if finished else None
                if found is None:
                    block.trace()
                    found = dict(method(block))
                    found |= {key: block.fall_back(key) for key in products if key not in found}
                    if finished:
                        finished.save(block, found)
                for key, grid in found.items():
                    block.replace(key, grid)
                run.advance()
            notes |= block.notes
            yield from found.items()
    finally:
        model.train(training)
    for key, module in list(chosen.items()):
        if not key.startswith(f"{prefix}."):
            with resident(module, without=[module]):
                outside = Block(key, module, {key: module}, run, fallback)
                grid = outside.fall_back(key)
                outside.replace(key, grid)
            notes |= outside.notes
            yield key, grid
    if finished:
        finished.clear()
    rounded = [name for name, why in notes.items() if why == ROUNDED]
    if rounded:
        warnings.warn(
            f"llmopt: too few tokens of the calibration set reach {len(rounded)} products to calibrate them; they were "
            f"rounded to nearest: {', '.join(rounded)}.",
            UserWarning,
            stacklevel=2,
        )


def find_blocks(model: nn.Module, chosen: Mapping[str, nn.Module]) -> tuple[str, nn.ModuleList]:
    """The list of a model's decoder blocks, and its name: of the outermost lists, the one with most chosen modules.

    Raises:
        CalibrationFailed: There is none.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
        >>> find_blocks(model, {"layers.0": model["layers"][0]})[0]
        'layers'
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    held = {name: sum(key.startswith(f"{name}.") for key in chosen) for name in outer}
    best = max(outer, key=lambda name: held[name], default="")
    if not held.get(best):
        raise CalibrationFailed(
            f"{type(model).__name__} has no nn.ModuleList of blocks that hold modules to quantize, so it cannot be "
            'calibrated block by block. Use a method without calibration: "int4" or "int8".'
        )
    return best, lists[best]


class _Reached(Exception):
    """Ends a forward pass once what was wanted is there."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Runner:
    """Runs block `index` on batches of samples, whose hidden states before it are kept on the CPU."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> None:
        self.index = 0
        self._model = model
        self._blocks = blocks
        self._tuples: dict[int, int] = {}  # how many values a block returns, where it returns a tuple
        self._tokens = tokens.split(max(1, BATCH // tokens.shape[1]))
        with torch.no_grad():
            self.hidden = [
                self._reach(ids, lambda forward, args, kwargs: _first(args, kwargs)).cpu() for ids in self._tokens
            ]

    def __call__(self, batch: int, first: int | None = None) -> Tensor:
        """The block's output for a batch, or its `first` samples; under `enable_grad`, as a function of the input."""

        def call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden = self.hidden[batch][:first].to(_first(args, kwargs).device)
            if torch.is_grad_enabled():
                hidden.requires_grad_()
            output = forward(hidden, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": hidden})
            if isinstance(output, tuple):
                self._tuples[self.index] = len(output)
                return output[0]
            return output

        return self._reach(self._tokens[batch][:first], call)

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by what the block makes of them."""
        if self.index + 1 < len(self._blocks):
            for batch in range(len(self.hidden)):
                self.hidden[batch] = self(batch).cpu()

    def _reach(self, ids: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """Run the model up to block `index`, skipping those before; `call` gets its forward and arguments."""
        block = self._blocks[self.index]
        forward = block.forward
        embeddings: Any = self._model.get_input_embeddings()
        device: torch.device = embeddings.weight.device  # meta: offloaded, and its hook takes ids from anywhere

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(call(forward, args, kwargs))

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
            except _Reached as reached:
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
