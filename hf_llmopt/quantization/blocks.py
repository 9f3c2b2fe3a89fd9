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

from ..errors import CalibrationFailed, about
from ..kernels.arguments import Grid
from ..kernels.reference import dequantize
from .finished import Finished, fingerprint
from .offload import resident
from .running import Reached, Runner
from .stages import Flow, Stage

ROUNDED = "rounded to nearest: too few tokens of the calibration set reach it"


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
        self, name: str, module: nn.Module, products: dict[str, nn.Module], run: Runner, fallback: Fallback
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
        self._came: dict[str, Tensor] = {}  # weights, before they were replaced

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
        if self._run.exact is not None:
            self._came.setdefault(name, module.weight.data)
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
    def observe(self, stage: Stage, see: Callable[[tuple[str, ...], Tensor, Tensor | None], None]) -> None:
        """Show what the products of a stage read, of all samples.

        Args:
            stage: One of `stages`.
            see: Called with the names of products that read the same tensor, the tensor, `[tokens, inputs]`, and what
                they read of the same tokens in the model as it came; `None` where that is not kept, or where products
                read other tokens there, as experts do.
        """
        for batch in range(self.batches):
            exact = {}
            if self._run.exact is not None:
                with self._as_it_came():
                    exact = self._reads(stage, batch, exact=True)
            tokens = self.inputs(batch).shape[:-1].numel()
            for names, x in self._reads(stage, batch).items():
                there = exact.get(names)
                see(names, x, there if there is not None and len(there) == len(x) == tokens else None)

    def _reads(self, stage: Stage, batch: int, exact: bool = False) -> dict[tuple[str, ...], Tensor]:
        found: dict[tuple[str, ...], list[Tensor]] = {}

        def watch(names: tuple[str, ...]) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found.setdefault(names, []).append(args[0].flatten(0, -2))
                if len(found) == len(stage):  # the rest of the block is not needed
                    raise Reached(args[0])

            return hook

        with ExitStack() as stack:
            for names in stage:
                stack.enter_context(self.products[names[0]].register_forward_pre_hook(watch(names)))
            self._run(batch, exact=exact)
        return {names: torch.cat(parts) for names, parts in found.items()}

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to what the next block reads."""
        self._run.advance()
        if self._run.exact is not None:
            with self._as_it_came():
                self._run.advance(exact=True)
        self._came.clear()

    @contextmanager
    def _as_it_came(self) -> Iterator[None]:
        products: dict[str, Any] = {name: self.products[name] for name in self._came}
        now = {name: module.weight.data for name, module in products.items()}
        try:
            for name, module in products.items():
                module.weight.data = self._came[name]
            yield
        finally:
            for name, module in products.items():
                module.weight.data = now[name]


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
    exact: bool = False,
    progress: bool = True,
    notes: dict[str, str] | None = None,
) -> Iterator[tuple[str, Grid]]:
    """Quantize the products of a model, one block after another, on calibration samples.

    Each block is quantized while it reads what the quantized blocks before it made. A block's grids are yielded as soon
    as it is done, so that its modules can be exchanged at once. If they stay they hold the rounded weights, unless they
    are offloaded. A block that fails is left as it came.

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
        exact: Keep beside what the blocks read what they read in the model as it came, and each block's weights until
            it is done, so that `Block.observe` can show both. For methods that change no other parameters.
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
        run = Runner(model, blocks, tokens, exact)
        for index in logging.tqdm(range(len(blocks)), desc="Quantizing blocks", disable=not progress):
            name = f"{prefix}.{index}"
            products = {key: module for key, module in chosen.items() if key.startswith(f"{name}.")}
            run.index = index
            with resident(blocks[index], without=products.values()), _whole(name, blocks[index]):
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
                block.advance()
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
            f"llmopt: too few tokens of the calibration set reach {len(rounded)} product(s) to calibrate them; they "
            f"were rounded to nearest: {', '.join(rounded[:3])}{', …' if len(rounded) > 3 else ''}. More samples help; "
            "model.llmopt.quantization.notes lists all.",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def _whole(name: str, block: nn.Module) -> Iterator[None]:
    """Who fails in a block leaves its parameters as they came, and says which block it was."""
    came = {parameter: parameter.data for parameter in block.parameters()}
    try:
        with about(name):
            yield
    except BaseException:
        for parameter, data in came.items():
            parameter.data = data
        raise


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
