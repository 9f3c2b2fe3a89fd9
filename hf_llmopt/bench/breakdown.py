"""Where the time of a decode step goes: the entry points of kernels, runner and sampling timed during one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hf_llmopt.engine.runner import Runner
from hf_llmopt.generation import Group
from hf_llmopt.kernels.cpu import ops

from .measure import Clock

PRODUCTS, ATTENTION, SMALL = "products", "attention", "small operations"
PYTHON, ENGINE, SAMPLING = "the model's Python", "engine", "sampling"
PARTS = (PRODUCTS, ATTENTION, SMALL, PYTHON, ENGINE, SAMPLING)
_MODEL = "model"  # counted as well: it holds the kernels

# Where no kernel of ours serves. GPT-2's products are `addmm`; torch's own small operations count as Python.
_TORCH = (
    (torch.nn.functional, "linear", PRODUCTS),
    (torch, "addmm", PRODUCTS),
    (torch.nn.functional, "scaled_dot_product_attention", ATTENTION),
)


@contextmanager
def instrumented() -> Iterator[dict[str, float]]:
    """Count the seconds inside kernels, torch's products and attention, the runner, the model and sampling.

    Gives the counts, which go on growing inside the block.
    """
    spent = dict.fromkeys((*PARTS, _MODEL), 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += perf_counter() - began

        return call

    def joined(kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Joined layers say themselves what they did; what they cannot see (making room, waking threads) is small."""

        def call(*args: Any) -> Any:
            began, before = perf_counter(), clock.tolist()
            try:
                return kernel(*args)
            finally:
                products, attention, _ = (b - a for a, b in zip(before, clock.tolist(), strict=True))
                spent[PRODUCTS] += products
                spent[ATTENTION] += attention
                spent[SMALL] += perf_counter() - began - products - attention

        return call

    run, extension = Runner.run, ops._C

    def run_timed(self: Runner, *args: Any, **kwargs: Any) -> Any:
        results, clocks = run(self, *args, **kwargs)
        spent[_MODEL] += sum(clock.seconds() or 0.0 for clock in clocks)
        return results, clocks

    class Kernels:
        """The extension, with every entry point timed."""

        def __getattr__(self, name: str) -> Any:
            kernel = getattr(extension, name)
            if name == "layers":
                function = joined(kernel)
            else:  # `argmax` is part of the group's sampling
                function = kernel if name == "argmax" else timed(_part(name), kernel)
            setattr(self, name, function)
            return function

    with ExitStack() as stack:
        for owner, name, part in _TORCH:
            stack.enter_context(_exchanged(owner, name, timed(part, getattr(owner, name))))
        stack.enter_context(_exchanged(Runner, "run", run_timed))
        stack.enter_context(_exchanged(Group, "advance", timed(SAMPLING, Group.advance)))
        if extension is not None:
            clock = stack.enter_context(ops.timing())
            stack.enter_context(_exchanged(ops, "_C", Kernels()))
        yield spent


def _part(kernel: str) -> str:
    if kernel.startswith("attention"):
        return ATTENTION
    return SMALL if kernel in ("norm", "activation") else PRODUCTS


@contextmanager
def _exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Marks(Clock):
    """A streamer that remembers what was spent when each step's tokens came.

    Args:
        spent: The counts of `instrumented`.
    """

    def __init__(self, spent: Mapping[str, float]) -> None:
        super().__init__()
        self.spent = spent
        self.marks: list[dict[str, float]] = []

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with every step's tokens."""
        super().put(value)
        self.marks.append(dict(self.spent))

    def parts(self) -> dict[str, float]:
        """Seconds of each part between the first and the last new token; together they are all of that time."""
        first, last = self.marks[1], self.marks[-1]
        found = {name: last[name] - first[name] for name in self.spent}
        found[PYTHON] = found[_MODEL] - found[PRODUCTS] - found[ATTENTION] - found[SMALL]
        found[ENGINE] = self.times[-1] - self.times[1] - found[_MODEL] - found[SAMPLING]
        return {part: found[part] for part in PARTS}
