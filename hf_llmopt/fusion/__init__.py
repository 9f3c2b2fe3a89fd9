"""Small operations joined: modules of a model replaced by C kernels for the time of a step."""

from .modules import Fusion

__all__ = ["Fusion"]
