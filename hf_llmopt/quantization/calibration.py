"""The calibration set: whatever the user has, as token ids `[samples, length]`."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationFailed

_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "test", "tests", "idle_test"})
REMEDY = "Pass calibration=[text, ...] or token ids of at least that length, as the model will meet them."


def pack(calibration: Any, tokenizer: Any, samples: int, length: int, vocabulary: int) -> Tensor:
    """Make token ids of a calibration set: texts behind one another, cut into samples.

    Args:
        calibration: An iterable of texts, of token ids (tensors or lists), or of rows of a dataset with `"input_ids"`
            or `"text"`; a tensor of ids, a list of ids or a text by itself; `None` for `documentation()`. No more is
            read than is used.
        tokenizer: Of the model; may be `None` if everything is token ids.
        samples: At most so many.
        length: Tokens of a sample.
        vocabulary: How many ids the model knows.

    Returns:
        int64 `[samples or fewer, length]`.

    Raises:
        CalibrationFailed: There is nothing, too little, no tokenizer for a text, or an id the model does not know.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], None, samples=8, length=2, vocabulary=6).tolist()
        [[1, 2], [3, 4]]
    """
    ids: list[int] = []
    for item in documentation() if calibration is None else _items(calibration):
        ids += _ids(item, tokenizer)
        if len(ids) >= samples * length:
            break
    count = min(samples, len(ids) // length)
    if count == 0:
        amount = f"{len(ids)} tokens, too few for one sample of {length}" if ids else "nothing in it"
        hint = " Give more, or a smaller length=." if ids else ""
        if isinstance(calibration, str) and os.path.isfile(calibration):
            hint += " The text given is the name of a file: pass what it holds, [Path(name).read_text()]."
        raise CalibrationFailed(f"The calibration set has {amount}.{hint} {REMEDY}")
    packed = torch.tensor(ids[: count * length]).view(count, length)
    wrong = packed[(packed < 0) | (packed >= vocabulary)]
    if len(wrong):
        raise CalibrationFailed(
            f"The calibration set has token id {int(wrong[0])}, the model knows 0 to {vocabulary - 1}. "
            "Was it made with the tokenizer of another model?"
        )
    return packed


def _items(calibration: Any) -> Iterable[Any]:
    """The texts or rows of ids of whatever was given."""
    if isinstance(calibration, (str, bytes)) or getattr(calibration, "ndim", 2) < 2:  # of a tensor or an array
        return [calibration]
    if isinstance(calibration, Mapping):  # what a tokenizer returns; or columns
        rows: Any = calibration.get("input_ids", calibration.get("text"))
        return _items(rows) if rows is not None else [calibration]
    if isinstance(calibration, (list, tuple)) and calibration and isinstance(calibration[0], int):
        return [calibration]
    if not isinstance(calibration, Iterable):
        raise CalibrationFailed(f"A calibration set is texts or token ids, got {type(calibration).__name__}. {REMEDY}")
    return calibration


def _ids(item: Any, tokenizer: Any) -> list[int]:
    """The token ids of one text or row."""
    if isinstance(item, Mapping):
        found = item.get("input_ids", item.get("text"))
        if found is None:
            raise CalibrationFailed(
                f"A row of the calibration set has {', '.join(map(repr, item))}, not 'input_ids' or 'text'. {REMEDY}"
            )
        item = found
    if isinstance(item, str):
        if tokenizer is None:
            raise CalibrationFailed("The calibration set has texts, and there is no tokenizer. Pass token ids instead.")
        return list(tokenizer(item, verbose=False)["input_ids"])
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise CalibrationFailed(f"A calibration set is texts or token ids, got {type(item).__name__}. {REMEDY}")
    numbers: list[int] = ids.flatten().tolist()
    return numbers


def documentation(root: Path | None = None) -> Iterator[str]:
    """The documentation of the Python that runs this, a module or a topic of the language reference at a time.

    It is plain English with examples of code, it is everywhere, and nothing has to be downloaded or licensed. The order
    is that of a hash of the names: the first few are a fair sample, and the same on each run.

    Args:
        root: A folder with a standard library; by default the one of the running Python.

    Raises:
        CalibrationFailed: There are no sources, as in a Python that ships compiled files only.

    Example:
        >>> len(next(documentation())) > 100
        True
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    chosen = [name for name in names if _SKIPPED.isdisjoint(Path(name).parts)]
    if not chosen:
        raise CalibrationFailed(f"There is no Python source under {root} to calibrate on. {REMEDY}")
    topics = _topics(root / "pydoc_data" / "topics.py")
    for name in sorted([*chosen, *topics], key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = topics[name] if name in topics else _docstrings(root / name)
        if len(text) > 100:
            yield text


def _topics(path: Path) -> dict[str, str]:
    """The language reference, a dictionary of plain texts."""
    if not path.is_file():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return {f"topic {name}": text for topics in found for name, text in topics.items()}


def _docstrings(path: Path) -> str:
    """All docstrings of a module, in their order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError):  # a few files are wrong on purpose
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text)
