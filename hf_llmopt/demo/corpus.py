"""The texts of the embedded pair: the source and the reference topics of the Python that runs this file.

Every Python carries its standard library, so the pair can be retrained, and its quality measured, anywhere and without
a download. Which part a text belongs to follows from a hash of its name alone: a module held out when the shipped
weights were trained is held out on every other Python too, whatever its version and whatever is installed beside it.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")

# Percent of all names. Validation chooses the checkpoint, held-out texts are only ever measured.
_HELD_OUT, _VALIDATION = 4, 2

# Installed packages are not the standard library; `encodings` is a million characters of generated tables.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        name: The path relative to the standard library, as `"json/decoder.py"`, or `"pydoc_data/topics/with"`.
        text: The whole text.
    """

    name: str
    text: str

    @property
    def split(self) -> Split:
        """The part of the corpus that the name belongs to."""
        percentile = _digest(self.name)[0] * 100 // 256
        if percentile < _HELD_OUT:
            return "held_out"
        return "validation" if percentile < _HELD_OUT + _VALIDATION else "train"


def documents(split: Split, root: Path | None = None) -> list[Document]:
    """Reads one part of the corpus.

    Args:
        split: The part.
        root: A folder with a standard library; by default the one of the running Python.

    Returns:
        The documents without exact duplicates, in the order of a hash of their names: the first few are a fair sample.

    Raises:
        FileNotFoundError: `root` holds no Python source, as in a Python that ships compiled files only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    unique: dict[bytes, Document] = {}
    for document in sorted(_read(root), key=lambda document: _digest(document.name)[1:]):
        unique.setdefault(_digest(document.text), document)
    if not unique:
        raise FileNotFoundError(f"no Python source under {root}; pass the folder of a library that has its .py files")
    return [document for document in unique.values() if document.split == split]


def held_out_texts(root: Path | None = None) -> list[str]:
    """Returns the texts that neither the tokenizer nor the models were trained on.

    Args:
        root: A folder with a standard library; by default the one of the running Python.

    Returns:
        Whole modules and reference topics; any first few of them are a fair sample.

    Example:
        >>> from hf_llmopt.demo.corpus import held_out_texts
        >>> len(held_out_texts()) > 10
        True
    """
    return [document.text for document in documents("held_out", root)]


def fingerprint(root: Path | None = None) -> str:
    """Returns a hash of the held-out texts, which tells whether two measurements are of the same ones."""
    return _digest("\0".join(held_out_texts(root))).hex()


def _read(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts):
            yield from _topics(path) if name.as_posix() == _TOPICS else _module(path, name.as_posix())


def _module(path: Path, name: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few tests are written in other encodings on purpose
        return
    if text.strip():
        yield Document(name, text)


def _topics(path: Path) -> Iterator[Document]:
    """The language reference, a dictionary of plain texts; not imported, for it may be another Python's."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(f"pydoc_data/topics/{topic}", text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
