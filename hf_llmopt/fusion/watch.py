"""Which structure a decoder layer has, found by watching it.

A float32 copy runs once over real pages, and every module inside it notes what it reads and what it gives. Where a
tensor came from says which norm stands before which product, whether the MLP reads the sum or the input, and so on;
names do not matter. What cannot be seen (how queries turn, how a joined product orders its heads) is tried. The
structure that gives the layer's own result is used.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..attention import Span, StepInputs, backend, serving
from ..config import KVCacheConfig
from ..kernels.arguments import Layer
from ..kv_cache import LayerSpec, PagedStore
from ..quantization.linear import QuantizedLinear
from .kinds import activation_kind, inside, plain_linear
from .structure import ROTATIONS, Candidate, Role, Structure


class Compute(Protocol):
    """Computes a layer of a structure."""

    def __call__(
        self,
        structure: Structure,
        bound: Layer,
        layer: int,
        x: Tensor,
        step: StepInputs,
        turns: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`, over the pages of `step`."""
        ...


class _Watched(NamedTuple):
    """A module that was called: what it read and what it gave."""

    name: str
    module: nn.Module
    read: Tensor
    gave: Tensor


class _Attended(NamedTuple):
    """The layer's attention: after how many other calls, and with what."""

    place: int
    query: Tensor
    gave: Tensor
    scaling: float
    options: dict[str, Any]


class _Watching(StepInputs):
    """A step that remembers the attention it served."""

    calls: list[_Watched]
    attended: list[_Attended]

    def read(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        gave = super().read(module, query, key, value, scaling, options)
        self.attended.append(_Attended(len(self.calls), query, gave, scaling, options))
        return gave


def prove(
    layer: nn.Module, found: Candidate, like: Tensor, spec: LayerSpec, kwargs: dict[str, Any], compute: Compute
) -> Structure | None:
    """The structure with which `compute` gives the layer's own result, or `None`.

    In float32 all digits must agree. In the layer's own format roundings differ, but what a copy in float32 cannot
    show (embeddings in another format, say) would be far off.
    """
    former, precision = inside.now, torch.get_float32_matmul_precision()
    inside.now = False  # the copies' own products must be torch's
    torch.set_float32_matmul_precision("highest")
    try:
        exact = _Trial(layer, found, like, spec, kwargs, None, compute)
        truth = exact.run(exact.eagerly)
        # Whatever depends on the position beyond the embeddings given (a scale of late queries) is not seen here.
        later = {name: value + 100_003 for name, value in kwargs.items() if _is_index(value)}
        elsewhere = exact.run(lambda step: exact.eagerly(step, **later))
        if truth is None or elsewhere is None or not all(map(torch.equal, truth[0], elsewhere[0])):
            return None
        structures = [s for s in _structures(exact, truth[1]) if exact.agrees(s, truth[0], 1e-4)]
        exact.x *= 0.01  # an epsilon is seen where the variance is small
        truth = exact.run(exact.eagerly)
        own = _Trial(layer, found, like, spec, kwargs, spec.dtype, compute)
        rounded = own.run(own.eagerly)
        if not structures or truth is None or rounded is None or not exact.agrees(structures[0], truth[0], 1e-4):
            return None
        # Where activations are rounded to int8, another rounding of a norm moves one of them by a step.
        int8 = any(isinstance(module, QuantizedLinear) and module.activations for module in layer.modules())
        bound = 1e-4 if spec.dtype is torch.float32 and not int8 else 0.1
        return structures[0] if own.agrees(structures[0], rounded[0], bound) else None
    except Exception:
        return None  # another structure after all
    finally:
        inside.now = former
        torch.set_float32_matmul_precision(precision)


class _Trial:
    """A copy of a layer that computes one token of several requests, which have two tokens already, from random input.

    Args:
        layer: The layer.
        found: From `recognise`.
        like: Hidden states `[1, tokens, hidden]`, for their shape.
        spec: What the layer stores.
        kwargs: Further arguments of a real pass.
        dtype: Of the copy. `None` for float32 and other weights: what a layer computes must not be read from weights
            that are 0 or 1 for now, and does not depend on how they are stored.
        compute: What stands in for the layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        found: Candidate,
        like: Tensor,
        spec: LayerSpec,
        kwargs: dict[str, Any],
        dtype: torch.dtype | None,
        compute: Compute,
    ) -> None:
        self.config, self.compute, self.device = found.config, compute, like.device
        known: dict[int, Any] = {id(self.config): self.config}  # a step is found by the config
        drawn, dtype = dtype is None, dtype or torch.float32
        if drawn:
            known |= {id(m): self._dense(m) for m in layer.modules() if isinstance(m, QuantizedLinear)}
        self.own = copy.deepcopy(layer, known).to(dtype)
        for module in self.own.modules():
            module.__dict__.pop("forward", None)
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = 0  # type: ignore[assignment]
        generator = torch.Generator("cpu").manual_seed(0)
        self.x = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device, dtype)
        self.spec = replace(spec, kind="full", window=0, dtype=dtype)
        wide = dtype is torch.float32
        self.kwargs = {name: _widened(value) if wide else value for name, value in kwargs.items()}
        if self.turns is not None:  # at position 0 nothing turns; and every entry must be seen to be used
            random = (torch.randn(t.shape, generator=generator, dtype=torch.float32, device="cpu") for t in self.turns)
            self.kwargs["position_embeddings"] = tuple(r.to(t) for r, t in zip(random, self.turns, strict=True))
        if drawn:
            self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Give every parameter and buffer a value that shows."""
        generator = torch.Generator(self.device).manual_seed(2)  # the CPU needs seconds for a layer of an 8B model
        for name, tensor in itertools.chain(self.own.named_parameters(), self.own.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device=self.device)
                scaled = noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 0.3 * noise
                tensor.copy_(scaled + (tensor.dim() == 1 and name.endswith("weight")))

    def _dense(self, module: QuantizedLinear) -> nn.Linear:
        """A product of the same shape, whose weight is yet to be drawn."""
        bias = module.bias is not None
        made = nn.Linear(module.in_features, module.out_features, bias, device="meta", dtype=torch.float32)
        return made.to_empty(device=self.device)

    @property
    def turns(self) -> Any:
        """Cosine and sine, or `None`."""
        return self.kwargs.get("position_embeddings")

    def run(self, layer: Callable[[_Watching], Any]) -> tuple[list[Tensor], _Watching] | None:
        """What a way to compute the layer adds to its input, and the pages it leaves; `None` if it gives no tensor."""
        tokens = self.x.shape[1]
        store = PagedStore([self.spec], KVCacheConfig(page_size=4))
        store.provide([tokens])
        filled = torch.Generator("cpu").manual_seed(1)
        for slots in (store.keys[0], store.values[0]):
            slots.copy_(torch.randn(slots.shape, generator=filled, dtype=torch.float32, device="cpu"))
        tables = [store.tables([1]) for _ in range(tokens)]
        for table in tables:
            table[0].reserve(0, 3)
        spans = [Span(table, row, 1, 3) for row, table in enumerate(tables)]
        slots = torch.cat([store.slots(table[0], 2, 3) for table in tables]).to(self.device)
        step = _Watching(store, spans, [slots], backend("auto", self.device), lambda name: None)
        step.calls, step.attended = [], []
        output = layer(step)
        return ([output - self.x, store.keys[0], store.values[0]], step) if isinstance(output, Tensor) else None

    def eagerly(self, step: _Watching, **changed: Any) -> Any:
        """The layer's own code, watched."""
        hooks = [
            module.register_forward_hook(
                lambda module, args, gave, name=name: step.calls.append(_Watched(name, module, args[0], gave))
            )
            for name, module in self.own.named_modules()
            if not list(module.children())
        ]
        try:
            with serving([self.config], step):
                return self.own(self.x, **self.kwargs | changed)
        finally:
            for hook in hooks:
                hook.remove()

    def agrees(self, structure: Structure, truth: list[Tensor], bound: float) -> bool:
        """Whether ours gives the truth, up to a share of its largest value."""
        layer = structure.bind(self.own)
        try:
            ours = self.run(lambda step: self.compute(structure, layer, 0, self.x[0], step, self.turns)[None])
        except RuntimeError:  # the parts of a product do not fit into such heads
            return False
        return ours is not None and all(
            a.shape == b.shape and bool((a - b).abs().max() <= bound * b.abs().max().clamp_min(1e-6))
            for a, b in zip(ours[0], truth, strict=True)
        )


def _structures(trial: _Trial, step: _Watching) -> list[Structure]:
    """What the layer may be, from the calls of one pass; empty if it is something else."""
    if len(step.attended) != 1:
        return []
    place, query, seen, scaling, options = step.attended[0]
    products = [call for call in step.calls if plain_linear(call.module)]
    first, last = [c for c in products if c in step.calls[:place]], [c for c in products if c in step.calls[place:]]
    acts = [call for call in step.calls if activation_kind(call.module)]
    # Dropouts give what they read.
    norms = [c for c in step.calls if c not in products and c not in acts and not _same(c.read, c.gave)]
    if len(first) not in (1, 3) or len(last) not in (3, 4) or len(acts) != 1 or options.get("s_aux") is not None:
        return []
    output, *mlp, down = last
    entry, act = first[0].read, acts[0]
    gate = next((c for c in mlp if _same(c.gave, act.read)), mlp[0])
    up = next((Role(c.name) for c in mlp if c is not gate), None)
    gate_role = Role(gate.name)
    if gate.gave.numel() == 2 * act.read.numel():  # gate and up are one product
        half = gate.gave.shape[-1] // 2
        gate_role, up = Role(gate.name, slice(half)), Role(gate.name, slice(half, None))

    def norm(reads: Tensor | None = None, gives: Tensor | None = None) -> _Watched | None:
        return next(
            (c for c in norms if (reads is None or _same(c.read, reads)) and (gives is None or _same(c.gave, gives))),
            None,
        )

    before, before_mlp = norm(gives=entry), norm(gives=gate.read)
    around = (before, norm(reads=output.gave), before_mlp, norm(reads=down.gave))
    heads = [c for c in norms if c in step.calls[:place] and c not in around]
    if not _same(output.read, seen) or len(heads) not in (0, 2):
        return []
    if _same(gate.read, entry):
        parallel, around = 2, (*around[:2], None, around[3])
    else:
        parallel = int(before_mlp is not None and _same(before_mlp.read, trial.x))
    scale = 1.0
    if len(first) == 3 and not heads and trial.turns is None:  # OPT scales its queries
        ratio = float(query.norm() / first[0].gave.norm())
        scale = scale if abs(ratio - 1) < 1e-3 else ratio
    names = [None if call is None else call.name for call in (around[0], *(heads or (None, None)), *around[1:])]
    orders: list[tuple[Role | None, ...]] = [tuple(Role(call.name) for call in first)]
    if len(first) == 1:
        name, keys, values = first[0].name, step.store.keys[0], step.store.values[0]
        ends = [0, *itertools.accumulate((query[0, :, 0].numel(), keys[0].numel(), values[0].numel()))]
        stacked = tuple(Role(name, slice(*pair)) for pair in itertools.pairwise(ends))
        orders = [stacked, (Role(name), None, None)]
    return [
        Structure(
            tuple(names), (*order, Role(output.name), gate_role, up, Role(down.name)),
            str(activation_kind(act.module)), parallel, query.shape[1], scaling, options.get("softcap"),
            (scale, float(getattr(trial.own, "residual_multiplier", 1.0))), rotation,
        )
        for order in orders
        for rotation in ROTATIONS
    ]  # fmt: skip


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_widened(item) for item in value)
    return value
