"""Keys of clients. Only their digests are kept; nothing here is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidOption

VARIABLE = "HF_LLMOPT_API_KEYS"


class Keys:
    """The keys that are let in; with none, everybody is.

    Args:
        keys: The keys themselves.

    Example:
        >>> from hf_llmopt.serving import Keys
        >>> keys = Keys(["first", "second"])
        >>> keys.owner("Bearer second"), keys.owner("Bearer third")
        ('key-1', None)
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """The keys of a file, one a line, and of the environment variable `HF_LLMOPT_API_KEYS`, between commas.

        Raises:
            InvalidOption: There is a file without a key, or the variable is set and has none.
            OSError: It cannot be read.
        """
        lines = [] if file is None else [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        given = [line for line in lines if line and not line.startswith("#")]
        if file is not None and not given:
            raise InvalidOption(f"{str(file)!r} has no key; write one a line.")
        variable = os.environ.get(VARIABLE)
        others = [key for key in map(str.strip, (variable or "").split(",")) if key]
        if variable is not None and not others:  # a secret that did not arrive must not open the server
            raise InvalidOption(f"{VARIABLE} is set and has no key; write keys between commas, or unset it.")
        return cls([*given, *others])

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self)})"

    def owner(self, header: str) -> str | None:
        """Whose `Authorization` header this is, or `None`. Takes as long for a wrong key as for a right one."""
        scheme, _, key = header.partition(" ")
        digest, found = _digest(key.strip()), None
        for index, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = f"key-{index}"
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
