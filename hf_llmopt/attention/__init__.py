"""Part 4's room: how a span reads its pages."""

from .choice import backend
from .inputs import Span, StepInputs
from .interface import NAME, Step, configs_of, current_step, register, serving

__all__ = [
    "NAME",
    "Span",
    "Step",
    "StepInputs",
    "backend",
    "configs_of",
    "current_step",
    "register",
    "serving",
]
