"""A whole decoder layer as one call into C.

What a layer computes is found by watching it: a float32 copy runs once over real pages, and every module inside it
notes what it reads and what it gives. Where a tensor came from says which norm stands before which product, whether
the MLP reads the sum or the input, and so on; names do not matter. What cannot be seen (how queries turn, how a joined
product orders its heads) is tried. The description that gives the layer's own result is used; if none does, the layer
stays eager. Layers that differ only in their weights are watched once.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import Span, StepInputs, backend, current_step, serving
from ..config import KVCacheConfig
from ..errors import UnsupportedModel
from ..kernels import cpu
from ..kernels.arguments import Layer, Stage, Turns
from ..kv_cache import LayerSpec, PagedStore
from ..quantization.linear import QuantizedLinear
from .kinds import (
    Rows,
    activation_kind,
    inside,
    is_library_code,
    is_plain,
    norm_of,
    plain_linear,
    product_of,
    quantized_linear,
)

LayerForward = Callable[..., Any]
APART = (
    "The model changed its hidden states between two decoder layers that were joined, or left one out. They are apart "
    "from now on, and the pass can be run again."
)
SMALL = 1 << 18  # elements of a weight
FEW = 32  # tokens of a pass up to which products with small weights cost less than calling them
ROTATIONS = ("halves", "neighbours", "repeated", "none")  # see rotary.c


class Candidate(NamedTuple):
    """A module that may be a decoder layer.

    Attributes:
        config: By which a step is found.
        layer: Its index.
        limit: Tokens of a pass up to which C is the faster way.
    """

    config: Any
    layer: int
    limit: int


def recognise(layer: nn.Module, rows: Rows) -> Candidate | None:
    """Whether a module may be a decoder layer of products, norms and activations around one attention."""
    if isinstance(layer, (PreTrainedModel, nn.ModuleList)):
        return None  # a model of one layer
    attentions = [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "config") and m is not layer]
    if len(attentions) != 1 or not all(map(is_plain, layer.modules())):
        return None
    products = [module for module in layer.modules() if plain_linear(module) or quantized_linear(module)]
    norms = [module for module in layer.modules() if module._parameters and module not in products]
    if not 4 <= len(products) <= 7 or len(norms) > 6 or any(list(norm.children()) for norm in norms):
        return None
    if not all(map(is_library_code, layer.modules())) or getattr(attentions[0].config, "clip_qkv", None) is not None:
        return None  # limits that random input does not reach
    if not all(parameter.is_contiguous() for parameter in layer.parameters()):
        return None
    if len({parameter.dtype for parameter in layer.parameters()}) != 1:
        return None  # norms kept in float32 beside half precision products, say
    # Of small products the calls are what costs, and here is only one.
    limit = min(max(rows(p), FEW if p.weight.numel() < SMALL else 0) for p in products)  # type: ignore[operator]
    index = attentions[0].layer_idx
    return Candidate(attentions[0].config, index, limit) if limit and isinstance(index, int) else None


class _Role(NamedTuple):
    """A module of a layer, by name, and which of its rows are meant."""

    name: str
    rows: slice = slice(None)


class Structure(NamedTuple):
    """What every layer of one kind computes, in the order of `Layer`."""

    norms: tuple[str | None, ...]
    products: tuple[_Role | None, ...]
    kind: str
    parallel: int
    heads: int
    scaling: float
    softcap: float | None
    factors: tuple[float, float]  # on queries, and on what is added to the residual
    rotation: str = "none"

    def bind(self, layer: nn.Module) -> Layer:
        """The structure with a layer's parameters."""
        factors = {0: self.factors[0], 3: self.factors[1], 6: self.factors[1]}
        products = [
            None if role is None else product_of(layer.get_submodule(role.name), role.rows, factors.get(place, 1.0))
            for place, role in enumerate(self.products)
        ]
        norms = [None if name is None else norm_of(layer.get_submodule(name)) for name in self.norms]
        return Layer(tuple(norms), tuple(products), self.kind, self.parallel)  # type: ignore[arg-type]

    def stage(self, bound: Layer, layer: int, step: StepInputs, turns: tuple[Tensor, Tensor] | None) -> Stage:
        """A layer of a pass, over the pages of `step`."""
        slots = step.slots(layer, torch.device("cpu"))
        how = Turns(None, None, slots)
        if self.rotation != "none" and turns is not None:
            cosine, sine = (part[0].contiguous() for part in turns)
            how = Turns(cosine, sine, slots, ROTATIONS.index(self.rotation))
        seen = step.seen(layer, self.scaling, self.softcap)
        return Stage(bound, seen, how, self.heads)


class Joined:
    """A decoder layer's replacement. It proves itself at its first call, with the arguments of a real pass.

    Where a pass has shown that the next layer reads what this one gives, both run in one call of the pass that
    follows: the next one's turn then only hands on what it is given.

    Args:
        layer: The eager layer.
        found: From `recognise`.
        specs: What each layer of the model stores.
        proofs: Structure of each signature of layers, `None` where none gave its result; filled here.
        before: The layer before it.
    """

    def __init__(
        self,
        layer: nn.Module,
        found: Candidate,
        specs: list[LayerSpec],
        proofs: dict[Any, Structure | None],
        before: Joined | None,
    ) -> None:
        self.found = found
        self._layer = weakref.ref(layer)
        self._eager: LayerForward = layer.forward
        self._dtype = next(layer.parameters()).dtype
        self._signature = _signature(layer)
        self._specs = specs
        self._proofs = proofs
        self._bound: Layer | None = None
        self._before = before
        self._next: Joined | None = None
        self._apart = False  # something was done to what the layer before gives
        self._order: int = 0 if before is None else before._order + 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer on `[1, tokens, hidden]`; the eager layer where C does not serve."""
        step: Any = current_step(self.found.config) if inside.now else None
        limit = self.found.limit
        turns = kwargs.get("position_embeddings")
        if (
            not isinstance(step, StepInputs)
            or len(args) != 1
            or args[0].shape[1] > limit
            or args[0].dtype is not self._dtype
            or (turns is not None and turns[0].dtype not in (self._dtype, torch.float32))
        ):
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
        if self._signature not in self._proofs:
            self._proofs[self._signature] = _prove(
                self._own(), self.found, hidden_states, self._specs[self.found.layer], kwargs
            )
        if self._proofs[self._signature] is None:
            return self._eager(hidden_states, **kwargs)
        if self._before is not None:
            joined = follows and ahead is not None and ahead.last is self._before and not self._apart
            self._before._next = self if joined else None
        stages, last = [self._stage(step, turns)], self
        while last._next is not None and last._next.found.limit >= hidden_states.shape[1]:
            last = last._next
            stages.append(last._stage(step, turns))
        step.note("cpu")
        x = hidden_states[0]
        gave = cpu.layers(x if x.is_contiguous() else x.contiguous(), stages)[None]
        step.ahead = _Ahead(gave, _version(gave), turns, self, last)
        return gave

    @property
    def is_eager(self) -> bool:
        """Whether no structure gave the layer's result."""
        return self._proofs.get(self._signature, False) is None

    def _part(self) -> None:
        """Join the layers that ran together never again."""
        first = self
        while first._before is not None and first._before._next is first:
            first = first._before
        layer: Joined | None = first
        while layer is not None:
            layer._apart = True
            layer._next, layer = None, layer._next

    def _own(self) -> nn.Module:
        layer = self._layer()
        assert layer is not None  # it is running
        return layer

    def _stage(self, step: StepInputs, turns: Any) -> Stage:
        structure = self._proofs[self._signature]
        assert structure is not None
        if self._bound is None:
            self._bound = structure.bind(self._own())
        return structure.stage(self._bound, self.found.layer, step, turns)


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


def _signature(layer: nn.Module) -> Any:
    """What distinguishes layers besides their weights: classes, plain attributes, shapes."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if key != "layer_idx" and isinstance(value, (int, float, str, bool, type(None)))
            ),
            tuple(p.shape for p in module.parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


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


def _prove(
    layer: nn.Module, found: Candidate, like: Tensor, spec: LayerSpec, kwargs: dict[str, Any]
) -> Structure | None:
    """The structure with which C gives the layer's own result, or `None`.

    In float32 all digits must agree. In the layer's own format roundings differ, but what a copy in float32 cannot
    show (embeddings in another format, say) would be far off.
    """
    if max(spec.key_dim, spec.value_dim) > cpu.MAX_DIM:
        return None
    former = inside.now
    inside.now = False  # the copies' own products must be torch's
    try:
        exact = _Trial(layer, found, like, spec, kwargs, None)
        truth = exact.run(exact.eagerly)
        # Whatever depends on the position beyond the embeddings given (a scale of late queries) is not seen here.
        later = {name: value + 100_003 for name, value in kwargs.items() if _is_index(value)}
        elsewhere = exact.run(lambda step: exact.eagerly(step, **later))
        if truth is None or elsewhere is None or not all(map(torch.equal, truth[0], elsewhere[0])):
            return None
        structures = [s for s in _structures(exact, truth[1]) if exact.agrees(s, truth[0], 1e-4)]
        exact.x *= 0.01  # an epsilon is seen where the variance is small
        truth = exact.run(exact.eagerly)
        own = _Trial(layer, found, like, spec, kwargs, spec.dtype)
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
    """

    def __init__(
        self,
        layer: nn.Module,
        found: Candidate,
        like: Tensor,
        spec: LayerSpec,
        kwargs: dict[str, Any],
        dtype: torch.dtype | None,
    ) -> None:
        self.config = found.config
        known: dict[int, Any] = {id(self.config): self.config}  # a step is found by the config
        drawn, dtype = dtype is None, dtype or torch.float32
        if drawn:
            known |= {id(m): _dense(m) for m in layer.modules() if isinstance(m, QuantizedLinear)}
        self.own = copy.deepcopy(layer, known).to(dtype)
        for module in self.own.modules():
            module.__dict__.pop("forward", None)
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = 0  # type: ignore[assignment]
        generator = torch.Generator("cpu").manual_seed(0)
        self.x = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
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
        generator = torch.Generator("cpu").manual_seed(2)
        for name, tensor in itertools.chain(self.own.named_parameters(), self.own.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
                scaled = noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 0.3 * noise
                tensor.copy_(scaled + (tensor.dim() == 1 and name.endswith("weight")))

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
        slots = torch.cat([store.slots(table[0], 2, 3) for table in tables])
        step = _Watching(store, spans, [slots], backend("cpu", self.x.device), lambda name: None)
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
        """Whether C gives the truth, up to a share of its largest value."""
        layer = structure.bind(self.own)
        ours = self.run(lambda step: cpu.layers(self.x[0], [structure.stage(layer, 0, step, self.turns)])[None])
        return ours is not None and all(
            a.shape == b.shape and bool((a - b).abs().max() <= bound * b.abs().max().clamp_min(1e-6))
            for a, b in zip(ours[0], truth, strict=True)
        )


def _dense(module: QuantizedLinear) -> nn.Linear:
    """A product of the same shape, whose weight is yet to be drawn."""
    bias = module.bias is not None
    made = nn.Linear(module.in_features, module.out_features, bias, device="meta", dtype=torch.float32)
    return made.to_empty(device="cpu")


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
    up = next((_Role(c.name) for c in mlp if c is not gate), None)
    gate_role = _Role(gate.name)
    if gate.gave.numel() == 2 * act.read.numel():  # gate and up are one product
        half = gate.gave.shape[-1] // 2
        gate_role, up = _Role(gate.name, slice(half)), _Role(gate.name, slice(half, None))

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
    orders: list[tuple[_Role | None, ...]] = [tuple(_Role(call.name) for call in first)]
    if len(first) == 1:
        name, keys, values = first[0].name, step.store.keys[0], step.store.values[0]
        ends = [0, *itertools.accumulate((query[0, :, 0].numel(), keys[0].numel(), values[0].numel()))]
        stacked = tuple(_Role(name, slice(*pair)) for pair in itertools.pairwise(ends))
        orders = [stacked, (_Role(name), None, None)]
    return [
        Structure(
            tuple(names), (*order, _Role(output.name), gate_role, up, _Role(down.name)),
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
