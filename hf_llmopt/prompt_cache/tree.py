"""The trees of pages that can be found: what they hold on the device, in host memory and on disk.

`put` and `bring` make pages findable. They leave when the pool needs them (to host memory, where there is room), when
they are dropped, and when their time has passed; a node that holds nothing in memory any more leaves its tree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from time import monotonic, time_ns
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import PromptCacheConfig
from ..kv_cache import BlockTable, PagedStore
from ..kv_cache.transfer import free_bytes
from ..stats import PromptCacheStats
from .index import Node, Tokens
from .prefix import Name
from .store import DiskTier, HostTier, compute_seconds, disk_seconds, host_seconds

PRECEDENCE = 1000  # nanoseconds by which a file of a prompt seems older than that of the page before
SHARE = 8  # one part in so many of the free memory is for kept pages, unless the user says otherwise


class PageTrees:
    """Which node has which page, the same in the trees, the pools and the tiers.

    A page of the device belongs to one node at most, `owners` says to which, and its pool marks exactly those pages as
    findable. Between calls, every node below a root holds contents in memory, or leads to one that does.

    Args:
        model: Timed, to see which tiers are faster than computing a page; not kept.
        store: The pages.
        config: Bounds and tiers.
        stats: Where loads and evictions are counted.

    Attributes:
        roots: The trees by name.
        owners: Per cache group, the node of each page that can be found.
        host: Host memory, or `None`.
        disk: Files, or `None`.
    """

    def __init__(
        self, model: PreTrainedModel, store: PagedStore, config: PromptCacheConfig, stats: PromptCacheStats
    ) -> None:
        self.store = store
        self.config = config
        self.stats = stats
        self.roots: dict[Name, Node] = {}
        self.owners: list[dict[int, Node]] = [{} for _ in store.groups]
        device = store.layers[0].device
        most = free_bytes(device) // SHARE if config.max_bytes is None else config.max_bytes
        page_bytes = sum(store.page_bytes(index) for index in range(len(store.groups)))
        reference = weakref.WeakMethod(self._evicted)
        for index, group in enumerate(store.groups):
            group.pool.most_kept = most // page_bytes
            group.pool.on_evict = _calls(reference, index)
        self.host, self.disk = self._tiers(model, device)

    def _tiers(self, model: PreTrainedModel, device: torch.device) -> tuple[HostTier | None, DiskTier | None]:
        """The tiers that are asked for and load a page faster than the model computes it."""
        room = self.config.host_bytes
        if room is None:
            room = 0 if device.type == "cpu" else int(psutil.virtual_memory().available) // SHARE
        disk = None
        if self.config.path is not None:
            disk = DiskTier(self.config.path, self.config.disk_bytes, self.config.ttl)
        if not room and disk is None:
            return None, None
        budget = compute_seconds(model, self.store.page_size)
        host = HostTier(room, self.prune) if room and host_seconds(self.store) < budget else None
        return host, disk if disk is not None and disk_seconds(self.store, disk) < budget else None

    # -- what is there --------------------------------------------------------------------------------------------

    def root(self, name: Name, key: Callable[[Name], bytes]) -> Node:
        """Where a tree begins, made if it is not there; files are named by its `key`."""
        if name not in self.roots:
            digest = key(name) if self.disk is not None else b""
            self.roots[name] = Node.root(name, digest, len(self.store.groups))
        return self.roots[name]

    def child(self, node: Node, wanted: Tokens) -> Node | None:
        """The child for a page of tokens, if need be from disk, or else the one that begins like it.

        One whose time has passed is dropped.
        """
        child = node.children.get(wanted)
        if child is None and self.disk is not None and len(wanted) == self.store.page_size:
            stored = self.disk.groups(node.child_digest(wanted))
            if stored:
                child = node.add(wanted)
                child.stored, child.used, child.ttl = stored, monotonic(), self.config.ttl
        child = child or node.closest(wanted)
        if child is not None and child.ttl is not None and monotonic() - child.used > child.ttl:
            self.drop(child)
            return None
        return child

    def is_held(self, node: Node) -> bool:
        """Whether a request or a pinned prompt holds a page of the node."""
        return any(group.pool.refs(page) for group, page in zip(self.store.groups, node.pages, strict=True))

    def touch(self, nodes: Sequence[Node]) -> None:
        """They were found now."""
        now = monotonic()
        for node in nodes:
            node.used = now

    # -- coming ---------------------------------------------------------------------------------------------------

    def put(self, root: Node, tokens: Sequence[int], tables: Sequence[BlockTable]) -> list[Node]:
        """Enter the pages that tables hold for `tokens`; returns their nodes, not always to the end of `tokens`."""
        size, node = self.store.page_size, root
        now, nodes = monotonic(), []
        for start in range(0, len(tokens), size):
            wanted = tuple(tokens[start : start + size])
            child = node.children.get(wanted)
            if child is None:
                near = node.closest(wanted)
                if near is not None and near.tokens[: len(wanted)] == wanted:
                    break  # a page that goes on longer serves as well
                if near is not None and wanted[: len(near.tokens)] == near.tokens:
                    self.drop(near)
                child = node.add(wanted)
                child.ttl = self.config.ttl
            child.used = now
            for index, table in enumerate(tables):
                entry = start // size
                page = table.pages[entry] if entry < len(table.pages) else 0
                if page and not child.pages[index] and page not in self.owners[index]:
                    self._own(index, child, page)
            nodes.append(child)
            node = child
        return nodes

    def _own(self, group: int, node: Node, page: int) -> None:
        node.pages[group] = page
        self.owners[group][page] = node
        self.store.groups[group].pool.keep(page)

    def bring(self, missing: Sequence[Sequence[Node]], held: list[tuple[int, int]], settle: Callable[[], None]) -> bool:
        """Bring pages back to the device from host memory and disk.

        Args:
            missing: Per cache group, nodes without a page.
            held: Is given the pairs (group, page) that were taken, with a reference each, after an error too.
            settle: Called before pages are written to.

        Returns:
            `False` if one turned out to be gone: nothing was taken then.

        Raises:
            OutOfPages: There is no room for them.
        """
        rows: list[list[Tensor]] = []
        loaded: dict[Node, dict[int, Tensor]] = {}
        now = time_ns()
        for index, nodes in enumerate(missing):
            rows.append([])
            for node in nodes:
                row = node.copies[index]
                if row is None and self.disk is not None:
                    if node not in loaded:
                        loaded[node] = self.disk.load(node.digest, node.tokens, now - PRECEDENCE * node.depth)
                    row = loaded[node].get(index)
                if row is None:
                    node.stored = frozenset()
                    return False
                rows[-1].append(row)
        settle()
        self.store.provide([len(nodes) for nodes in missing])
        for index, nodes in enumerate(missing):
            pages, _ = self.store.groups[index].pool.take(len(nodes))
            held += [(index, page) for page in pages]
            for length in {len(node.tokens) for node in nodes}:
                same = [i for i, node in enumerate(nodes) if len(node.tokens) == length]
                together = torch.stack([rows[index][i] for i in same])
                self.store.write_pages(index, [pages[i] for i in same], length, together)
            for node, page in zip(nodes, pages, strict=True):
                self._own(index, node, page)
                self.stats.host_loads += node.copies[index] is not None
                self.stats.disk_loads += node.copies[index] is None
        return True

    def save(self, nodes: Sequence[Node], is_current: Callable[[], bool]) -> None:
        """Write full pages that are not on disk.

        Args:
            nodes: Of the pages, along a path.
            is_current: Asked before anything is written: whether the pages are what the model would compute now.
        """
        disk = self.disk
        if disk is None:
            return
        whole = [node for node in nodes if len(node.tokens) == self.store.page_size]
        now = time_ns()
        for node in whole:
            if node.stored and not disk.touch(node.digest, now - PRECEDENCE * node.depth):
                node.stored = frozenset()
        new = [node for node in whole if not node.stored and any(node.pages)]
        if not new or not is_current():
            return
        rows: list[dict[int, Tensor]] = [{} for _ in new]
        for index in range(len(self.store.groups)):
            here = [i for i, node in enumerate(new) if node.pages[index]]
            if here:
                pages = [new[i].pages[index] for i in here]
                for i, row in zip(here, self.store.read_pages(index, pages, self.store.page_size), strict=True):
                    rows[i][index] = row
        for node, its_rows in zip(new, rows, strict=True):
            if not disk.save(node.digest, node.tokens, its_rows, now - PRECEDENCE * node.depth):
                break  # nobody finds what follows a page that is not there
            node.stored = frozenset(its_rows)

    # -- leaving --------------------------------------------------------------------------------------------------

    def _evicted(self, group: int, pages: Sequence[int]) -> None:
        """The pool gives up kept pages: what is worth it goes to host memory."""
        nodes = [self.owners[group].pop(page) for page in pages]
        self.stats.evictions += len(pages)
        if self.host is not None:
            for length in {len(node.tokens) for node in nodes}:
                new = [(n, p) for n, p in zip(nodes, pages, strict=True) if len(n.tokens) == length]
                rows = self.store.read_pages(group, [page for _, page in new], length)
                for (node, _), row in zip(new, rows, strict=True):
                    self.host.put(node, group, row.clone())
        for node in nodes:
            node.pages[group] = 0
            self.prune(node)

    def drop(self, top: Node) -> list[list[int]]:
        """Forget a node and all below it in memory; returns the pages of each group that are free now."""
        freed: list[list[int]] = [[] for _ in self.store.groups]
        for node in top.subtree():
            for index, page in enumerate(node.pages):
                pool = self.store.groups[index].pool
                if page:
                    del self.owners[index][page]
                    freed[index] += [page] if page in pool.kept else []
                    pool.forget(page)
                    node.pages[index] = 0
                if self.host is not None:
                    self.host.remove(node, index)
        top.detach()
        return freed

    def clear(self) -> None:
        """Forget everything but what is on disk."""
        for root in list(self.roots.values()):
            self.drop(root)
        self.roots.clear()

    def delete(self, node: Node) -> None:
        """Forget a node and all below it, on disk too."""
        for below in node.subtree() if self.disk is not None else ():
            if below.stored and self.disk is not None:
                self.disk.delete(below.digest)
        parent = node.parent
        self.drop(node)
        if parent is not None:
            self.prune(parent)

    def prune(self, node: Node | None) -> None:
        """Take nodes without contents out of the tree, from this one upwards."""
        while node is not None and node.bare:
            if node.parent is None and self.roots.get(node.name) is node:
                del self.roots[node.name]
            node.detach()
            node = node.parent


def _calls(method: weakref.WeakMethod[Any], group: int) -> Callable[[Sequence[int]], None]:
    """A pool must not keep the trees alive, which keep its tensors alive."""

    def call(pages: Sequence[int]) -> None:
        bound = method()
        if bound is not None:
            bound(group, pages)

    return call
