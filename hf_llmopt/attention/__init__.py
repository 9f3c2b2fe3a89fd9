"""Part 4's room: how a span reads its pages."""

from .choice import backend
from .gpu import replayable
from .inputs import Attend, Call, FixedInputs, Span, StepInputs, cut, listed
from .interface import NAME, Step, configs_of, current_step, register, serving
from .observe import Observer, Watch

__all__ = [
    "NAME",
    "Attend",
    "Call",
    "FixedInputs",
    "Observer",
    "Span",
    "Step",
    "StepInputs",
    "Watch",
    "backend",
    "configs_of",
    "current_step",
    "cut",
    "listed",
    "register",
    "replayable",
    "serving",
]
