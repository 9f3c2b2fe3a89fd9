"""Part 5, speculative decoding: guesses that cost little, and that the model's own choices confirm."""

from .draft_model import DraftModelDrafter
from .drafter import Draft, Drafter
from .length import Costs, choose_lengths
from .speculator import Speculator
from .suffix import SuffixDrafter

__all__ = ["Costs", "Draft", "DraftModelDrafter", "Drafter", "Speculator", "SuffixDrafter", "choose_lengths"]
