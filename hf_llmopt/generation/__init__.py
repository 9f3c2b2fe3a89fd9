"""transformers' `generate` in the engine's terms."""

from .active import ACTIVE, Active, ModelHandle, Prepared, handle_of
from .assisted import named_drafter
from .choice import Chosen, choose
from .group import Group
from .row import Row, TokenLogprob, Wishes
from .support import reason_against, require_model
from .translate import translate
from .warp import Constraint

__all__ = [
    "ACTIVE",
    "Active",
    "Chosen",
    "Constraint",
    "Group",
    "ModelHandle",
    "Prepared",
    "Row",
    "TokenLogprob",
    "Wishes",
    "choose",
    "handle_of",
    "named_drafter",
    "reason_against",
    "require_model",
    "translate",
]
