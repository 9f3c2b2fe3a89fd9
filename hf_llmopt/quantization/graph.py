"""Which operation feeds which products of a decoder block, so that factors can move from one to the other.

A product's inputs may be multiplied by `s` if what makes them is divided by `s`: the weight of the norm before it, or
the rows of a product whose outputs reach it multiplied by something else only (values through attention to the output
product, the up product through the gate to the down product). Which of a block's operations stand so to one another is
found by watching it: a float32 copy with random weights runs on random input. A norm's readers are the modules that
read the tensor that it gives. What a product feeds shows when each of its outputs is multiplied by another factor: the
inputs that are multiples of one output, on all tokens, have its factor. Every fold is then tried; one that changes
what the block gives is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import Experts

TOKENS = 8
ROWS = 4
BOUND = 1e-4  # of the largest value: what order and rounding of float32 sums may change


@dataclass(frozen=True)
class Fold:
    """Products with common inputs, and what gives these.

    Attributes:
        producer: Name of the norm or product.
        consumers: Names of the products that read it, and of routers.
        index: Output of the producer of which each input is a multiple, int64 `[inputs]`. Inputs of several query heads
            that share a key-value head have the same.
        offset: What the producer adds to its weight: 1 in the norms of Gemma.
    """

    producer: str
    consumers: tuple[str, ...]
    index: Tensor
    offset: float = 0.0

    def shared(self, values: Tensor) -> Tensor:
        """The mean of `values` `[inputs]` over the inputs that must have one factor, at each of them."""
        index = self.index.to(values.device)
        size = int(index.max()) + 1
        sums = values.new_zeros(size).index_add_(0, index, values)
        counts = values.new_zeros(size).index_add_(0, index, torch.ones_like(values))
        return (sums / counts.clamp_min(1))[index]

    @torch.no_grad()
    def moved(self, block: nn.Module, scales: Tensor) -> dict[str, Tensor]:
        """New values of a block's parameters, by name: inputs multiplied by `scales`, what gives them divided.

        Args:
            block: The block, which is not changed.
            scales: `[inputs]`; those of inputs that share an output are equal.

        Returns:
            Computed in float32, and rounded to each parameter's format.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> block = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3))
            >>> fold, x = Fold("0", ("1",), torch.arange(2)), torch.randn(4, 2)
            >>> moved = fold.moved(block, torch.tensor([2.0, 0.5]))
            >>> sorted(moved)
            ['0.bias', '0.weight', '1.weight']
            >>> torch.allclose(torch.func.functional_call(block, moved, x), block(x), atol=1e-5)
            True
        """
        producer: Any = block.get_submodule(self.producer)
        weight = producer.weight
        divisor = torch.ones(weight.shape[-1 if isinstance(producer, Conv1D) else 0], device=weight.device)
        divisor[self.index.to(weight.device)] = scales.float().to(weight.device)
        along = divisor[:, None] if weight.dim() == 2 and not isinstance(producer, Conv1D) else divisor
        made = {f"{self.producer}.weight": ((weight.float() + self.offset) / along - self.offset).to(weight.dtype)}
        if getattr(producer, "bias", None) is not None:
            made[f"{self.producer}.bias"] = (producer.bias.float() / divisor).to(producer.bias.dtype)
        for name in self.consumers:
            consumer: Any = block.get_submodule(name)
            factor = scales.float().to(consumer.weight.device)
            factor = factor[:, None] if isinstance(consumer, Conv1D) else factor
            made[f"{name}.weight"] = (consumer.weight.float() * factor).to(consumer.weight.dtype)
        return made


class Graph(NamedTuple):
    """What a block's folds are.

    Attributes:
        folds: In the order in which the block computes their products.
        left: The products whose inputs no fold scales, and why.
    """

    folds: list[Fold]
    left: dict[str, str]


def find(block: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> Graph:
    """The folds of a block.

    Args:
        block: A decoder layer; experts are `Experts` already. Its weights are not read.
        hidden_states: What it reads, `[batch, tokens, hidden]`: for the shape only.
        kwargs: Further arguments of that call: masks, positions and the like.
        args: Those that are given by place.
    """
    try:
        trial = _Trial(block, hidden_states, kwargs, args)
        calls, gave = trial.run()
    except (RuntimeError, ValueError, IndexError):  # an argument that cannot be cut
        trial = _Trial(block, hidden_states, kwargs, args, whole=True)
        calls, gave = trial.run()
    found: list[list[Fold]] = []  # those of the experts of a layer together
    left: dict[str, str] = {}
    for group in [*_after_norms(trial, calls), *_after_products(trial, calls)]:
        error = trial.error(group, gave)
        if error <= BOUND:
            found.append(group)
            continue
        for name in (name for fold in group for name in fold.consumers):
            left[name] = f"a factor in {group[0].producer} changes more than this product"
    folds = [fold for group in found for fold in group]
    order = {name: place for place, name in enumerate([*calls, *trial.products])}
    folds.sort(key=lambda fold: min(order[name] for name in fold.consumers))
    fed = {name for fold in folds for name in fold.consumers}
    left = {n: left.get(n, "no norm or product with weights gives its inputs") for n in trial.products if n not in fed}
    return Graph(folds, left)


class _Call(NamedTuple):
    """What a module read and gave, once."""

    module: nn.Module
    read: Tensor
    gave: Tensor
    plain: bool  # it gave nothing else


class _Trial:
    """A float32 copy of a block, with weights and input of its own."""

    def __init__(
        self, block: nn.Module, like: Tensor, kwargs: dict[str, Any], args: tuple[Any, ...], whole: bool = False
    ) -> None:
        self.draw = torch.Generator("cpu").manual_seed(0)
        memo = {id(p): nn.Parameter(self.like(name, p), requires_grad=False) for name, p in block.named_parameters()}
        self.block = copy.deepcopy(block, memo).float().eval()
        batch, length, hidden = like.shape
        rows, tokens = (batch, length) if whole else (ROWS, min(length, TOKENS))
        self.x = self.normal(rows, tokens, hidden).to(like.device)
        self.kwargs = {n: value if whole else _short(value, batch, length, tokens) for n, value in kwargs.items()}
        self.args = tuple(value if whole else _short(value, batch, length, tokens) for value in args)
        self.kwargs |= {name: None for name in kwargs if name.startswith("past_key_value")}
        self.kwargs |= {name: False for name in kwargs if name == "use_cache"}
        owners = {name: m for name, m in self.block.named_modules() if name and any(True for _ in m.parameters(False))}
        self.products = {name: module for name, module in owners.items() if _is_product(module)}
        self.experts = {n: m for n, m in self.block.named_modules() if isinstance(m, Experts)}
        self.watched = owners | self.experts

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float32, device="cpu")

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Random values: of norms around 1, of biases around 0."""
        values = self.normal(*parameter.shape)
        if parameter.dim() < 2:
            values = 0.3 * values + (not name.endswith("bias"))
        else:
            values = values / parameter.shape[-1] ** 0.5
        return values.to(parameter.device)

    @torch.no_grad()
    def run(self) -> tuple[dict[str, _Call], Tensor]:
        """What each module read and gave, by name; and what the block gave. Modules called twice are left out."""
        calls: dict[str, _Call] = {}
        again: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, gave: Any) -> None:
                if name in calls:
                    again.add(name)
                calls[name] = _Call(module, _tensor((*args, *kwargs.values())), _tensor(gave), gave is _tensor(gave))

            return hook

        hooks = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in self.watched.items()]
        try:
            gave = _tensor(self.block(self.x, *self.args, **self.kwargs))
        finally:
            for hook in hooks:
                hook.remove()
        return {name: call for name, call in calls.items() if name not in again}, gave

    @torch.no_grad()
    def error(self, folds: list[Fold], gave: Tensor) -> float:
        """How far the block's result is off with folds of random scales, of its largest value."""
        drawn = [fold.shared(1 + self.normal(len(fold.index)).abs()) for fold in folds]
        moved: dict[str, Tensor] = {}
        for fold, scales in zip(folds, drawn, strict=True):
            moved |= fold.moved(self.block, scales)
        changed = torch.func.functional_call(self.block, moved, (self.x, *self.args), self.kwargs)
        return float((_tensor(changed) - gave).abs().max() / gave.abs().max())


def _after_norms(trial: _Trial, calls: dict[str, _Call]) -> Iterator[list[Fold]]:
    """For each norm whose result products read."""
    for name, call in calls.items():
        weight: Any = call.module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or len(weight) != call.gave.shape[-1]:
            continue
        readers = [other for other, c in calls.items() if other != name and _same(c.read, call.gave)]
        experts = [f"{n}.{e}.{part}" for n in readers if n in trial.experts for e in range(len(trial.experts[n]))
                   for part in trial.experts[n][e]._modules if part != "down_proj"]  # fmt: skip
        consumers = tuple(n for n in [*readers, *experts] if n in trial.products)
        if consumers:
            yield [Fold(name, tuple(dict.fromkeys(consumers)), torch.arange(len(weight)), _offset(call))]


def _after_products(trial: _Trial, calls: dict[str, _Call]) -> Iterator[list[Fold]]:
    """For each product whose outputs, or a half of them, reach another one as multiples."""
    order = [name for name in calls if name in trial.products]
    done: set[str] = set()
    for place, name in enumerate(order):
        if name in done or not calls[name].plain:
            continue
        alike = _alike(trial, name)
        done |= set(alike)
        outputs = calls[name].gave.shape[-1]
        behind = {other: calls[other].read.shape[-1] for other in order[place + 1 :]}
        halves = [slice(outputs // 2, outputs), slice(0, outputs // 2)] if outputs // 2 in behind.values() else []
        for rows in (slice(0, outputs), *halves):
            fed = _fed(trial, calls, name, rows, list(behind)) if behind else None
            consumers = [] if fed is None else _alike(trial, fed.consumers[0])
            if fed is not None and len(consumers) == len(alike):
                yield [Fold(producer, (other,), fed.index) for producer, other in zip(alike, consumers, strict=True)]
                break


def _fed(trial: _Trial, calls: dict[str, _Call], name: str, rows: slice, behind: list[str]) -> Fold | None:
    """The product that reads multiples of a product's outputs.

    Each output has a factor of its own, between 2 and 4, by which it is known again.
    """
    outputs = torch.arange(calls[name].gave.shape[-1])[rows]
    factors = torch.ones(calls[name].gave.shape[-1])
    factors[rows] = 2 ** (1 + torch.arange(len(outputs)) / max(len(outputs) - 1, 1))
    hook = calls[name].module.register_forward_hook(lambda m, a, gave: gave * factors.to(gave.device))
    try:
        after, _ = trial.run()
    finally:
        hook.remove()
    for other in behind:
        if other not in after or after[other].read.shape != calls[other].read.shape:
            continue
        before, now = (c[other].read.flatten(0, -2).cpu() for c in (calls, after))
        if torch.equal(before, now):
            continue
        index = _decode(before, now, len(outputs))
        if index is None and calls[other].read.dim() == 3:
            # The first token sees only itself: what queries and keys are has no effect there.
            before, now = (c[other].read[:, 0].cpu() for c in (calls, after))
            index = _decode(before, now, len(outputs))
        if index is not None:
            return Fold(name, (other,), outputs[index])
    return None


def _decode(before: Tensor, now: Tensor, outputs: int) -> Tensor | None:
    """Of which output each input `[tokens, inputs]` is a multiple; `None` if some are of none."""
    place = before.abs().argmax(dim=0, keepdim=True)
    ratio = (now.gather(0, place) / before.gather(0, place))[0]
    index = ((ratio.log2() - 1) * (outputs - 1)).nan_to_num(-1).round().long()
    if not bool(((index >= 0) & (index < outputs)).all()):
        return None
    factor = 2 ** (1 + index / max(outputs - 1, 1))
    off = (now - before * factor).abs().amax(dim=0)
    return index if bool((off <= 10 * BOUND * before.abs().amax(dim=0)).all()) else None


def _alike(trial: _Trial, name: str) -> list[str]:
    """A product's name, or those of the same product in all experts of its layer."""
    for of, experts in trial.experts.items():
        if name.startswith(of + "."):
            part = name.removeprefix(of + ".").partition(".")[2]
            return [f"{of}.{expert}.{part}" for expert in range(len(experts))]
    return [name]


@torch.no_grad()
def _offset(norm: _Call) -> float:
    """What a norm adds to its weight: 1 or 0."""
    weight: Any = norm.module.weight
    bias: Any = getattr(norm.module, "bias", None)
    was = weight.clone()
    weight.fill_(-1.0)
    gave = norm.module(norm.read) - (0 if bias is None else bias)
    weight.copy_(was)
    return 1.0 if float(gave.abs().max()) < 1e-6 else 0.0


def _is_product(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and torch.equal(a.flatten(), b.flatten())


def _tensor(value: Any) -> Tensor:
    """The first tensor of what a module is given or gives."""
    if isinstance(value, Tensor):
        return value
    return next(part for part in value if isinstance(part, Tensor))


def _short(value: Any, batch: int, length: int, tokens: int) -> Any:
    """An argument for one row of the first tokens, which stands for all rows; in float32 if it is in half precision."""
    if isinstance(value, (tuple, list)):
        return tuple(_short(part, batch, length, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    value = value.float() if value.is_floating_point() else value
    for axis in {1: (0,), 2: (1,), 3: (1,), 4: (2, 3)}.get(value.dim(), ()):
        if value.shape[axis] == length:
            value = value.narrow(axis, 0, tokens)
    return value[:1] if value.dim() > 1 and value.shape[0] == batch else value
