"""`PromptHandle`: a prompt that the user wants kept, for system prompts and documents."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidOption, InvalidPromptCache, OutOfPages
from ..kv_cache import BlockTable
from ..sealed import read, write
from .cache import SETTINGS, WEIGHTS, PromptCache
from .prefix import Name

FORMAT = "hf_llmopt prompt 2"


class PromptHandle:
    """A prompt whose keys and values are in the model's prompt cache; `model.llmopt.cache_prompt` makes one.

    Every later call whose prompt begins with the same tokens finds them. A pinned prompt cannot be evicted: it holds
    its pages as a running request does. New weights unpin it, since its keys are stale then, and so does
    `model.llmopt.release()`; `pin` computes it again.

    Attributes:
        tokens: The prompt's ids.

    Example:
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> _ = model.generate(**tokenizer("x", return_tensors="pt"), llmopt=True, max_new_tokens=1)
        >>> prompt = model.llmopt.cache_prompt(tokenizer("import os, sys, re")["input_ids"])
        >>> prompt.pinned, prompt.cached_tokens == len(prompt.tokens)
        (True, True)
        >>> prompt.unpin()
        >>> prompt.delete()
        >>> prompt.cached_tokens
        0
    """

    def __init__(
        self,
        find: Callable[[], PromptCache | None],
        lock: threading.Condition,
        tokens: Sequence[int],
        salt: str | None,
        compute: Callable[[list[int]], None],
    ) -> None:
        self.tokens = list(tokens)
        self._find = find  # the model's cache as of now, `None` if the model is gone
        self._lock = lock
        self._salt = salt
        self._compute = compute
        self._ttl: float | None = None
        self._rows: list[list[BlockTable]] = []  # of a pinned prompt: its tables
        self._cache: Any = None  # the one found last
        self._finalizer: Any = None
        self._connect()

    def __repr__(self) -> str:
        return (
            f"PromptHandle({len(self.tokens)} tokens, {self.cached_tokens} cached{', pinned' if self.pinned else ''})"
        )

    @property
    def pinned(self) -> bool:
        """Whether the prompt's pages are held, and hold what the model would compute now."""
        with self._lock:
            if self._rows:
                self._cache.refresh()
            return bool(self._rows)

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens a request would find now, the last one counted too."""
        with self._lock:
            self._connect()
            tables = self._cache.store.tables([0] * len(self._cache.store.groups))
            found = self._attach(tables)
            _clear(tables)
        return found

    @property
    def ttl(self) -> float | None:
        """Seconds after its last use at which the prompt is given up, pinned or not; `None` for the cache's own limit.

        Raises:
            InvalidOption: On setting something that is not a positive number or `None`.
        """
        return self._ttl

    @ttl.setter
    def ttl(self, seconds: float | None) -> None:
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0):
            raise InvalidOption(f"ttl is a positive number of seconds or None, got {seconds!r}.")
        self._ttl = seconds
        with self._lock:
            self._set_ttl()

    def pin(self) -> None:
        """Hold the prompt's pages until `unpin`, and compute what is missing of them. Harmless if they are held.

        Raises:
            OutOfPages: The KV cache has no room to hold them.
        """
        for attempt in range(2):
            with self._lock:
                self._connect()
                if self._rows:
                    return
                tables = self._cache.store.tables([0] * len(self._cache.store.groups))
                if self._attach(tables) == len(self.tokens):
                    self._hold(tables)
                    return
                _clear(tables)
            if not attempt:
                self._compute(self.tokens)
        raise OutOfPages(
            f"The prompt's {len(self.tokens)} tokens were evicted before they could be pinned. Raise "
            "PromptCacheConfig(max_bytes=...), or KVCacheConfig(max_tokens=..., memory_fraction=...)."
        )

    def unpin(self) -> None:
        """Let the prompt be evicted when its turn comes. Harmless if it is not pinned."""
        with self._lock:
            for tables in self._rows:
                _clear(tables)
            self._rows.clear()
            self._cache.pinned.discard(self)
            self._lock.notify_all()

    def delete(self) -> None:
        """Forget the prompt and all that continues it; what others hold of it or go on from before its end stays.

        Its pages on disk are removed too. Files of longer texts can be found no longer without them.
        """
        with self._lock:
            self._connect()
            self.unpin()
            nodes, found = self._cache.path(self._name(), self.tokens)
            while found == len(self.tokens):
                self._cache.trees.delete(nodes[-1])
                nodes, found = self._cache.path(self._name(), self.tokens)
            for node in reversed(nodes[: found // self._cache.store.page_size]):
                if node.children or self._cache.trees.is_held(node):
                    break
                self._cache.trees.delete(node)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the prompt's keys and values to a safetensors file, for `model.llmopt.load_prompt`.

        Args:
            path: The file, readable by its owner only; an old one is replaced in one step.

        Raises:
            OutOfPages: As `pin`.
            OSError: The file cannot be written.
        """
        pinned = self.pinned
        self.pin()
        with self._lock:
            size = self._cache.store.page_size
            full, rest = divmod(len(self.tokens), size)
            tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.int64, device="cpu")}
            for index, table in enumerate(self._rows[0]):
                if pages := list(table.pages[table.passed : full]):
                    tensors[f"pages.{index}"] = self._cache.store.read_pages(index, pages, size)
                if rest and table.passed <= full:
                    tensors[f"rest.{index}"] = self._cache.store.read_pages(index, [table.pages[full]], rest)
            key = self._cache.key(self._name()).hex()
            facts = json.dumps(self._cache.facts(self._name()))
        if not pinned:
            self.unpin()
        write(Path(path), tensors, {"format": FORMAT, "key": key, "facts": facts})

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        find: Callable[[], PromptCache | None],
        lock: threading.Condition,
        salt: str | None,
        compute: Callable[[list[int]], None],
    ) -> PromptHandle:
        """Read what `save` wrote and pin it; see `model.llmopt.load_prompt`."""
        try:
            tensors, metadata = read(Path(path))
            if metadata.get("format") != FORMAT:
                raise ValueError("it holds something else, or is of an older version")
        except ValueError as error:
            raise InvalidPromptCache(f"{str(path)!r} is no saved prompt, or a damaged one: {error}.") from error
        handle = cls(find, lock, tensors["tokens"].tolist(), salt, compute)
        with lock:
            handle._connect()
            if metadata["key"] != handle._cache.key(handle._name()).hex():
                saved, here = json.loads(metadata["facts"]), handle._cache.facts(handle._name())
                raise InvalidPromptCache(
                    f"{str(path)!r} does not fit: it was saved with {_differences(saved, here)}. "
                    "Make it again with cache_prompt(...).save(...)."
                )
            handle._take_in(tensors)
        return handle

    def _take_in(self, tensors: dict[str, Tensor]) -> None:
        """Fill pages with what was saved, enter them, and hold what the cache finds then."""
        store, count = self._cache.store, len(self.tokens)
        full, rest = divmod(count, store.page_size)
        tables, held = (store.tables([0] * len(store.groups)) for _ in range(2))
        try:
            for index, (group, table) in enumerate(zip(store.groups, tables, strict=True)):
                table.skip(group.first_visible(count))
                store.provide(
                    [table.missing(table.passed * store.page_size, count) * (i == index) for i in range(len(tables))]
                )
                table.reserve(table.passed * store.page_size, count)
                if pages := list(table.pages[table.passed : full]):
                    store.write_pages(index, pages, store.page_size, tensors[f"pages.{index}"])
                if rest and table.passed <= full:
                    store.write_pages(index, [table.pages[full]], rest, tensors[f"rest.{index}"])
            trees = self._cache.trees
            trees.put(trees.root(self._name(), self._cache.key), self.tokens, tables)
            self._attach(held)
            self._hold(held)
        finally:
            _clear(tables)

    def _connect(self) -> None:
        """Belong to the cache that the model uses now: `release` gives one up, and so does moving the model."""
        cache = self._find() or self._cache
        if cache is not self._cache:
            if self._cache is not None:
                self.unpin()
                self._finalizer.detach()
            self._cache = cache
            self._finalizer = weakref.finalize(self, cache.store.dropped.append, self._rows)
        cache.refresh()

    def expire(self) -> None:
        """Unpin the prompt if its time has passed. Called with the lock held."""
        if self._cache.path(self._name(), self.tokens)[1] < len(self.tokens):
            self.unpin()

    def _hold(self, tables: list[BlockTable]) -> None:
        self._rows.append(tables)
        self._cache.pinned.add(self)
        self._set_ttl()

    def _set_ttl(self) -> None:
        for node in self._cache.path(self._name(), self.tokens)[0]:
            node.ttl = self._ttl if self._ttl is not None else self._cache.config.ttl

    def _attach(self, tables: Sequence[BlockTable]) -> int:
        return self._cache.attach(self._name(), self.tokens, len(self.tokens), tables)

    def _name(self) -> Name:
        return self._cache.name(self._salt)


def _differences(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What of `PromptCache.facts` differs, as text."""
    differ = [name for name in here if saved[name] != here[name]]
    if "dtype" in differ or "version of transformers" in differ:
        differ = [name for name in differ if name != WEIGHTS]  # they differ then in any case
    said = [
        f"another {name}" + (f" ({saved[name]}, here {here[name]})" if name not in (WEIGHTS, SETTINGS) else "")
        for name in differ
    ]
    return ", ".join(said) or "another salt"  # which no file tells


def _clear(tables: Sequence[BlockTable]) -> None:
    for table in tables:
        table.clear()
