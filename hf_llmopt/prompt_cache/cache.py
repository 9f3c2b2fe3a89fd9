"""`PromptCache`: what the engine asks before it computes a prompt, and tells after it computed anything.

```
find:   prompt ─▶ tree ─▶ pages of every group (host and disk copies come back to the device) ─▶ the request's tables
enter:  full pages, as soon as they are computed; the last, partly filled one when the request ends
```

A page that can be found is marked in its pool (`PagePool.keep`). Held by requests it is theirs, and whoever wants to
write to it copies it first; held by nobody it is kept until its turn to be evicted comes. So a partly filled page, or
the beginning of a full one, is shared, and copied by the first write: nothing else is needed for matches that end
inside a page.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from time import monotonic, time_ns
from typing import Any, NamedTuple, Protocol

import psutil
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..config import PromptCacheConfig
from ..errors import OutOfPages
from ..kv_cache import BlockTable, PagedStore
from ..kv_cache.store import free_bytes
from ..stats import PromptCacheStats
from .epoch import WeightsEpoch, adapted, fingerprint, settings
from .index import Node, Tokens, longest, walk
from .store import DiskTier, HostTier, compute_seconds, disk_seconds, host_seconds

PRECEDENCE = 1000  # nanoseconds by which a file of a prompt seems older than that of the page before
SETTINGS = "adapter or rotary settings"  # facts that are digests
WEIGHTS = "model or other weights"
SHARE = 8  # one part in so many of the free memory is for kept pages, unless the user says otherwise


class Name(NamedTuple):
    """Everything but tokens that a key depends on: the name of a tree."""

    epoch: int
    settings: str
    salt: str | None


@dataclass(eq=False)
class Prefix:
    """What a request that may share its pages remembers.

    Attributes:
        prompt: Tokens of its prompt.
        salt: Whose pages it may share.
        adapter: Which adapter its keys go through, `None` for what is active in the model.
        name: The tree it was looked up in.
        switches: How often adapters or rotary settings had been switched then.
        entered: Full pages that are in the tree.
        claimed: Nodes whose pages it computed and no sampled token had proven then.
    """

    prompt: int
    salt: str | None
    adapter: str | None = None
    name: Name | None = None
    switches: int = 0
    entered: int = 0
    claimed: list[Node] = field(default_factory=list)


class Computed(Protocol):
    """What the cache needs of a request.

    Attributes:
        tokens: Prompt and sampled tokens.
        tables: Block tables, one per cache group.
        computed: Tokens whose keys are in pages.
        known: How many of them the host knows.
        proven: Tokens whose keys gave logits from which a token was sampled: they hold no NaN.
        cached_tokens: Prompt tokens that were found.
        preemptions: How often it lost its pages.
        findable: How many leading tokens may be found.
        prefix: `None` if the request must not share.
    """

    tokens: list[int]
    tables: list[BlockTable]
    computed: int
    proven: int
    cached_tokens: int
    preemptions: int
    prefix: Prefix | None

    @property
    def findable(self) -> int: ...  # noqa: D102 - above

    @property
    def known(self) -> int: ...  # noqa: D102 - above


class PromptCache:
    """The pages of past requests, by their tokens. Every method is called with the engine's lock held.

    Args:
        model: Kept weakly.
        store: The pages.
        config: Bounds and tiers.
    """

    def __init__(self, model: PreTrainedModel, store: PagedStore, config: PromptCacheConfig) -> None:
        self._model = weakref.ref(model)
        self.store = store
        self.config = config
        self.stats = PromptCacheStats()
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()  # handles that hold pages
        self._epoch = WeightsEpoch()
        self._checked = False  # the weights, in this step
        self._seen = 0  # epoch that the trees belong to
        self._settings: dict[str | None, str] = {}  # by adapter
        self._adapted: list[Any] = []  # layers of PEFT
        self._active = ""  # settings as of the last pass
        self._switches = 0  # how often they changed
        self._fingerprint: bytes | None = None
        self._roots: dict[Name, Node] = {}
        self._owners: list[dict[int, Node]] = [{} for _ in store.groups]
        device = store.layers[0].device
        most = free_bytes(device) // SHARE if config.max_bytes is None else config.max_bytes
        page_bytes = sum(store.page_bytes(index) for index in range(len(store.groups)))
        reference = weakref.WeakMethod(self._evicted)
        for index, group in enumerate(store.groups):
            group.pool.most_kept = most // page_bytes
            group.pool.on_evict = _calls(reference, index)
        self._host, self._disk = self._tiers(model, device)

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
        host = HostTier(room, self._prune) if room and host_seconds(self.store) < budget else None
        return host, disk if disk is not None and disk_seconds(self.store, disk) < budget else None

    # -- before a request is computed -----------------------------------------------------------------------------

    def begin_step(self) -> None:
        """The weights may have changed since the last step."""
        self._checked = False
        self.watch()

    def watch(self) -> None:
        """Look whether adapters or rotary settings were switched, before and after each pass.

        Keys of a request that runs are then a mixture that no setting gives again: others must not find them.
        """
        model = self._model()
        if model is not None and (active := settings(model, self._adapted)) != self._active:
            self._active = active
            self._switches += 1

    def refresh(self) -> None:
        """Look whether the weights changed, and drop everything if they did."""
        self._checked = True
        model = self._model()
        if model is None:
            return
        self._epoch.check(model)
        if self._seen != self._epoch.number:
            self.stats.invalidations += bool(self._roots)
            self.clear()
            self._seen, self._fingerprint = self._epoch.number, None
        self._settings, self._adapted = {}, adapted(model)
        self.watch()
        if self._disk is not None:
            self.fingerprint()
        for handle in list(self.pinned):
            handle.expire()

    def weights_changed(self) -> None:
        """What was computed until now is stale."""
        self._epoch.advance()

    def name(self, salt: str | None, adapter: str | None = None) -> Name:
        """The tree of a salt and an adapter, as of the last `refresh`."""
        model = self._model()
        if adapter not in self._settings and model is not None:
            self._settings[adapter] = settings(model, self._adapted, adapter)
        return Name(self._seen, self._settings.get(adapter, ""), salt)

    def find(self, request: Computed, settle: Callable[[], None]) -> None:
        """Give a request, of which nothing is computed, the pages that hold the beginning of its tokens.

        The last token is always left to compute: its logits are wanted. Changes `tables`, `computed` and
        `cached_tokens`.

        Args:
            request: Its tables are empty.
            settle: Called before pages are written to: it does what else was planned for them.
        """
        prefix = request.prefix
        if prefix is None:
            return
        if not self._checked or self._seen != self._epoch.number:
            self.refresh()
        prefix.entered, prefix.name = 0, self.name(prefix.salt, prefix.adapter)
        prefix.switches = self._switches
        found = self.attach(prefix.name, request.tokens, request.findable, request.tables, settle)
        if found:
            request.computed = found
            prefix.entered = found // self.store.page_size
        if not request.preemptions:
            request.cached_tokens = min(found, prefix.prompt)

    def attach(
        self,
        name: Name,
        tokens: Sequence[int],
        limit: int,
        tables: Sequence[BlockTable],
        settle: Callable[[], None] = lambda: None,
    ) -> int:
        """Begin empty tables with the pages of the longest known beginning of `tokens`, of `limit` tokens at most.

        `settle` is called before pages are written to.

        Returns:
            How many tokens the tables hold.
        """
        size, groups = self.store.page_size, self.store.groups
        root = self._roots.get(name)
        if root is None and self._disk is None:
            return 0
        reached, found = walk(root or self._root(name), tokens, size, limit, self._child)
        nodes = reached
        elsewhere = True  # pages may come from the other tiers

        def has(node: Node, group: int) -> bool:
            if not _proven(node):
                return False
            copied = elsewhere and (node.copies[group] is not None or group in node.stored)
            return bool(node.pages[group]) or copied

        while found := longest(nodes, found, size, groups, has):
            nodes = nodes[: -(-found // size)]
            if found % size and not self._affords_copy(nodes, found, len(tokens)):
                found -= found % size
                continue
            try:
                if self._begin(nodes, found, tables, settle):
                    break
            except OutOfPages:
                elsewhere = False
        now = monotonic()
        for node in nodes if found else ():
            node.used = now
        for node in reached[-1:]:  # what is on disk only is not remembered
            self._prune(node)
        return found

    def _affords_copy(self, nodes: Sequence[Node], found: int, total: int) -> bool:
        """Whether a hit that ends inside a page fits: until it is copied, that page is needed beside its copy."""
        needs = -(-total // self.store.page_size) - found // self.store.page_size
        self.store.provide([needs] * len(self.store.groups))
        resting = [sum(node.pages[i] in g.pool.kept for node in nodes) for i, g in enumerate(self.store.groups)]
        return all(g.pool.free - count >= needs for g, count in zip(self.store.groups, resting, strict=True))

    def _begin(
        self, nodes: Sequence[Node], found: int, tables: Sequence[BlockTable], settle: Callable[[], None]
    ) -> bool:
        """Begin the tables with the nodes' pages; `False` if one of another tier turned out to be gone.

        Raises:
            OutOfPages: There is no room for pages of other tiers.
        """
        held: list[tuple[int, int]] = []  # (group, page): nobody may evict them while others are brought
        try:
            seen = [group.first_visible(found) // self.store.page_size for group in self.store.groups]
            for index, group in enumerate(self.store.groups):
                pages = [node.pages[index] for node in nodes[seen[index] :] if node.pages[index]]
                group.pool.share(pages)
                held += [(index, page) for page in pages]
            missing = [[n for n in nodes[first:] if not n.pages[i]] for i, first in enumerate(seen)]
            if any(missing) and not self._fetch(missing, held, settle):
                return False
            for index, (table, first) in enumerate(zip(tables, seen, strict=True)):
                passed = min(first, len(nodes))
                table.begin([0] * passed + [node.pages[index] for node in nodes[passed:]])
            return True
        finally:
            for index, page in reversed(held):
                self.store.groups[index].pool.release([page])

    def _fetch(
        self, missing: Sequence[Sequence[Node]], held: list[tuple[int, int]], settle: Callable[[], None]
    ) -> bool:
        """Bring the nodes' pages to the device, per cache group, and add them to `held`."""
        rows: list[list[Tensor]] = []
        loaded: dict[Node, dict[int, Tensor]] = {}
        now = time_ns()
        for index, nodes in enumerate(missing):
            rows.append([])
            for node in nodes:
                row = node.copies[index]
                if row is None and self._disk is not None:
                    if node not in loaded:
                        loaded[node] = self._disk.load(node.digest, node.tokens, now - PRECEDENCE * node.depth)
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

    def _child(self, node: Node, wanted: Tokens) -> Node | None:
        child = node.children.get(wanted)
        if child is None and self._disk is not None and len(wanted) == self.store.page_size:
            stored = self._disk.groups(node.child_digest(wanted))
            if stored:
                child = node.add(wanted)
                child.stored, child.used, child.ttl = stored, monotonic(), self.config.ttl
        child = child or node.closest(wanted)
        if child is not None and child.ttl is not None and monotonic() - child.used > child.ttl:
            self._drop(child)
            return None
        return child

    def _root(self, name: Name) -> Node:
        if name not in self._roots:
            digest = self.key(name) if self._disk is not None else b""
            self._roots[name] = Node.root(name, digest, len(self.store.groups))
        return self._roots[name]

    def key(self, name: Name) -> bytes:
        """128 bits for everything but tokens that the keys of a tree depend on, the same in every process."""
        parts = (self.fingerprint(), name.settings, name.salt, self.store.page_size, self.store.layers)
        return blake2b(repr(parts).encode(), digest_size=16).digest()

    def facts(self, name: Name) -> dict[str, str]:
        """What `key` is made of but for the salt, to say later what differs."""
        layers = self.store.layers
        return {
            "version of transformers": transformers.__version__,
            "dtype": ", ".join(sorted({str(layer.dtype).removeprefix("torch.") for layer in layers})),
            "format of pages": ", ".join(sorted({layer.form.name if layer.form else "auto" for layer in layers})),
            "page size": str(self.store.page_size),
            "device": ", ".join(sorted({str(layer.device) for layer in layers})),
            SETTINGS: blake2b(name.settings.encode(), digest_size=16).hexdigest(),
            WEIGHTS: self.fingerprint().hex(),
        }

    def fingerprint(self) -> bytes:
        """Of the model's weights as of the last `refresh`."""
        model = self._model()
        if self._fingerprint is None and model is not None:
            self._fingerprint = fingerprint(model)
        return self._fingerprint or b""

    # -- after a step ---------------------------------------------------------------------------------------------

    def enter(self, request: Computed) -> None:
        """Let others find the full pages that were computed since the last call."""
        prefix, full = request.prefix, request.known // self.store.page_size
        if prefix is None or prefix.name is None or not _is_whole(request):
            return
        if full > prefix.entered and self._is_current(prefix):
            prefix.claimed = [node for node in prefix.claimed if not _proven(node)]
            self._enter(request, prefix, full * self.store.page_size)
            prefix.entered = full

    def finish(self, request: Computed) -> None:
        """A request ended well: its last page can be found too, and its full pages go to disk."""
        prefix = request.prefix
        if prefix is None or prefix.name is None:
            return
        self.stats.requests += 1
        self.stats.prompt_tokens += prefix.prompt
        self.stats.cached_tokens += request.cached_tokens
        if self._is_current(prefix) and _is_whole(request):
            nodes = self._enter(request, prefix, request.proven)
            if self._disk is not None:
                self._save(self._disk, nodes)
        _release(prefix)

    def withdraw(self, request: Computed) -> list[list[int]]:
        """A request is about to lose its pages before it ended: what nothing proves is found no longer.

        Returns:
            Per cache group, such pages that nobody holds. They have to be zeroed: pages that hold NaN must not reach
            others, not even masked.
        """
        prefix, freed = request.prefix, [list[int]() for _ in self.store.groups]
        if prefix is None:
            return freed
        for node in prefix.claimed:
            if not _proven(node):
                for free, pages in zip(freed, self._drop(node), strict=True):
                    free += pages
                self._prune(node.parent)
        prefix.entered = 0
        _release(prefix)
        return freed

    def clear(self) -> None:
        """Forget everything but what is on disk."""
        for handle in list(self.pinned):
            handle.unpin()
        for root in list(self._roots.values()):
            self._drop(root)
        self._roots.clear()

    def figures(self) -> PromptCacheStats:
        """The figures, with the bytes of each tier."""
        self.stats.device_bytes = sum(len(found) * self.store.page_bytes(i) for i, found in enumerate(self._owners))
        self.stats.host_bytes = self._host.bytes if self._host is not None else 0
        self.stats.disk_bytes = self._disk.bytes if self._disk is not None else 0
        return self.stats

    def path(self, name: Name, tokens: Sequence[int]) -> tuple[list[Node], int]:
        """The nodes of the longest known beginning of `tokens`, wherever their pages are, and its length."""
        root = self._roots.get(name)
        if root is None and self._disk is None:
            return [], 0
        return walk(root or self._root(name), tokens, self.store.page_size, len(tokens), self._child)

    def is_held(self, node: Node) -> bool:
        """Whether a request or a pinned prompt holds a page of the node."""
        return any(group.pool.refs(page) for group, page in zip(self.store.groups, node.pages, strict=True))

    def delete(self, node: Node) -> None:
        """Forget a node and all below it, on disk too."""
        for below in node.subtree() if self._disk is not None else ():
            if below.stored and self._disk is not None:
                self._disk.delete(below.digest)
        parent = node.parent
        self._drop(node)
        if parent is not None:
            self._prune(parent)

    def put(self, name: Name, tokens: Sequence[int], tables: Sequence[BlockTable]) -> list[Node]:
        """Enter the pages that tables hold for `tokens`."""
        size, node = self.store.page_size, self._root(name)
        now, nodes = monotonic(), []
        for start in range(0, len(tokens), size):
            wanted = tuple(tokens[start : start + size])
            child = node.children.get(wanted)
            if child is None:
                near = node.closest(wanted)
                if near is not None and near.tokens[: len(wanted)] == wanted:
                    break  # a page that goes on longer serves as well
                if near is not None and wanted[: len(near.tokens)] == near.tokens:
                    self._drop(near)
                child = node.add(wanted)
                child.ttl = self.config.ttl
            child.used = now
            for index, table in enumerate(tables):
                entry = start // size
                page = table.pages[entry] if entry < len(table.pages) else 0
                if page and not child.pages[index] and page not in self._owners[index]:
                    self._own(index, child, page)
            nodes.append(child)
            node = child
        return nodes

    def _enter(self, request: Computed, prefix: Prefix, stop: int) -> list[Node]:
        assert prefix.name is not None
        nodes = self.put(prefix.name, request.tokens[:stop], request.tables)
        for entry in range(prefix.entered, len(nodes)):
            pages = [table.pages[entry] for table in request.tables]
            end = min(self.store.page_size * (entry + 1), stop)
            own = any(page and page == found for page, found in zip(pages, nodes[entry].pages, strict=True))
            if own and end > request.proven:
                nodes[entry].claim = request, end
                prefix.claimed.append(nodes[entry])
        return nodes

    def _is_current(self, prefix: Prefix) -> bool:
        current = prefix.switches == self._switches and self._seen == self._epoch.number
        return current and prefix.name is not None and prefix.name.epoch == self._seen

    def _own(self, group: int, node: Node, page: int) -> None:
        node.pages[group] = page
        self._owners[group][page] = node
        self.store.groups[group].pool.keep(page)

    def _save(self, disk: DiskTier, nodes: Sequence[Node]) -> None:
        """Write full pages that are not on disk, unless the weights changed while they were computed."""
        whole = [node for node in nodes if len(node.tokens) == self.store.page_size]
        now = time_ns()
        for node in whole:
            if node.stored and not disk.touch(node.digest, now - PRECEDENCE * node.depth):
                node.stored = frozenset()
        new = [node for node in whole if not node.stored and any(node.pages)]
        model = self._model()
        if not new or model is None:
            return
        self._epoch.check(model)
        if self._epoch.number != self._seen:
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
        nodes = [self._owners[group].pop(page) for page in pages]
        self.stats.evictions += len(pages)
        if self._host is not None:
            for length in {len(node.tokens) for node in nodes}:
                new = [(n, p) for n, p in zip(nodes, pages, strict=True) if len(n.tokens) == length]
                rows = self.store.read_pages(group, [page for _, page in new], length)
                for (node, _), row in zip(new, rows, strict=True):
                    self._host.put(node, group, row.clone())
        for node in nodes:
            node.pages[group] = 0
            self._prune(node)

    def _drop(self, top: Node) -> list[list[int]]:
        """Forget a node and all below it in memory; returns the pages of each group that are free now."""
        freed: list[list[int]] = [[] for _ in self.store.groups]
        for node in top.subtree():
            for index, page in enumerate(node.pages):
                pool = self.store.groups[index].pool
                if page:
                    del self._owners[index][page]
                    freed[index] += [page] if page in pool.kept else []
                    pool.forget(page)
                    node.pages[index] = 0
                if self._host is not None:
                    self._host.remove(node, index)
        top.detach()
        return freed

    def _prune(self, node: Node | None) -> None:
        """Take nodes without contents out of the tree, from this one upwards."""
        while node is not None and node.bare:
            if node.parent is None and self._roots.get(node.name) is node:
                del self._roots[node.name]
            node.detach()
            node = node.parent


def _is_whole(request: Computed) -> bool:
    """Whether no token was evicted: later keys depend on which, and pages no longer hold what their place says."""
    return not any(table.evicted for table in request.tables)


def _proven(node: Node) -> bool:
    """Whether the node's pages are known to hold no NaN: others may read them."""
    if node.claim is not None and node.claim[0].proven >= node.claim[1]:
        node.claim = None
    return node.claim is None


def _release(prefix: Prefix) -> None:
    for node in prefix.claimed:
        node.claim = None
    prefix.claimed.clear()


def _calls(method: weakref.WeakMethod[Any], group: int) -> Callable[[Sequence[int]], None]:
    """A pool must not keep the cache alive, which keeps its tensors alive."""

    def call(pages: Sequence[int]) -> None:
        bound = method()
        if bound is not None:
            bound(group, pages)

    return call
