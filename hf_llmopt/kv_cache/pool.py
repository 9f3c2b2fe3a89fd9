"""Pages: who holds which (no torch here).

A page is a slot for `page_size` consecutive tokens of one request, in every layer of one cache group. `PagePool` counts
references to page ids; `BlockTable` lists the pages of one request in token order. Page 0 belongs to nobody: padding
reads and writes it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ..errors import OutOfPages

# A planned page is free, but lies where some table expects to grow. A kept page is held by nobody, and given up only
# when blank ones run out: the prompt cache can find it.
_FREE, _HELD, _PLANNED, _KEPT = 0, 1, 2, 3


class PagePool:
    """Reference-counted page ids 1 ... `num_pages`.

    Pages are handed out in runs where possible: attention reads a run without gathering. A request says how many pages
    it may need in all (`room`); others are placed behind that room while there is space elsewhere.

    Attributes:
        num_pages: Pages of the pool.
        used: Pages that somebody holds.
        kept: Pages that nobody holds and the prompt cache can find, the least recently used one first.
        most_kept: How many pages `kept` may have.
        on_evict: Called with kept pages that are about to be given up, while their contents are still there.
    """

    def __init__(self, num_pages: int) -> None:
        self.used = 0
        self.kept: dict[int, None] = {}
        self.most_kept = sys.maxsize
        self.on_evict: Callable[[Sequence[int]], None] = lambda pages: None
        self._found: set[int] = set()  # pages that the prompt cache can find, held or kept
        self.clear()
        self.grow(num_pages)

    def clear(self) -> None:
        """Have no pages any longer; nobody may hold one."""
        if self.used:
            raise AssertionError(f"{self.used} pages are held")
        self.evict(len(self.kept))
        self.num_pages = 0
        self._state = bytearray([_HELD])
        self._refs = [0]

    @property
    def free(self) -> int:
        """Pages that nobody holds: those that can be taken."""
        return self.num_pages - self.used

    @property
    def blank(self) -> int:
        """Free pages that can be taken without giving up a kept one."""
        return self.free - len(self.kept)

    def grow(self, num_pages: int) -> None:
        """Raise the number of pages to `num_pages`; ids that are held stay valid."""
        extra = max(0, num_pages - self.num_pages)
        self._state.extend(bytes(extra))
        self._refs.extend([0] * extra)
        self.num_pages += extra

    def refs(self, page: int) -> int:
        """How many tables hold `page`."""
        return self._refs[page]

    def shared(self, page: int) -> bool:
        """Whether somebody else may read what the only holder of `page` finds in it."""
        return self._refs[page] > 1 or page in self._found

    def next_held(self, page: int) -> int:
        """The first page from `page` on that somebody holds, or the end of the pool."""
        held = self._state.find(_HELD, page)
        return held if held >= 0 else self.num_pages + 1

    def take(self, count: int, after: int | None = None, room: int = 0) -> tuple[list[int], range]:
        """Hand out `count` pages, with one reference each.

        Args:
            count: How many.
            after: Prefer the pages that follow this one.
            room: Where a new run starts, plan for this many pages in a row.

        Returns:
            The pages, and the pages planned behind them, to be handed to `unplan` in the end.

        Raises:
            OutOfPages: Fewer than `count` pages are free; nothing was taken.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages are needed, {self.free} of {self.num_pages} are free.")
        self.evict(count - self.blank)
        pages: list[int] = []
        if after is not None:
            while len(pages) < count and after < self.num_pages and self._state[after + 1] in (_FREE, _PLANNED):
                after += 1
                pages.append(self._hold(after))
        if len(pages) == count:
            return pages, range(0)
        run, plan = self._new_run(count - len(pages), room)
        return pages + run, plan

    def _new_run(self, count: int, room: int) -> tuple[list[int], range]:
        start = self._state.find(bytes(max(count, room)))
        if start < 0:
            start = self._state.find(bytes(count))
        if start < 0:  # no run is left: take single pages, unplanned ones first
            free = [page for state in (_FREE, _PLANNED) for page in self._pages_in(state)]
            return [self._hold(page) for page in free[:count]], range(0)
        plan = range(start + count, min(start + room, self.num_pages + 1))
        for page in plan:
            if self._state[page] == _FREE:
                self._state[page] = _PLANNED
        return [self._hold(page) for page in range(start, start + count)], plan

    def _pages_in(self, state: int) -> list[int]:
        return [page for page, its_state in enumerate(self._state) if its_state == state]

    def _hold(self, page: int) -> int:
        self._state[page] = _HELD
        self._refs[page] = 1
        self.used += 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page (page 0 is skipped)."""
        for page in filter(None, pages):
            if page in self.kept:
                del self.kept[page]
                self._hold(page)
            else:
                self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page (page 0 is skipped); a page without references is free.

        Of pages that are kept, the last of the sequence are given up first: a prompt's beginning outlives its end.
        """
        for page in filter(None, reversed(pages)):
            if self._refs[page] <= 0:
                raise AssertionError(f"page {page} was released more often than it was taken")
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            self.used -= 1
            if page in self._found:
                self._state[page] = _KEPT
                self.kept[page] = None
            else:
                self._state[page] = _FREE
        self.evict(len(self.kept) - self.most_kept)

    def keep(self, page: int) -> None:
        """Remember that the prompt cache can find a held page: it is kept when its last holder releases it."""
        self._found.add(page)

    def forget(self, page: int) -> None:
        """The prompt cache finds this page no longer; kept, it is free."""
        self._found.discard(page)
        if page in self.kept:
            del self.kept[page]
            self._state[page] = _FREE

    def evict(self, count: int) -> None:
        """Give up `count` kept pages, the least recently used ones (none if `count` is not positive)."""
        if count <= 0:
            return
        pages = list(islice(self.kept, count))
        self.on_evict(pages)
        for page in pages:
            self.forget(page)

    def unplan(self, plan: range) -> None:
        """Forget that a table expected to grow into these pages."""
        for page in plan:
            if self._state[page] == _PLANNED:
                self._state[page] = _FREE


@dataclass
class BlockTable:
    """The pages of one request in one cache group, in token order.

    Methods take the request's own token numbers, those of evicted tokens counted.

    Attributes:
        pool: Where the pages come from.
        page_size: Tokens per page.
        room: Pages the request is expected to need.
        pages: Page ids; 0 where a sliding window has passed.
        passed: Leading entries of `pages` that are 0.
        run: Index from which on `pages` are consecutive ids.
        evicted: Tokens that the pages lack: what is left of them, in its order, fills the slots from the first on.
        settled: The tokens from this one on are all there; of those before some were evicted.
    """

    pool: PagePool
    page_size: int
    room: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    passed: int = 0
    run: int = 0
    evicted: int = 0
    settled: int = 0
    _plans: list[range] = field(default_factory=list)

    @property
    def held(self) -> int:
        """Pages this table holds."""
        return len(self.pages) - self.passed

    def slots(self, tokens: Iterable[int]) -> list[int]:
        """Where tokens lie, or will."""
        pages, size, evicted = self.pages, self.page_size, self.evicted
        return [pages[(i - evicted) // size] * size + (i - evicted) % size for i in tokens]

    def _plan(self, start: int, stop: int) -> tuple[int, int]:
        """Entries to keep, and pages to take, so that tokens [start, stop) can be written.

        From the first entry in that range that somebody else reads too, entries are replaced by copies.
        """
        start, stop = start - self.evicted, stop - self.evicted
        written = range(start // self.page_size, len(self.pages))
        keep = next((i for i in written if self.pool.shared(self.pages[i])), len(self.pages))
        return keep, max(-(-stop // self.page_size), len(self.pages)) - keep

    def missing(self, start: int, stop: int) -> int:
        """How many pages `reserve(start, stop)` will take."""
        return self._plan(start, stop)[1]

    def reserve(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Make room to write tokens [start, stop).

        Returns:
            Pairs (from, to) of pages whose contents must be copied before the write (copy-on-write).

        Raises:
            OutOfPages: Not enough pages are free; the table is unchanged.
        """
        keep, count = self._plan(start, stop)
        if not count:
            return []
        after = self.pages[keep - 1] if keep and self.pages[keep - 1] else None
        # A request that outgrew its room goes on in runs half as long as what it has.
        taken, plan = self.pool.take(count, after, max(self.room - keep, count + keep // 2))
        replaced = self.pages[keep:]
        self.pool.release(replaced)
        del self.pages[keep:]
        self.run = min(self.run, keep)
        self._append(taken, plan)
        return list(zip(replaced, taken, strict=False))

    def _append(self, pages: Sequence[int], plan: range) -> None:
        if plan:
            self._plans.append(plan)
        for page in pages:
            if self.pages and page != self.pages[-1] + 1:
                self.run = len(self.pages)
            self.pages.append(page)

    def skip(self, first_token: int) -> None:
        """Start an empty table behind pages that a sliding window has passed already."""
        self.passed = self.run = first_token // self.page_size
        self.pages.extend([0] * self.passed)

    def begin(self, pages: Sequence[int]) -> None:
        """Start an empty table with pages that were found; leading ones are 0 where a window has passed."""
        self.pool.share(pages)
        self.pages.extend(pages)
        self.passed = next((entry for entry, page in enumerate(pages) if page), len(pages))
        self.run = max(self.passed, len(pages) - 1)
        while self.run > self.passed and pages[self.run - 1] + 1 == pages[self.run]:
            self.run -= 1

    def fork(self) -> BlockTable:
        """A second table over the same pages; the first to write to a page copies it."""
        self.pool.share(self.pages)
        return BlockTable(
            self.pool, self.page_size, self.room, self.pages[:], self.passed, self.run, self.evicted, self.settled
        )

    def trim(self, first_token: int) -> None:
        """Give back the pages that end before `first_token`: a sliding window has passed them."""
        passed = min(first_token // self.page_size, len(self.pages))
        for entry in range(self.passed, passed):
            self.pool.release(self.pages[entry : entry + 1])
            self.pages[entry] = 0
        self.passed = max(self.passed, passed)
        self.run = max(self.run, min(self.passed, len(self.pages)))

    def crop(self, num_tokens: int) -> None:
        """Keep the pages of the first `num_tokens` tokens only: none, or `settled` at least."""
        keep = max(0, -(-(num_tokens - self.evicted) // self.page_size))
        self.pool.release(self.pages[keep:])
        del self.pages[keep:]
        self.passed, self.run = min(self.passed, keep), min(self.run, keep)
        if not num_tokens:
            self.evicted = self.settled = 0

    def drop(self, first: int, count: int) -> None:
        """Evict the tokens of `count` pages from entry `first` on; what follows moves up."""
        self.pool.release(self.pages[first : first + count])
        del self.pages[first : first + count]
        self.run = max(first, self.run - count)
        self.evicted += count * self.page_size
        self.settled = first * self.page_size + self.evicted

    def lacks(self, kept: int) -> int:
        """How many free pages too few there are for `repack`."""
        back = sum(self.pool.refs(page) == 1 for page in self.pages)
        return -(-kept // self.page_size) - back - self.pool.free

    def repack(self, tokens: int, kept: int, settled: int) -> None:
        """Exchange all pages for new ones with room for what is kept of the tokens; the caller fills them.

        Args:
            tokens: Tokens of the request so far.
            kept: How many of them the pages will hold.
            settled: From which token on none was evicted.

        Raises:
            OutOfPages: Not enough pages are free, as `lacks` had said; the table is empty.
        """
        self.clear()
        count = -(-kept // self.page_size)
        self._append(*self.pool.take(count, room=max(self.room, count)))
        self.evicted, self.settled = tokens - kept, settled

    def own(self) -> list[int]:
        """Pages that nobody else reads."""
        return [page for page in self.pages if page and not self.pool.shared(page)]

    def clear(self) -> None:
        """Give every page back."""
        self.crop(0)
        for plan in self._plans:
            self.pool.unplan(plan)
        self._plans.clear()
