"""Part 5, speculative decoding: guesses that cost little, and that the model's own choices confirm."""

from .draft_model import DraftModelDrafter
from .drafter import Draft, Drafter, Text
from .layer_skip import first_layers
from .length import PassCosts, choose_drafts
from .speculator import Speculator
from .suffix import SuffixDrafter
from .vocabulary import Reading, Translation

__all__ = [
    "Draft",
    "DraftModelDrafter",
    "Drafter",
    "PassCosts",
    "Reading",
    "Speculator",
    "SuffixDrafter",
    "Text",
    "Translation",
    "choose_drafts",
    "first_layers",
]
