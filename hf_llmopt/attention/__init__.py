"""Part 4's room: how a span reads its pages."""

from .choice import backend
from .gpu import replayable
from .inputs import FixedInputs, Span, StepInputs, cut, listed
from .interface import NAME, Step, configs_of, current_step, register, serving

__all__ = [
    "NAME",
    "FixedInputs",
    "Span",
    "Step",
    "StepInputs",
    "backend",
    "configs_of",
    "current_step",
    "cut",
    "listed",
    "register",
    "replayable",
    "serving",
]
