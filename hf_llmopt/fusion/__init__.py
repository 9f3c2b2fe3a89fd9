"""Small operations joined: modules of a model replaced by our kernels for the time of a step."""

from .head import Screened
from .launched import launches
from .layer import Joined
from .modules import Fusion, Replacement

__all__ = ["Fusion", "Joined", "Replacement", "Screened", "launches"]
