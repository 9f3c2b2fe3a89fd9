"""Part 1: keys and values in pages."""

from .offload import Staged, Streams
from .paged import PagedCache, SpanCache
from .pool import BlockTable, PagePool
from .states import STATE_LAYERS, States, states_of
from .store import CacheGroup, LayerSpec, PagedStore
from .swap import Swapped
from .transfer import Clock, Download, upload

__all__ = [
    "STATE_LAYERS",
    "BlockTable",
    "CacheGroup",
    "Clock",
    "Download",
    "LayerSpec",
    "PagePool",
    "PagedCache",
    "PagedStore",
    "SpanCache",
    "Staged",
    "States",
    "Streams",
    "Swapped",
    "states_of",
    "upload",
]
