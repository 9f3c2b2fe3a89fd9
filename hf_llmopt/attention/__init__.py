"""Part 4's room: how a span reads its pages."""

from .inputs import Span, StepInputs
from .interface import NAME, Step, configs_of, register, serving
from .paths import BACKENDS

__all__ = ["BACKENDS", "NAME", "Span", "Step", "StepInputs", "configs_of", "register", "serving"]
