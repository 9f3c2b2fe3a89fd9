"""A small trained pair, a target and a draft model for Python source, that comes with the package.

It lets examples, tests and benchmarks meet real distributions (acceptance of drafts, perplexity, repeated text) without
a download. It completes code; it knows nothing else. `python -m hf_llmopt.demo.train` trains it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPTS = (
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\ndef main(",
    "def read_lines(path):\n    with open(path",
    'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x, y):',
    "import unittest\n\nclass TestQueue(unittest.TestCase):\n    def setUp(self):",
    "    try:\n        value = int(text)\n    except ValueError",
)
"""Beginnings of Python code. None ends in blanks: a line break and its indentation are one token."""


def path(name: Literal["target", "draft"] = "target") -> Path:
    """Returns the folder of a model, for `from_pretrained`.

    Args:
        name: Which of the two models.

    Returns:
        A folder with weights, configuration and tokenizer.

    Raises:
        ValueError: The name is another one.

    Example:
        >>> from hf_llmopt import demo
        >>> demo.path("draft").name
        'draft'
    """
    if name not in ("target", "draft"):
        raise ValueError(f"there is no demo model {name!r}; the two are 'target' and 'draft'")
    return Path(__file__).parent / "data" / name


def load(draft: bool = False, dtype: torch.dtype | str = "float32") -> tuple[PreTrainedModel, Any]:
    """Loads one model of the pair.

    Args:
        draft: The draft model instead of the target.
        dtype: The type of the weights, which are stored as bfloat16.

    Returns:
        The model, in evaluation mode on the CPU, and its tokenizer.

    Example:
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> model.num_parameters() // 1_000_000
        7
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path("draft" if draft else "target")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)
