"""Part 3: another number format for the weights of products."""

from .formats import Recipe, Scheme
from .grid import make_grid
from .head import QuantizedHead
from .in_place import quantize
from .linear import QuantizedLinear
from .loading import LOADING, answering, has, require_entry, stored_quantized
from .quantizer import Quantizer, Unloadable
from .report import QuantizationReport

__all__ = [
    "LOADING",
    "QuantizationReport",
    "QuantizedHead",
    "QuantizedLinear",
    "Quantizer",
    "Recipe",
    "Scheme",
    "Unloadable",
    "answering",
    "has",
    "make_grid",
    "quantize",
    "require_entry",
    "stored_quantized",
]
