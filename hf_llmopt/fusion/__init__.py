"""Small operations joined: modules of a model replaced by C kernels for the time of a step."""

from .layer import Joined
from .modules import Fusion, Replacement

__all__ = ["Fusion", "Joined", "Replacement"]
