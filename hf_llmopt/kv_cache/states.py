"""Recurrent states: what layers keep of a request that are no keys of tokens.

A state has one size however long the text is, and each token overwrites it, so it has no pages. The states of requests
that run together are rows of transformers' own cache layers, which the model updates in place; the rows are gathered
anew only where other requests run together than in the step before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache


def _state_layers() -> tuple[type, ...]:
    """Cache layers of this transformers whose states can be told apart by rows."""
    plain: Any = getattr(cache_utils, "LinearAttentionLayer", None)
    if plain is None or not isinstance(getattr(plain(), "conv_states", None), dict):
        return ()
    both = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
    return plain, *(getattr(cache_utils, name) for name in both if hasattr(cache_utils, name))


STATE_LAYERS = _state_layers()
_KINDS = ("conv_states", "recurrent_states")


class States:
    """States of some requests, a row each.

    Args:
        cache: What a pass of the model left; its keys and values are dropped.
        rows: How many requests have a row.

    Attributes:
        layers: By layer index; those that keep no state are there for their place only.
    """

    def __init__(self, cache: Cache, rows: int) -> None:
        self.layers: list[Any] = [_without_keys(layer) for layer in cache.layers]
        self.rows = rows

    @classmethod
    def joined(cls, parts: Sequence[tuple[States, int]]) -> States:
        """The states of requests, which have these rows of others, in one."""
        made = cls.__new__(cls)
        made.layers, made.rows = [], len(parts)
        for layer, first in enumerate(parts[0][0].layers):
            own = copy.copy(first)
            for kind in _KINDS if isinstance(first, STATE_LAYERS) else ():
                found = {
                    index: None
                    if tensor is None
                    else torch.cat([getattr(states.layers[layer], kind)[index][row : row + 1] for states, row in parts])
                    for index, tensor in getattr(first, kind).items()
                }
                setattr(own, kind, found)
            made.layers.append(own)
        return made

    def copy_to(self, cache: Cache) -> None:
        """Put all rows into the layers of a cache that holds none."""
        for own, layer in zip(self.layers, cache.layers, strict=True):
            if isinstance(own, STATE_LAYERS):
                for name, value in vars(own).items():
                    if "conv" in name or "recurrent" in name or name == "has_previous_state":
                        setattr(layer, name, value)


def _without_keys(layer: Any) -> Any:
    left = copy.copy(layer)
    if hasattr(left, "keys"):
        left.keys = left.values = None
        left.is_initialized = False
    return left


def states_of(requests: Sequence[Any]) -> States:
    """The states of requests that run together, in their order; each `request.state` says where they are."""
    shared: States = requests[0].state[0]
    if [request.state for request in requests] != [(shared, row) for row in range(shared.rows)]:
        shared = States.joined([request.state for request in requests])
        for row, request in enumerate(requests):
            request.state = shared, row
    return shared
