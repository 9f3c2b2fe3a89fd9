"""Which modules of a model our kernels can stand in for, and how they enter and leave them.

A replacement is a `forward` of the instance, set before a step and taken out after it: the model's modules,
parameters and
`state_dict` stay what they are. A module is recognised by its structure and then has to prove itself: its replacement
must give the eager module's result on random input as exactly as the eager module gives the true one. A module that
carries a hook, an adapter or another quantizer is left alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..kernels import cpu
from ..kernels.cpu import BlockedWeight, own_products
from ..kv_cache import LayerSpec
from ..quantization import QuantizedHead, QuantizedLinear
from ..walk import modules, running
from .choice import ROWS, own_rows
from .head import Screened, ScreenedOnGPU
from .kinds import (
    PRODUCTS,
    RECOGNISERS,
    Forward,
    Rows,
    inside,
    is_library_code,
    is_plain,
    plain_linear,
    quantized_linear,
)
from .launched import Launched, launches
from .layer import Joined
from .proved import Proofs, Proved
from .sharded import share_of
from .structure import recognise

_users: Counter[int] = Counter()  # passes that run through a module, by the id of its attributes: models may share it
_passes = threading.Condition()  # guards `_users`, and is told when a pass has ended


class Replacement:
    """A `forward` of one module instance that copies and pickles as the module's own."""

    for_a_pass = True

    def __init__(self, module: nn.Module, forward: Callable[..., Any], eager: Callable[..., Any] | None = None) -> None:
        self.module = weakref.ref(module)
        self.forward = forward
        self.eager = eager  # for anything but one tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if self.eager is not None and (kwargs or len(args) != 1):
            return self.eager(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self.module()
        return _own_forward(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.module(),)


def _own_forward(module: Any) -> Any:
    return MethodType(type(module).forward, module)


class Fusion:
    """The replacements of one model.

    Args:
        model: A model on the CPU, where kernels in C replace modules and layers, or where layers are launched.
        specs: What each of its layers stores.
        layers: Join whole decoder layers, whose attention is then the C kernel's, or launch them.
        batch_invariant: Use our products for any number of rows, so that a row's result never depends on others.
        timed: Measure up to how many rows our products are faster; else dense ones stay torch's.

    Raises:
        UnsupportedModel: `batch_invariant` is asked for and the model has products that no kernel stands in for.

    Attributes:
        replaced: How many modules of each kind have a replacement.
        refused: How many were recognised but differed from their eager forward.
        head: The output head that can be asked for the best tokens only, or `None`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        specs: list[LayerSpec],
        layers: bool = True,
        batch_invariant: bool = False,
        timed: bool = True,
    ) -> None:
        self.specs = specs
        self.layers = layers
        self.launched = layers and launches(specs[0].device)
        self.batch_invariant = batch_invariant
        self.timed = timed
        self.replaced: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self._proofs = Proofs(specs, {})
        self._entries: list[tuple[dict[str, Any], Replacement]] = []
        self._outer = self._entries  # those that are not inside a joined layer
        self._limit = 0  # tokens up to which joined layers serve
        self._mark: tuple[object, ...] = ()
        self.head: Screened | None = None
        self._hooks = 0  # how many hooks torch had ever registered when the model was looked at
        self.refresh(model, running(model))

    def refresh(self, model: PreTrainedModel, now: tuple[object, ...]) -> bool:
        """Recognise the modules again if any was exchanged or hooked since, `now` being what runs; `True` if so."""
        self._hooks = RemovableHandle.next_id
        if self.head is not None:
            self.head.refresh()
        mark = (now, *map(_weights, modules(model)))
        if mark == self._mark:
            return False
        self._mark = ()  # a model that is refused is looked at again
        with _passes:
            if not inside.now:  # passes of other threads hold replacements in modules that models share
                _passes.wait_for(lambda: not any(_users[id(vars(module))] for module in modules(model)))
            self._recognise(model)
        self._mark = mark
        return True

    def _recognise(self, model: PreTrainedModel) -> None:
        self._entries, self.replaced, self.refused, self.head = [], {}, {}, None
        self._outer, self._limit = self._entries, 0
        if not (self.launched or cpu.available()) or _global_hooks():
            return self._require_all(model)
        rows = (lambda module: 1 << 30) if self.launched else self._rows(model)
        self._proofs, inner = Proofs(self.specs, {}), set[int]()
        last: Joined | None = None
        replacement: Proved
        # Who calls the layers may do anything with what they give, unless it is known code.
        foreign = {id(child) for m in model.modules() if not is_library_code(m) for child in m.modules()}
        for module in model.modules() if self.layers else ():
            known = is_plain(module) and id(module) not in foreign
            share = share_of(module) if known and self.launched else None
            own = module if share is None else share.layer
            found = self._try("decoder layer", recognise, own, rows) if known else None
            if found is not None:
                if self.launched:
                    replacement = Launched(module, found, self._proofs, share)
                else:
                    replacement = last = Joined(module, found, self._proofs, last)
                self._add(module, "decoder layer", replacement)
                self._limit = min(self._limit, found.limit) if inner else found.limit
                inner.update(id(child.__dict__) for child in module.modules() if child is not module)
        covered: set[nn.Module] = set()
        known = self.timed and is_plain(model) and is_library_code(model)  # nobody else sees what the head gives
        head = model.get_output_embeddings() if known else None
        for module in () if self.launched else model.modules():  # parents come before their children
            if module in covered or not is_plain(module):
                continue
            for kind, recognise_as in RECOGNISERS.items():
                found = self._try(kind, recognise_as, module, rows)
                if found is None:
                    continue
                forward, parts = found
                if not _proves(module, forward):
                    self.refused[kind] = self.refused.get(kind, 0) + 1
                    continue
                if module is head and Screened.takes(head):
                    forward = self.head = Screened(head, forward, rows(head))
                self._add(module, kind, forward)
                covered.update(parts)
                break
        if self.launched and head is not None and is_plain(head) and Screened.takes(head):
            self.head = ScreenedOnGPU(head, head.forward)
            self._entries.append((head.__dict__, Replacement(head, self.head, head.forward)))
        self._outer = [entry for entry in self._entries if id(entry[0]) not in inner]
        self._require_all(model)

    def describe(self) -> tuple[str, ...]:
        """What our kernels compute, and what was recognised but stays eager."""
        layers: list[Any] = [entry.forward for _, entry in self._entries if isinstance(entry.forward, Proved)]
        eager = sum(layer.is_eager for layer in layers)
        counts = {**self.replaced, "decoder layer": len(layers) - eager}
        lines = [f"{count} x {kind}" for kind, count in counts.items() if count]
        lines += [f"{count} x {kind}: refused, differs from eager" for kind, count in self.refused.items()]
        if eager:
            lines.append(f"{eager} x decoder layer: eager, no variant gave its result")
        if self.head is not None and self.head.copy is not None:
            lines.append(f"output head: best tokens found by an int8 copy of {self.head.copy.nbytes / 1e6:.0f} MB")
        return tuple(lines)

    def _require_all(self, model: PreTrainedModel) -> None:
        if not self.batch_invariant:
            return
        ours = {id(attributes) for attributes, _ in self._entries}
        replaced = {id(child) for m in model.modules() if id(m.__dict__) in ours for child in m.modules()}
        embeddings = {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads = {id(m) for m in model.modules() if isinstance(m, QuantizedHead) and cpu.available()}
        for name, module in model.named_modules():
            products = isinstance(module, QuantizedLinear) and not quantized_linear(module)
            products |= any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
            if products and id(module) not in replaced | embeddings | heads:
                raise UnsupportedModel(
                    f"batch_invariant=True: the products of {name} ({type(module).__name__}) are torch's own, and "
                    "depend on the batch. Leave batch_invariant out for this model."
                )

    def _try(self, kind: str, recognise_as: Callable[..., Any], module: nn.Module, rows: Rows) -> Any:
        """What a recogniser says; a kernel that raises while it is tried is refused."""
        try:
            return recognise_as(module, rows)
        except Exception:
            self.refused[kind] = self.refused.get(kind, 0) + 1
            return None

    def _add(self, module: nn.Module, kind: str, forward: Callable[..., Any]) -> None:
        eager = None if isinstance(forward, Proved) else module.forward
        self._entries.append((module.__dict__, Replacement(module, forward, eager)))
        self.replaced[kind] = self.replaced.get(kind, 0) + 1

    def _rows(self, model: PreTrainedModel) -> Rows:
        """For a product, the number of rows up to which ours is used."""
        if self.batch_invariant:
            return lambda module: 1 << 30
        if not self.timed:
            return lambda module: 0 if type(module) in PRODUCTS else ROWS[-1]
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        dtype = next((p.dtype for p in model.parameters() if p.dtype in cpu.DTYPES), torch.float32)

        def key(module: Any) -> tuple[object, ...]:
            return type(module), module.weight.shape, module.weight.dtype

        module: Any
        for module in model.modules():
            if type(module) in PRODUCTS and plain_linear(module, type(module)):
                alike.setdefault(key(module), []).append(module.weight.detach())

        def rows(module: Any) -> int:
            if type(module) in PRODUCTS:
                return own_rows(type(module), alike[key(module)])
            # Quantized products choose for themselves; layers of them are joined as far as others, or as they are ours.
            group = module.kernel.share if module.activations else 0
            return max(ROWS[-1], module.kernel.own_rows(dtype, group))

        return rows

    @contextmanager
    def entered(self, model: PreTrainedModel, tokens: int, best: bool = False) -> Iterator[None]:
        """Let the replacements be the modules' forward inside the block.

        Args:
            model: The model.
            tokens: Of the pass.
            best: Of its logits only the place of the largest of each row counts.
        """
        if self._hooks != RemovableHandle.next_id:  # by a processor or criterion, since the last pass
            self.refresh(model, running(model))
        # Where joined layers serve the pass, nothing inside them is called.
        joined = tokens <= self._limit and self._proofs.structures and None not in self._proofs.structures.values()
        entries = self._outer if joined else self._entries
        former = inside.now, inside.best
        with _passes:
            for attributes, replacement in entries:
                if not _users[id(attributes)]:
                    attributes["forward"] = replacement
                _users[id(attributes)] += 1
        try:
            inside.now, inside.best = True, best
            with own_products() if self.batch_invariant else nullcontext():
                yield
        finally:
            inside.now, inside.best = former
            with _passes:
                for attributes, _ in entries:
                    _users[id(attributes)] -= 1
                    if not _users[id(attributes)]:
                        del _users[id(attributes)]
                        attributes.pop("forward", None)
                _passes.notify_all()


def _global_hooks() -> int:
    """Hooks on every module, which would not be called for modules inside a replaced one."""
    return len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks)


def _weights(module: nn.Module) -> tuple[object, ...]:
    """What recognition depended on, besides what runs."""
    kernel = module.__dict__.get("kernel")  # of a quantized product; sharing memory with a process moves its tensors
    laid = [tensor.data_ptr() for tensor in kernel.tensors.values()] if isinstance(kernel, BlockedWeight) else []
    parameters = [p for p in module._parameters.values() if p is not None]
    return id(kernel), *laid, *[(id(p), p.data_ptr(), p.dtype, p.stride()) for p in parameters]


def _proves(module: nn.Module, forward: Forward) -> bool:
    """Whether the replacement's error against float64 is no larger than the eager module's, but for rounding."""
    weight = next(module.parameters(), None)
    width = _width(module)
    dtype = torch.float32 if weight is None else weight.dtype
    generator = torch.Generator("cpu").manual_seed(0)
    large = torch.randn(1, 3, width, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    return all(_agrees(module, forward, x) for x in (large, 0.01 * large))  # an epsilon shows in small numbers


def _agrees(module: nn.Module, forward: Forward, x: Tensor) -> bool:
    former = inside.now
    try:
        with torch.no_grad():
            eager = module(x)
            inside.now = True
            ours = forward(x)
    except Exception:  # a kernel or a module that cannot take this input stays out of the way
        return False
    finally:
        inside.now = former
    dtype = x.dtype
    scale = eager.abs().max().clamp_min(1e-6).float()
    # Twice the format's spacing at the largest value: two roundings of the same number differ by one spacing at most;
    # and what another order of additions costs, which happen in float32.
    bound = (4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * scale
    return (
        eager.shape == ours.shape
        and eager.dtype == ours.dtype
        and bool((eager.float() - ours.float()).abs().max() <= bound)
    )


def _width(module: nn.Module) -> int:
    child: Any
    for child in module.modules():
        if type(child) in PRODUCTS:
            return int(child.weight.shape[type(child) is nn.Linear])
    weight = next(module.parameters(), None)
    return 64 if weight is None else int(weight.shape[-1])
