"""Part 4's room: how a span reads its pages."""

from .choice import backend
from .fixed import FixedInputs
from .gpu import replayable
from .inputs import RUN, Attend, Call, Span, StepInputs, aligned, cut, listed
from .interface import NAME, Step, configs_of, current_step, register, serving
from .observe import Observer, Watch

__all__ = [
    "NAME",
    "RUN",
    "Attend",
    "Call",
    "FixedInputs",
    "Observer",
    "Span",
    "Step",
    "StepInputs",
    "Watch",
    "aligned",
    "backend",
    "configs_of",
    "current_step",
    "cut",
    "listed",
    "register",
    "replayable",
    "serving",
]
