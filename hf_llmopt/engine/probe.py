"""What a model stores per token, found by running it once.

One token goes through the model with a cache and an attention function that write down what they are given. That is
how key and value widths, devices and dtypes are known for every architecture, and how a model that does not route its
attention through transformers' interface, or keeps another kind of state, is noticed before any work is lost.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..attention import configs_of, serving
from ..errors import UnsupportedModel
from ..kernels import reference
from ..kv_cache import STATE_LAYERS, LayerSpec, SpanCache
from ..walk import modules

# Keywords of the attention call that change its result and that our attention knows.
KNOWN = {"softcap", "s_aux", "sliding_window"}
# What transformers keeps for layers that pages can hold; nothing for a layer that reads another's (5.17 has no such).
PAGED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))
# Keywords that carry no meaning for the result: bookkeeping, or inputs the pages replace.
IGNORED = {
    "position_ids",
    "logits_to_keep",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


@dataclass(frozen=True)
class Layout:
    """What a model keeps, as `PagedStore` takes it.

    Attributes:
        layers: What each layer stores for a token.
        dense: Attention reads the very tensors that the model handed to its cache.
        reads_columns: The model asks its cache for the padded column of a token.
        states: Some layers keep a recurrent state of each request.
    """

    layers: list[LayerSpec]
    dense: bool
    reads_columns: bool
    states: bool = False


class _Recorder(SpanCache):
    """A cache and an attention that write down what they are given."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(len(layers))
        self.layers = layers
        self.stored: dict[int, Tensor] = {}
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.options: set[str] = set()
        self.causal = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.stored[layer_idx] = key_states
        return key_states, value_states

    def read(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]
    ) -> Tensor:
        self.seen[int(module.layer_idx)] = key, value  # type: ignore[arg-type]
        self.causal &= bool(getattr(module, "is_causal", True))
        self.options |= {name for name, option in options.items() if option is not None and option is not False}
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        return reference.attention(query, key, value, None, scaling, softcap, sinks).transpose(1, 2)

    def sources(self) -> dict[int, int]:
        """Layers that stored nothing, and the layer whose stored keys each read."""
        readers = [layer for layer in self.seen if layer not in self.stored]
        return {
            layer: source for layer in readers for source in self.stored if self.seen[layer][0] is self.seen[source][0]
        }


def input_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings, `[vocabulary, hidden]`."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; an offloaded model's weights lie on "meta" between passes, and a hook says where they run."""
    device = input_weight(model).device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", device)) if device.type == "meta" else device


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions of a learned position table, which cannot be exceeded; `None` if positions are computed."""
    # An image tower's positions are its own.
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    least = getattr(config, "max_position_embeddings", None) or 0
    table = next(
        (
            module
            for parent in modules(decoder if isinstance(decoder, nn.Module) else model)
            for name, module in parent._modules.items()
            if isinstance(module, nn.Embedding)
            and (name.endswith("wpe") or "position" in name)
            and module.num_embeddings >= least
        ),
        None,
    )
    if table is None:
        return None
    return table.num_embeddings - int(getattr(table, "offset", 0))


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the model cannot be served, as far as its class and config tell; `None` if nothing speaks against it."""
    config = model.config
    if config.is_encoder_decoder:
        return "encoder-decoder models have a second, non-causal attention"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    parameters = inspect.signature(model.forward).parameters
    for name in ("position_ids", "past_key_values"):
        if name not in parameters and getattr(model, "_is_stateful", False):
            return "the model keeps recurrent state in a way of its own"
        if name not in parameters:
            return f"its forward takes no {name}"
    try:
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        return f"its cache layers are unknown here ({error!r})"
    if getattr(model, "_is_stateful", False) and not any(isinstance(layer, STATE_LAYERS) for layer in layers):
        return "the model keeps recurrent state in a way of its own"
    for layer in layers:
        if type(layer) not in (*PAGED_LAYERS, *STATE_LAYERS):
            return f"its cache holds a {type(layer).__name__}: recurrent state, or keys of another kind"
    return None


def probe(model: PreTrainedModel) -> Layout:
    """Run one token through the model and return what it keeps.

    Raises:
        UnsupportedModel: The model cannot be served; the message says why.
    """
    reason = unsupported(model)
    layers = DynamicCache(config=model.config).layers if reason is None else []
    states = any(isinstance(layer, STATE_LAYERS) for layer in layers)
    recorder = _Recorder(layers if states else [])
    if reason is None:
        token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
        try:
            with torch.no_grad(), serving(configs_of(model), recorder):
                model(input_ids=token, position_ids=torch.zeros_like(token), past_key_values=recorder, use_cache=True)
        except Exception as error:  # whatever the model's own code raises means the same: it cannot be probed
            reason = f"one token could not be run through it ({type(error).__name__}: {error})"
        else:
            reason = _incomplete(model, recorder, layers if states else None)
    if reason is not None:
        raise UnsupportedModel(f"{type(model).__name__} cannot be optimized: {reason}")
    count = len(layers) if states else len(recorder.seen)
    lifetimes, sources = _lifetimes(model, count), recorder.sources()
    some_key, _ = next(iter(recorder.seen.values()))
    specs = []
    for layer in range(count):
        if layer not in recorder.seen:
            specs.append(LayerSpec("none", 0, 0, 0, 0, some_key.dtype, some_key.device))
            continue
        key, value = recorder.seen[layer]
        source = sources.get(layer)
        lifetime = lifetimes[layer if source is None else source]
        shape = key.shape[1], key.shape[3], value.shape[3]
        specs.append(LayerSpec(*lifetime, *shape, key.dtype, key.device, source=source))
    return Layout(
        specs,
        dense=all(recorder.seen[layer][0] is key for layer, key in recorder.stored.items()),
        reads_columns=recorder.reads_columns,
        states=states,
    )


def _incomplete(model: PreTrainedModel, recorder: _Recorder, stateful: list[Any] | None) -> str | None:
    """Why what was recorded cannot be served; `stateful`: the cache layers of a model that keeps states, too."""
    layers = list(range(len(recorder.seen)))
    if stateful is not None:
        attend = (*PAGED_LAYERS[:2], *STATE_LAYERS[1:])  # not those that keep nothing, or a state only
        layers = [layer for layer, kept in enumerate(stateful) if isinstance(kept, attend)]
        if not layers:
            return "it keeps recurrent state only, and no keys and values"
    if kept := _kept_in_modules(model):
        return f"it keeps {kept} in a module of its own, where requests cannot have theirs apart"
    if not layers or sorted([*recorder.stored, *recorder.sources()]) != layers or sorted(recorder.seen) != layers:
        return "not every layer stores its keys and attends through transformers' attention interface"
    if not recorder.causal:
        return "its attention is not causal: it sees later tokens"
    if unknown := recorder.options - KNOWN - IGNORED:
        return f"its attention needs {', '.join(sorted(unknown))}"
    count = len(layers) if stateful is None else len(stateful)
    windows = [window for kind, window in _lifetimes(model, count) if kind == "sliding"]
    if 1 in windows:
        return "its window is a single token, and transformers' own cache keeps more"
    if windows and "sliding_window" not in recorder.options:
        return "its cache keeps a window, of which its attention is not told"
    former = model.config.get_text_config(decoder=True)._attn_implementation
    if former == "sdpa" and recorder.options & {"softcap", "s_aux"}:
        return "it needs a softcap or sinks, which its sdpa attention ignores; load it with attn_implementation='eager'"
    return None


def _kept_in_modules(model: PreTrainedModel) -> str | None:
    """A state that the pass left beside the cache, as RecurrentGemma's do; its name."""
    left = ((name, value) for module in modules(model) for name, value in vars(module).items() if "state" in name)
    return next((name for name, value in left if isinstance(value, Tensor)), None)


def _lifetimes(model: PreTrainedModel, count: int) -> list[tuple[str, int]]:
    """Kind and window of each layer, from the layers that transformers itself would make."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or [""] * count
    chunk = getattr(config, "attention_chunk_size", None)
    lifetimes = []
    # A model may have fewer layers than its config names: users cut some off.
    for layer, layer_type in zip(DynamicCache(config=config).layers[:count], types, strict=False):
        if not isinstance(layer, DynamicSlidingWindowLayer):
            lifetimes.append(("full", 0))
        elif layer_type == "chunked_attention" or (not layer_type and layer.sliding_window == chunk):
            lifetimes.append(("chunked", layer.sliding_window))
        else:
            lifetimes.append(("sliding", layer.sliding_window))
    return lifetimes
