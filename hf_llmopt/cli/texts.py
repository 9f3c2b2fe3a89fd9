"""Reading a text file that a user named."""

from __future__ import annotations

from pathlib import Path

from .command import UserError


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: There is no such file, it is empty, or it is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}. "
            "Convert it, for example with `iconv -t UTF-8`."
        ) from error
    if not text.strip():
        raise UserError(f"{str(path)!r} is empty")
    return text
