"""Which products of a block depend on which, found from the data that flows, not from names.

Products that do not depend on one another form a stage; GPTQ rounds stage after stage, each with inputs that the stages
before it, already rounded, made ("true sequential"). In a Llama block: query, key and value; output; gate and up; down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Stage = list[tuple[str, ...]]
"""Products that do not depend on one another; those that read the same tensor stand together."""


class Flow:
    """Which products a block called in one forward pass, what they read, and on which products that depended.

    Args:
        products: The modules to watch, by name.
    """

    def __init__(self, products: Mapping[str, nn.Module]) -> None:
        self.levels: dict[str, int] = {}  # how many products, one after another, a product waits for
        self.shared: dict[str, Any] = {}  # equal where two products read the same tensor
        self._products = products

    def trace(self, forward: Callable[[], object]) -> None:
        """Run a forward pass with gradients: the graph that torch keeps for them tells what depends on what."""
        inputs: dict[str, list[Tensor]] = {}  # kept, so that no memory is used for a second tensor
        made: dict[Any, str] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                inputs.setdefault(name, []).append(args[0])
                for y in output if isinstance(output, tuple) else (output,):  # routers return several
                    if y.grad_fn is not None:
                        made[y.grad_fn] = name

            return hook

        with ExitStack() as stack, torch.enable_grad():
            for name, module in self._products.items():
                stack.enter_context(module.register_forward_hook(watch(name)))
            forward()
        depths = _depths([x.grad_fn for xs in inputs.values() for x in xs if x.grad_fn is not None], made)
        for name, xs in inputs.items():
            level = max((depths[x.grad_fn] for x in xs if x.grad_fn is not None), default=0)
            self.levels[name] = max(self.levels.get(name, 0), level)
            self.shared.setdefault(name, [(x.data_ptr(), x.shape, x.stride(), x._version) for x in xs])

    def stages(self) -> list[Stage]:
        """The products that were called, in the order in which they can be rounded."""
        found: list[Stage] = []
        for level in sorted(set(self.levels.values())):
            readers: dict[str, list[str]] = {}
            for name in self._products:
                if self.levels.get(name) == level:
                    readers.setdefault(repr(self.shared[name]), []).append(name)
            found.append([tuple(names) for names in readers.values()])
        return found


def _depths(nodes: list[Any], made: Mapping[Any, str]) -> dict[Any, int]:
    """For nodes of an autograd graph, the most nodes of `made` on a way from them back to a leaf, themselves included.

    A walk with a stack of its own: the graph of a block with many experts is deeper than Python recurses.
    """
    depths: dict[Any, int] = {}
    stack = list(nodes)
    while stack:
        node = stack[-1]
        before = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in before if parent not in depths]
        if waiting and node not in depths:
            stack += waiting
            continue
        stack.pop()
        depths[node] = max((depths[parent] for parent in before), default=0) + (node in made)
    return depths
