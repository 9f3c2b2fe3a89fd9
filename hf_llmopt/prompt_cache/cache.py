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
from hashlib import blake2b
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..config import PromptCacheConfig
from ..errors import OutOfPages
from ..kv_cache import BlockTable, PagedStore
from ..stats import PromptCacheStats
from .epoch import WeightsEpoch, adapted, fingerprint, settings
from .index import Node, longest, walk
from .prefix import Computed, Name, Prefix
from .tree import PageTrees

SETTINGS = "adapter or rotary settings"  # facts that are digests
WEIGHTS = "model or other weights"


class PromptCache:
    """The pages of past requests, by their tokens. Every method is called with the engine's lock held.

    Args:
        model: Kept weakly.
        store: The pages.
        config: Bounds and tiers.
        anybody: Whether a change was seen in any of the processes that the model is sharded over.

    Attributes:
        trees: What can be found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        config: PromptCacheConfig,
        anybody: Callable[[bool], bool] = bool,
    ) -> None:
        self._model = weakref.ref(model)
        self.store = store
        self.config = config
        self.stats = PromptCacheStats()
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()  # handles that hold pages
        self._epoch = WeightsEpoch(anybody)
        self._checked = False  # the weights, in this step
        self._seen = 0  # epoch that the trees belong to
        self._settings: dict[str | None, str] = {}  # by adapter
        self._adapted: list[Any] = []  # layers of PEFT
        self._active = ""  # settings as of the last pass
        self._switches = 0  # how often they changed
        self._fingerprint: bytes | None = None
        self.trees = PageTrees(model, store, config, self.stats)

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
            self.stats.invalidations += bool(self.trees.roots)
            self.clear()
            self._seen, self._fingerprint = self._epoch.number, None
        self._settings, self._adapted = {}, adapted(model)
        self.watch()
        if self.trees.disk is not None:
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
        reached, found = self.path(name, tokens, limit)
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
        self.trees.touch(nodes if found else ())
        for node in reached[-1:]:  # what is on disk only is not remembered
            self.trees.prune(node)
        return found

    def path(self, name: Name, tokens: Sequence[int], limit: int | None = None) -> tuple[list[Node], int]:
        """The nodes of the longest known beginning of `tokens`, wherever their pages are, and its length.

        Of `limit` tokens at most; `None` is no limit.
        """
        if name not in self.trees.roots and self.trees.disk is None:
            return [], 0
        root, limit = self.trees.root(name, self.key), len(tokens) if limit is None else limit
        return walk(root, tokens, self.store.page_size, limit, self.trees.child)

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
            if any(missing) and not self.trees.bring(missing, held, settle):
                return False
            for index, (table, first) in enumerate(zip(tables, seen, strict=True)):
                passed = min(first, len(nodes))
                table.begin([0] * passed + [node.pages[index] for node in nodes[passed:]])
            return True
        finally:
            for index, page in reversed(held):
                self.store.groups[index].pool.release([page])

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
            self.trees.save(nodes, self._is_unchanged)
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
                for free, pages in zip(freed, self.trees.drop(node), strict=True):
                    free += pages
                self.trees.prune(node.parent)
        prefix.entered = 0
        _release(prefix)
        return freed

    def clear(self) -> None:
        """Forget everything but what is on disk."""
        for handle in list(self.pinned):
            handle.unpin()
        self.trees.clear()

    def figures(self) -> PromptCacheStats:
        """The figures, with the bytes of each tier."""
        owners, host, disk = self.trees.owners, self.trees.host, self.trees.disk
        self.stats.device_bytes = sum(len(found) * self.store.page_bytes(i) for i, found in enumerate(owners))
        self.stats.host_bytes = host.bytes if host is not None else 0
        self.stats.disk_bytes = disk.bytes if disk is not None else 0
        return self.stats

    def _enter(self, request: Computed, prefix: Prefix, stop: int) -> list[Node]:
        assert prefix.name is not None
        nodes = self.trees.put(self.trees.root(prefix.name, self.key), request.tokens[:stop], request.tables)
        for entry in range(prefix.entered, len(nodes)):
            pages = [table.pages[entry] for table in request.tables]
            end = min(self.store.page_size * (entry + 1), stop)
            own = any(page and page == found for page, found in zip(pages, nodes[entry].pages, strict=True))
            if own and end > request.proven:
                nodes[entry].claim = request, end
                prefix.claimed.append(nodes[entry])
        return nodes

    def _is_unchanged(self) -> bool:
        """Look whether the weights are still those that the trees belong to."""
        model = self._model()
        if model is None:
            return False
        self._epoch.check(model)
        return self._epoch.number == self._seen

    def _is_current(self, prefix: Prefix) -> bool:
        current = prefix.switches == self._switches and self._seen == self._epoch.number
        return current and prefix.name is not None and prefix.name.epoch == self._seen


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
