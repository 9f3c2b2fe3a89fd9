"""A whole decoder layer as a dozen calls into C, without the modules between them.

Recognised is the pre-norm layer of Llama and its many relatives: `x + attention(norm(x))`, then `x + mlp(norm(x))`,
with a gated MLP, with or without biases, with or without norms on queries and keys. How such a layer turns its queries
(halves, neighbours, not at all) cannot be seen from its modules, so each variant is tried. The one that gives the
layer's own result on random input, in float32 and over real pages, is used; if none does, the layer stays eager.
Layers that differ only in their weights are proved once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import SHORT, Span, StepInputs, backend, current_step, serving
from ..config import KVCacheConfig
from ..errors import LLMOptError
from ..kernels import cpu
from ..kv_cache import LayerSpec, PagedStore
from .kinds import Rows, activation_kind, epsilon_of, inside, is_plain, plain_linear, rms_variant

LayerForward = Callable[..., Any]
SMALL = 1 << 18  # elements of a weight
ROTATIONS = ("halves", "neighbours", "none")
Parameters = dict[str, Any]


class _Parts(NamedTuple):
    """What a layer consists of; parameters are looked up at every call, so that weight updates are seen."""

    norms: tuple[tuple[Parameters, float, int], tuple[Parameters, float, int]]  # weight, epsilon, variant
    query: Parameters
    key: Parameters
    value: Parameters
    output: Parameters
    query_norm: tuple[Parameters, float, int] | None
    key_norm: tuple[Parameters, float, int] | None
    gate: Parameters
    up: Parameters
    down: Parameters
    kind: str
    config: Any
    layer: int
    scaling: float


def recognise(layer: nn.Module, rows: Rows) -> tuple[_Parts, int] | None:
    """The layer's parts and the number of tokens up to which C serves it, or `None` for another structure."""
    children = dict(layer.named_children())
    attention, mlp = children.get("self_attn"), children.get("mlp")
    first, second = children.get("input_layernorm"), children.get("post_attention_layernorm")
    if len([c for c in children.values() if list(c.parameters())]) != 4 or None in (attention, mlp, first, second):
        return None
    assert attention is not None
    assert mlp is not None
    assert first is not None
    assert second is not None
    own, feed = dict(attention.named_children()), dict(mlp.named_children())
    names = {name for name, child in own.items() if list(child.parameters())}
    if names not in (
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    ):
        return None
    kind = next((k for k in map(activation_kind, feed.values()) if k), None)
    products: list[Any] = [own[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    products += [feed[name] for name in ("gate_proj", "up_proj", "down_proj") if name in feed]
    if kind is None or len(products) != 7 or not all(plain_linear(product) for product in products):
        return None
    norms = [first, second, *(own[name] for name in ("q_norm", "k_norm") if name in own)]
    modules = (layer, attention, mlp, *norms)
    if not all(is_plain(module) for module in modules) or list(attention.parameters(recurse=False)):
        return None
    described = [_norm_parts(norm) for norm in norms]
    scaling = getattr(attention, "scaling", None)
    config: Any = getattr(attention, "config", None)
    index = getattr(attention, "layer_idx", None)
    if None in described or not isinstance(scaling, float) or config is None or not isinstance(index, int):
        return None
    # Of small products the call is what costs, and here are fewer of them.
    if len({parameter.dtype for parameter in layer.parameters()}) != 1:
        return None  # norms kept in float32 beside half precision products, say
    limit = min(max(rows(p), SHORT if p.weight.numel() < SMALL else 0) for p in products)
    parameters: list[Parameters] = [product._parameters for product in products]
    query, key, value, output, gate, up, down = parameters
    parts = _Parts(
        (described[0], described[1]),  # type: ignore[arg-type]
        query, key, value, output,
        described[2] if len(described) > 2 else None,
        described[3] if len(described) > 2 else None,
        gate, up, down, kind, config, index, scaling,
    )  # fmt: skip
    return (parts, limit) if limit else None


def _norm_parts(norm: nn.Module) -> tuple[Parameters, float, int] | None:
    epsilon = epsilon_of(norm)
    weight = norm._parameters.get("weight")
    if epsilon is None or set(norm._parameters) != {"weight"} or weight is None or weight.dim() != 1:
        return None
    return norm._parameters, epsilon, rms_variant(norm, weight, epsilon)


def fused(
    layer: nn.Module, parts: _Parts, limit: int, specs: list[LayerSpec], proofs: dict[Any, str | None]
) -> LayerForward:
    """The layer's replacement. It proves itself at its first call, with the arguments of a real pass.

    Args:
        layer: The eager layer.
        parts: From `recognise`.
        limit: Tokens of a pass up to which it is used.
        specs: What each layer of the model stores.
        proofs: Rotation that a layer of this signature was proved with, `None` if with none; filled here.
    """
    eager: LayerForward = layer.forward
    signature = _signature(layer)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        step: Any = current_step(parts.config) if inside.now else None
        tokens = hidden_states.shape[1]
        if (
            tokens > limit
            or not isinstance(step, StepInputs)
            or step.spans[-1].length > max(SHORT, limit)
            or hidden_states.dtype is not parts.query["weight"].dtype
            or args
        ):
            return eager(hidden_states, *args, **kwargs)
        if signature not in proofs:
            proofs[signature] = _prove(layer, parts, hidden_states, specs[parts.layer], kwargs)
        rotation = proofs[signature]
        if rotation is None:
            return eager(hidden_states, **kwargs)
        return run(parts, hidden_states, step, rotation, kwargs.get("position_embeddings"))

    return forward


def run(
    parts: _Parts, hidden_states: Tensor, step: StepInputs, rotation: str, turns: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The layer on `[1, tokens, hidden]`, over the pages of `step`."""
    layer, store = parts.layer, step.store
    keys, values = store.keys[layer], store.values[layer]
    x = hidden_states[0]
    if not x.is_contiguous():
        x = x.contiguous()
    tokens = x.shape[0]
    (norm, epsilon, variant), (second, second_epsilon, second_variant) = parts.norms
    y = cpu.rms_norm(x, norm["weight"], epsilon, variant)
    query = cpu.linear(y, parts.query["weight"], parts.query["bias"]).view(tokens, -1, keys.shape[2])
    key = cpu.linear(y, parts.key["weight"], parts.key["bias"]).view(tokens, -1, keys.shape[2])
    value = cpu.linear(y, parts.value["weight"], parts.value["bias"]).view(tokens, -1, values.shape[2])
    if parts.query_norm is not None and parts.key_norm is not None:
        query = cpu.rms_norm(query, parts.query_norm[0]["weight"], *parts.query_norm[1:])
        key = cpu.rms_norm(key, parts.key_norm[0]["weight"], *parts.key_norm[1:])
    cosine, sine = (None, None) if rotation == "none" or turns is None else (turns[0][0], turns[1][0])
    cpu.rotary(query, key, value, cosine, sine, step.slots(layer, x.device), keys, values, rotation == "neighbours")
    step.note("cpu")
    table, items, longest = step.pages(layer, len(step.spans))
    seen = cpu.attention(query, keys, values, table, items, store.page_size, parts.scaling, None, None, longest)
    x = cpu.linear(seen.view(tokens, -1), parts.output["weight"], parts.output["bias"], x)
    y = cpu.rms_norm(x, second["weight"], second_epsilon, second_variant)
    gate = cpu.linear(y, parts.gate["weight"], parts.gate["bias"])
    up = cpu.linear(y, parts.up["weight"], parts.up["bias"])
    x = cpu.linear(cpu.gated(gate, up, parts.kind), parts.down["weight"], parts.down["bias"], x)
    return x[None]


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


@torch.no_grad()
def _prove(layer: nn.Module, parts: _Parts, like: Tensor, spec: LayerSpec, kwargs: dict[str, Any]) -> str | None:
    """The rotation with which the replacement gives the layer's own result, or `None`.

    A float32 copy of the layer and its replacement each compute one token of several requests that have two tokens
    already, from random input; outputs and pages must agree.
    """
    own = copy.deepcopy(layer, {id(parts.config): parts.config}).float()  # the config is what a step is found by
    for module in own.modules():
        module.__dict__.pop("forward", None)
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = 0  # type: ignore[assignment]
    found = recognise(own, lambda module: SHORT)
    if found is None:
        return None
    own_parts = found[0]
    tokens = like.shape[1]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    full = replace(spec, kind="full", window=0, dtype=torch.float32)
    wide = {name: _widened(value) for name, value in kwargs.items()}

    def attempt(run_layer: Callable[[StepInputs], Any]) -> list[Tensor] | None:
        store = PagedStore([full], KVCacheConfig(page_size=4))
        store.provide([tokens])
        filled = torch.Generator("cpu").manual_seed(1)
        for slots in (store.keys[0], store.values[0]):
            slots.copy_(torch.randn(slots.shape, generator=filled, dtype=torch.float32, device="cpu"))
        tables = [store.tables([1]) for _ in range(tokens)]
        for table in tables:
            table[0].reserve(0, 3)
        spans = [Span(table, row, 1, 3) for row, table in enumerate(tables)]
        slots = torch.cat([store.slots(table[0], 2, 3) for table in tables])
        step = StepInputs(store, spans, [slots], backend("cpu", like.device), lambda name: None)
        output = run_layer(step)
        return [output - x, store.keys[0], store.values[0]] if isinstance(output, Tensor) else None

    def eagerly(step: StepInputs) -> Any:
        with serving([parts.config], step):
            return own(x, **wide)

    former = inside.now
    inside.now = False  # the copy's own products must be torch's
    try:
        truth = attempt(eagerly)
        for rotation in ROTATIONS if truth is not None else ():
            turns = wide.get("position_embeddings")
            ours = attempt(lambda step, how=rotation, turns=turns: run(own_parts, x, step, how, turns))  # type: ignore[misc]
            if ours is not None and truth is not None and all(map(_agree, ours, truth)):
                return rotation
    except (LLMOptError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None  # another structure after all
    finally:
        inside.now = former
    return None


def _agree(ours: Tensor, truth: Tensor) -> bool:
    return ours.shape == truth.shape and bool((ours - truth).abs().max() <= 1e-4 * truth.abs().max().clamp_min(1e-6))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_widened(item) for item in value)
    return value
