"""The engine: spans over pages, one loop for everything."""

from .engine import EngineLoop
from .probe import PAGED_LAYERS, input_weight, position_limit, unsupported
from .request import Request, Share
from .whole import copy_in, take_in

__all__ = [
    "PAGED_LAYERS",
    "EngineLoop",
    "Request",
    "Share",
    "copy_in",
    "input_weight",
    "position_limit",
    "take_in",
    "unsupported",
]
