"""Benchmarks: a file named after each command, `NAME.py`, and its tables there or in `NAME_tables.py`.

All measure against stock transformers in the same process.

A benchmark returns a report, a dict ready for JSON that holds every raw sample; `report.py` makes tables of it. Figures
of speed appear only beside the result of comparing tokens in the same runs.
"""

from .equality import Equality, compare
from .measure import Ratio, Run, environment, generate, interleave, paired_ratio

__all__ = ["Equality", "Ratio", "Run", "compare", "environment", "generate", "interleave", "paired_ratio"]
