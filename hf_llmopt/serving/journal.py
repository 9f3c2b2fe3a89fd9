"""A file of results that grows by whole lines, whatever ends the process that writes it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InvalidRequest

Key = str | int  # a request's `custom_id`, or its line in the input if it has none
BLOCK = 2**20
START = b'{"id": "batch_req_'  # of every result of a batch


@dataclass(frozen=True, slots=True)
class Made:
    """How a result came about.

    Attributes:
        request: Fingerprint of what was asked; `None` where the file does not say.
        setting: Fingerprint of who answered, likewise.
        failed: Whether it is an error.
    """

    request: str | None
    setting: str | None
    failed: bool


class Journal:
    """One JSON object a line, in the order in which they came. What `add` returned from is on the disk.

    A process may be killed in the middle of a line; the next one that opens the file cuts it off. One process writes at
    a time.

    Args:
        path: The file; it is made if it is not there.

    Attributes:
        known: The results that it holds, by their keys.

    Raises:
        InvalidRequest: Something else stands in the file, or another process writes it.
        OSError: It cannot be opened.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_llmopt.serving.journal import Journal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal(Path(folder) / "out.jsonl") as journal:
        ...         journal.add([{"custom_id": "a", "error": None}])
        ...     with Journal(Path(folder) / "out.jsonl") as journal:
        ...         print(*journal.known)
        a
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        fresh = not path.exists()
        if not (fresh or path.is_file()):  # a device may have no end
            raise InvalidRequest(f"{str(path)!r} is no regular file, and a batch goes on where its file ends.")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.known: dict[Key, Made] = dict(self._read())
            if fresh:
                self._keep_name()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Append results, and wait until the disk has them: of many at once that costs no more than of one.

        Raises:
            OSError: They cannot be written; the next process that opens the file finds all that were added before.
        """
        try:
            _write(self._file, "".join(json.dumps(result) + "\n" for result in results).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.known.update((key_of(result), made(result)) for result in results)

    def drop_failed(self) -> None:
        """Drop the results that are errors, all or none of them, whatever ends the process.

        Raises:
            OSError: The others cannot be written again; then all are still there.
        """
        path = self._path.resolve()  # a link stays one
        new = path.with_name(path.name + ".new")
        kept = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
        try:
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with path.open("rb") as file:
                while lines := file.readlines(BLOCK):
                    _write(kept, b"".join(line for line in lines if not made(json.loads(line)).failed))
            os.replace(new, path)
        except BaseException:
            os.close(kept)
            new.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file = kept
        self._keep_name()
        self.known = {key: how for key, how in self.known.items() if not how.failed}

    def _keep_name(self) -> None:
        """Let the file's name outlive a crash of the machine too."""
        folder = os.open(self._path.resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _lock(self) -> None:
        other = InvalidRequest(f"Another process writes {str(self._path)!r}; wait for it or give another.")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, however that ends
        except BlockingIOError as error:
            raise other from error
        if os.fstat(self._file).st_ino != self._path.stat().st_ino:  # it was replaced since we opened it
            raise other

    def _read(self) -> Iterator[tuple[Key, Made]]:
        """All whole lines; what stands behind the last one is cut off."""
        whole = 0
        with os.fdopen(os.dup(self._file), "rb", BLOCK) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if not (line.startswith(START) or START.startswith(line)):
                        raise InvalidRequest(
                            f"{str(self._path)!r} ends with something that is no result of a batch; give another file."
                        )
                    break
                try:
                    result = json.loads(line)
                    yield key_of(result), made(result)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InvalidRequest(
                        f"Line {number} of {str(self._path)!r} is no result of a batch; give another file."
                    ) from error
                whole += len(line)
        if os.fstat(self._file).st_size > whole:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)


def key_of(result: dict[str, Any]) -> Key:
    """What a result belongs to.

    Raises:
        KeyError, TypeError: It is no result.
    """
    named: Key = result["custom_id"] if result["custom_id"] is not None else result["error"]["line"]
    if not isinstance(named, (str, int)):
        raise TypeError(named)
    return named


def made(result: dict[str, Any]) -> Made:
    """How a result came about.

    Raises:
        KeyError, TypeError: It is no result.
    """
    response, marks = result.get("response"), result.get("fingerprint")
    request, setting = (marks["request"], marks["setting"]) if marks is not None else (None, None)
    failed = result["error"] is not None or (response is not None and response["status_code"] >= 400)
    return Made(request, setting, failed)


def _write(file: int, data: bytes) -> None:
    """Append bytes, and wait until the disk has them."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)
