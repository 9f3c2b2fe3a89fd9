"""Small operations joined: modules of a model replaced by C kernels for the time of a step."""

from .modules import Fusion, Replacement

__all__ = ["Fusion", "Replacement"]
