"""EAGLE: drafters of a single layer, which read what the model itself computed between its layers."""

from .follower import Follower
from .loader import check_fits, load_eagle
from .model import EagleModel

__all__ = ["EagleModel", "Follower", "check_fits", "load_eagle"]
