"""Where pages go that leave the device: host memory, and files that outlive the process.

A page is stored as bytes: of each cache group one row, all layers behind one another (`PagedStore.read_pages`).
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidPromptCache
from ..kv_cache import PagedStore
from ..sealed import read, write
from .index import Node, Tokens

TRIAL = 64  # tokens that are computed to see how long a token takes
HEADER = 1 << 20  # bytes; ours are far shorter
ABANDONED = 3600.0  # seconds after which an unfinished file of a process that was killed is removed


class HostTier:
    """Rows of pages in host memory, kept on their nodes; the least recently used one goes first.

    Args:
        max_bytes: Most bytes of all rows.
        on_evict: Called with a node that lost a row.
    """

    def __init__(self, max_bytes: int, on_evict: Callable[[Node], None]) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._on_evict = on_evict
        self._rows: dict[tuple[Node, int], None] = {}

    def put(self, node: Node, group: int, row: Tensor | None = None) -> None:
        """Store a page's row, or use the one that is stored; others may have to go."""
        if row is not None:
            self.remove(node, group)
            node.copies[group] = row
            self.bytes += row.numel()
        self._rows.pop((node, group), None)
        self._rows[node, group] = None
        while self.bytes > self.max_bytes:
            oldest, its_group = next(iter(self._rows))
            self.remove(oldest, its_group)
            self._on_evict(oldest)

    def remove(self, node: Node, group: int) -> None:
        """Forget a row; harmless if there is none."""
        if node.copies[group] is not None:
            self.bytes -= node.copies[group].numel()
            node.copies[group] = None
            del self._rows[node, group]


class DiskTier:
    """One safetensors file per page, named by the digest of all that its contents depend on.

    The folder itself is the index: a file appears under its name in one atomic step, complete. So nothing is torn when
    a process is killed, and processes that share the folder need no lock. Each file carries a checksum and its tokens,
    which are compared before anything is used. Its time says when it was used last, less a little for each page before
    it: so of a prompt that was used at one time the last page is removed first, and what is left can be found.

    Args:
        folder: Made if it is not there.
        max_bytes: Most bytes of files; those that were not used for longest are removed.
        ttl: Seconds after its last use at which a file is removed, or `None`.
    """

    def __init__(self, folder: str | Path, max_bytes: int, ttl: float | None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.ttl = ttl
        self.bytes = 0
        self._broken: set[bytes] = set()
        self.trim()

    def path(self, digest: bytes) -> Path:
        """Where a page's file is, or would be."""
        name = digest.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def groups(self, digest: bytes) -> frozenset[int]:
        """The cache groups whose page is stored; empty if there is no file, or it is broken or too old."""
        path = self.path(digest)
        try:
            used = path.stat().st_mtime
        except OSError:
            return frozenset()
        if digest in self._broken:
            return frozenset()
        if self.ttl is not None and time.time() - used > self.ttl:
            self.delete(digest)
            return frozenset()
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), HEADER)))
            return frozenset(map(int, header.keys() - {"__metadata__"}))
        except (OSError, ValueError, AttributeError) as error:
            self._ignore(digest, repr(error))
            return frozenset()

    def load(self, digest: bytes, tokens: Tokens, used: int) -> dict[int, Tensor]:
        """The rows of a page by cache group; empty if the file is gone, broken, or of other tokens."""
        path = self.path(digest)
        try:
            tensors, metadata = read(path)
            if metadata.get("tokens") != json.dumps(tokens):
                raise InvalidPromptCache("it holds other tokens")
            self.touch(digest, used)
            return {int(group): row for group, row in tensors.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._ignore(digest, str(error))
            return {}

    def touch(self, digest: bytes, used: int) -> bool:
        """Note when a page was used, in nanoseconds; `False` if there is no file."""
        try:
            os.utime(self.path(digest), ns=(used, used))
        except OSError:
            return False
        return True

    def save(self, digest: bytes, tokens: Tokens, rows: Mapping[int, Tensor], used: int) -> bool:
        """Write a page that was used at a time, in nanoseconds; `False` if it is not stored.

        A disk that is full or gone is no reason to fail: then there is a warning.
        """
        path = self.path(digest)
        try:
            path.parent.mkdir(exist_ok=True)
            self.bytes += write(path, {str(group): row for group, row in rows.items()}, {"tokens": json.dumps(tokens)})
        except OSError as error:
            warnings.warn(
                f"llmopt: a page of the prompt cache could not be written: {error}", UserWarning, stacklevel=2
            )
        self._broken.discard(digest)
        stored = self.touch(digest, used)
        if self.bytes > self.max_bytes:
            self.trim()
            stored = path.exists()
        return stored

    def delete(self, digest: bytes) -> None:
        """Remove a page's file; harmless if there is none."""
        self.path(digest).unlink(missing_ok=True)

    def trim(self) -> None:
        """Count the files; remove what is too old, unfinished, or too much."""
        files, now = [], time.time()
        for path in self.folder.glob("??/*"):
            try:
                info = path.stat()
                limit = ABANDONED if path.suffix == ".tmp" else self.ttl
                if limit is not None and now - info.st_mtime > limit:
                    path.unlink()
                else:
                    files.append((info.st_mtime, info.st_size, path))
            except OSError:  # another process was faster
                continue
        self.bytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files) if self.bytes > self.max_bytes else ():
            path.unlink(missing_ok=True)
            self.bytes -= size
            if self.bytes <= 0.9 * self.max_bytes:  # some air, so that not every page counts the files again
                break

    def _ignore(self, digest: bytes, why: str) -> None:
        self._broken.add(digest)
        warnings.warn(
            f"llmopt: {self.path(digest)} is not a page of the prompt cache and is ignored ({why}).",
            UserWarning,
            stacklevel=2,
        )


def compute_seconds(model: PreTrainedModel, tokens: int) -> float:
    """What it takes the model to compute `tokens` tokens of a prompt."""
    config = model.config.get_text_config(decoder=True)
    count = min(TRIAL, getattr(config, "max_position_embeddings", None) or TRIAL)
    weight: Any = model.get_input_embeddings().weight
    ids = torch.zeros(1, count, dtype=torch.long, device=weight.device)
    with torch.no_grad():
        return _best(lambda: model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()) * tokens / count


def host_seconds(store: PagedStore) -> float:
    """What it takes to bring a page back from host memory."""
    size = sum(store.page_bytes(group) for group in range(len(store.groups)))
    row = torch.zeros(size, dtype=torch.uint8, device="cpu")
    return _best(lambda: row.to(store.layers[0].device, copy=True)[0].item())


def disk_seconds(store: PagedStore, disk: DiskTier) -> float:
    """What it takes to bring a page back from disk."""
    digest = os.urandom(16)
    sizes = {group: store.page_bytes(group) for group in range(len(store.groups))}
    rows = {group: torch.zeros(size, dtype=torch.uint8, device="cpu") for group, size in sizes.items()}
    disk.save(digest, (), rows, time.time_ns())
    seconds = _best(lambda: disk.load(digest, (), time.time_ns()))
    disk.delete(digest)
    return seconds


def _best(run: Callable[[], Any], times: int = 3) -> float:
    found = []
    for _ in range(times):
        began = perf_counter()
        run()
        found.append(perf_counter() - began)
    return min(found)
