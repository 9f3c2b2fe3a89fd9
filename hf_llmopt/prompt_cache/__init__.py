"""Part 2: pages that are found instead of computed."""

from .cache import Prefix, PromptCache
from .handle import PromptHandle

__all__ = ["Prefix", "PromptCache", "PromptHandle"]
