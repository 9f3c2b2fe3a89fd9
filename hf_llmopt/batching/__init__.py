"""Part 6's room: requests that come and go."""

from .engine import Engine
from .handle import RequestHandle

__all__ = ["Engine", "RequestHandle"]
