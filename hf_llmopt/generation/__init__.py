"""transformers' `generate` in the engine's terms."""

from .active import ACTIVE, Active, ModelHandle, handle_of
from .group import Group
from .support import reason_against
from .translate import translate

__all__ = ["ACTIVE", "Active", "Group", "ModelHandle", "handle_of", "reason_against", "translate"]
