"""Drafters that read what the model itself computed between its layers: EAGLE, and layers of its own files (MTP)."""

from .follower import Follower, Head
from .loader import check_fits, load_eagle
from .model import EagleModel
from .mtp import MtpHead, load_mtp

__all__ = ["EagleModel", "Follower", "Head", "MtpHead", "check_fits", "load_eagle", "load_mtp"]
