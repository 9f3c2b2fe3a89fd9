"""Part 3: another number format for the weights of products."""

from .formats import Recipe, Scheme
from .grid import make_grid
from .linear import QuantizedHead, QuantizedLinear
from .quantizer import LOADING, QuantizationReport, Quantizer, answering, has, quantize

__all__ = [
    "LOADING",
    "QuantizationReport",
    "QuantizedHead",
    "QuantizedLinear",
    "Quantizer",
    "Recipe",
    "Scheme",
    "answering",
    "has",
    "make_grid",
    "quantize",
]
