"""Fewer tokens kept: which ones, a file per method."""

from __future__ import annotations

from ...config import OWN, KVCacheConfig
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
    """The method a config asks for."""
    made: Eviction | None = None if config.eviction is None else (METHODS | OWN["eviction"])[config.eviction](config)
    return made


__all__ = ["METHODS", "Eviction", "Scored", "Scores", "Selection", "called", "compact", "method", "with_rest"]
