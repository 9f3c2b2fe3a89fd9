"""transformers' `generate` in the engine's terms."""

from .active import ACTIVE, Active, ModelHandle, Prepared, handle_of
from .group import Group
from .row import Row, TokenLogprob, Wishes, advance
from .support import reason_against, require_model
from .translate import translate

__all__ = [
    "ACTIVE",
    "Active",
    "Group",
    "ModelHandle",
    "Prepared",
    "Row",
    "TokenLogprob",
    "Wishes",
    "advance",
    "handle_of",
    "reason_against",
    "require_model",
    "translate",
]
