"""Part 1: keys and values in pages."""

from .paged import PagedCache, SpanCache
from .pool import BlockTable, PagePool
from .store import CacheGroup, LayerSpec, PagedStore
from .swap import Swapped

__all__ = ["BlockTable", "CacheGroup", "LayerSpec", "PagePool", "PagedCache", "PagedStore", "SpanCache", "Swapped"]
