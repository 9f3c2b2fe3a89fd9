"""The attention function that transformers calls by the name `"llmopt"`.

In an engine step it reads pages. In a plain forward it is whatever the model used before, or that of `plain.py` if a
user chose `attn_implementation="llmopt"`.

The step is found by the config of the attention module and the running thread. A keyword of `model(...)` would be
plainer, but some models (StableLM, Nemotron) drop keywords on the way to their attention.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..walk import modules
from . import plain

NAME = "llmopt"  # must not contain "flash": transformers drops masks for such names


class Step(Protocol):
    """What a forward pass reads: `StepInputs`, or the probe."""

    def read(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention output `[1, tokens, heads, value_dim]`."""
        ...


class _Switch:
    """A config whose attention implementation engine steps set to NAME, and what it was before.

    Kept as long as the config lives: a plain forward of another thread may look its attention up during a step and call
    it after the step has ended.
    """

    def __init__(self, config: Any) -> None:
        self.config = weakref.ref(config, lambda _: _switches.pop(key, None))
        self.former: str | None = None  # None: the user chose NAME
        self.users = 0
        self.steps: dict[int, Step] = {}  # by thread: threads may serve models that share a config
        key = id(config)


_switches: dict[int, _Switch] = {}  # by id(config)
_lock = threading.Lock()
_ATTRIBUTE = "_attn_implementation_internal"


def register() -> None:
    """Add the name to transformers' registries. New names only; nothing is replaced."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)


@contextmanager
def serving(configs: list[Any], step: Step) -> Iterator[None]:
    """Let the attention of modules with these configs read `step` inside the block, in this thread.

    The configs are found beforehand, by `configs_of`: walking a model's modules costs more than a step may. Blocks may
    nest (a fused layer proves itself inside a step), and several threads may be in one for the same config.
    """
    thread = get_ident()
    entered: list[tuple[Any, _Switch, Step | None]] = []
    try:
        for config in configs:
            with _lock:
                switch = _switches.get(id(config)) or _switches.setdefault(id(config), _Switch(config))
                entered.append((config, switch, switch.steps.get(thread)))
                # The attribute is written past the config's own __setattr__, which is slow enough to be interrupted in.
                if not switch.users and vars(config)[_ATTRIBUTE] != NAME:
                    switch.former = vars(config)[_ATTRIBUTE]
                switch.users += 1
                switch.steps[thread] = step
                vars(config)[_ATTRIBUTE] = NAME
        yield
    finally:
        for config, switch, outer in entered:
            with _lock:
                switch.users -= 1
                if outer is None:
                    switch.steps.pop(thread, None)
                else:
                    switch.steps[thread] = outer
                if not switch.users:
                    vars(config)[_ATTRIBUTE] = switch.former or NAME


def current_step(config: Any) -> Step | None:
    """The step that this thread runs through modules with this config, if any."""
    switch = _switches.get(id(config))
    return None if switch is None else switch.steps.get(get_ident())


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config object that a module of the model reads its attention implementation from."""
    configs = {id(c): c for module in modules(model) if (c := vars(module).get("config")) is not None}
    return [config for config in configs.values() if _ATTRIBUTE in vars(config)]


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; shapes as transformers has them, `[batch, heads, tokens, width]`."""
    config = getattr(module, "config", None)
    if (step := current_step(config)) is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return step.read(module, query, key, value, scaling, kwargs), None
    switch = _switches.get(id(config))
    if switch is None or switch.former is None:
        function = plain.attention
    elif switch.former == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[switch.former]
    output: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return output


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The registered mask function: none for an engine step, else the former implementation's, or `plain.mask`."""
    if current_step(config) is not None:
        return None
    switch = _switches.get(id(config))
    function = plain.mask if switch is None or switch.former is None else ALL_MASK_ATTENTION_FUNCTIONS[switch.former]
    return function(*args, config=config, **kwargs)
