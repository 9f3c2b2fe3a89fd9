"""The engine: spans over pages, one loop for everything."""

from .engine import EngineLoop
from .probe import PAGED_LAYERS, input_weight, position_limit, unsupported
from .request import Request, Share

__all__ = ["PAGED_LAYERS", "EngineLoop", "Request", "Share", "input_weight", "position_limit", "unsupported"]
