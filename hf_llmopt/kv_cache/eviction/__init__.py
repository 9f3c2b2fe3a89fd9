"""Fewer tokens kept: which ones, a file per method."""

from __future__ import annotations

from ...config import OWN, KVCacheConfig, guarded
from ...errors import CallbackFailed
from .compact import compact
from .contract import Eviction, Scored, Scores, Selection, called, with_rest
from .expected import ExpectedAttention
from .h2o import H2O
from .kvzip import KVzip
from .sink import Sink
from .snapkv import SnapKV

METHODS: dict[str, type[Eviction]] = {
    "sink": Sink,
    "snapkv": SnapKV,
    "h2o": H2O,
    "expected": ExpectedAttention,
    "kvzip": KVzip,
}


def method(config: KVCacheConfig) -> Eviction | None:
    """The method a config asks for.

    Raises:
        CallbackFailed: One of the user's own cannot be made.
    """
    name = config.eviction
    if name is None or name in METHODS:
        return None if name is None else METHODS[name](config)
    made = guarded("eviction", name, "making it", OWN["eviction"][name], config)
    if not isinstance(made, Eviction) or not hasattr(made, "config"):
        why = "its __init__ calls super().__init__(config)" if isinstance(made, Eviction) else "an Eviction is wanted"
        raise CallbackFailed(f"eviction {name!r}: what was made is a {type(made).__name__}; {why}.")
    return made


__all__ = ["METHODS", "Eviction", "Scored", "Scores", "Selection", "called", "compact", "method", "with_rest"]
