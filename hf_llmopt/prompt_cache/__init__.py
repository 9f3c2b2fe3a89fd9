"""Part 2: pages that are found instead of computed."""

from .cache import PromptCache
from .handle import PromptHandle
from .prefix import Prefix

__all__ = ["Prefix", "PromptCache", "PromptHandle"]
