"""When requests lose tokens: after every pass, or once at the end of their prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import cast

from torch import Tensor

from ..config import KVCacheConfig
from ..errors import CallbackFailed, InvalidOption, UnsupportedModel
from ..kv_cache import PagedStore
from ..kv_cache.eviction import Scored, Scores, Selection, called, compact, method, with_rest
from .request import Request
from .runner import Runner

# Tokens by which a piece of a prompt that is computed again begins early: what comes next follows from them.
REPEATED = 8


class Evictor:
    """Takes tokens of groups with full attention away; those of windows are given back anyway.

    Args:
        store: The pages.
        config: Which method.

    Raises:
        UnsupportedModel: No layer of the model has full attention.
    """

    def __init__(self, store: PagedStore, config: KVCacheConfig) -> None:
        self.store = store
        found = method(config)
        assert found is not None
        self.method = found
        self.full = [index for index, group in enumerate(store.groups) if group.kind == "full"]
        if not self.full:
            kinds = ", ".join(sorted({f"{group.kind} of {group.window} tokens" for group in store.groups}))
            raise UnsupportedModel(
                f"KVCacheConfig(eviction={config.eviction!r}): no layer of this model has full attention ({kinds}), "
                "and what windows have passed is given back without it. Leave eviction out."
            )

    @property
    def scored(self) -> Scored | None:
        """The method, if it looks at how a prompt attends."""
        return self.method if isinstance(self.method, Scored) else None

    def room(self, prompt: int, total: int, span: int) -> int:
        """Most tokens a request has in pages at one time, as `Eviction.room` says.

        Raises:
            CallbackFailed: The method raised, or gave no such number.
        """
        held = called(self.method, "room", prompt, total, span)
        if not isinstance(held, int) or held < 1:
            raise CallbackFailed(
                f"eviction {self.method.config.eviction!r}: room({prompt}, {total}, {span}) returned {held!r}; it is "
                "the most tokens that a request has in pages at one time, 1 at least."
            )
        return held

    def prepare(self, request: Request, prompt: int, evicted: int, past: int, positions: int | None) -> None:
        """Let a request lose what its prompt must.

        A method that computes the prompt a second time leaves one that goes on from `past_key_values` alone: it does
        not know the tokens.

        Args:
            request: Not yet added to the engine.
            prompt: Tokens of its prompt.
            evicted: Those of them that are gone already.
            past: Those of them whose keys come from the caller's cache.
            positions: How many the model has, or `None`.

        Raises:
            InvalidOption: The method computes prompts a second time, which this one does not allow.
        """
        request.prompt, request.evicted = prompt, evicted
        if not (past and self.method.replayed):
            request.selection = called(self.method, "selection", prompt, prompt - evicted)
        if request.selection is not None and request.selection.spare:
            needed = request.next_position + request.selection.spare
            reason = "of inputs_embeds the tokens are not known" if request.embeds is not None else ""
            if positions is not None and needed > positions:
                reason = f"this one needs {needed} positions for that, of {positions} that the model has"
            if reason:
                raise InvalidOption(
                    f"KVCacheConfig(eviction={self.method.config.eviction!r}) reads the prompt a second time, and "
                    f"{reason}. Choose 'snapkv', 'h2o', 'expected' or 'sink'."
                )
        if self.method.chunk is not None:
            request.chunk = min(request.chunk or self.method.chunk, self.method.chunk)

    def settle(
        self,
        running: Sequence[Request],
        awaited: Collection[Request],
        runner: Runner,
        grow: Callable[[list[int]], None],
    ) -> list[tuple[Request, Exception]]:
        """Evict what has to go after a pass.

        Args:
            running: Requests that hold pages.
            awaited: Those whose prompt others are about to share. At its very end it stays whole until they have:
                rows of one call keep in step; one that was submitted waits for a step.
            runner: Computes prompts again, for methods that want it.
            grow: Called with the free pages each pool should have.

        Returns:
            Requests for which that failed, and why.
        """
        failed: list[tuple[Request, Exception]] = []
        done: dict[int, Request] = {}  # by their scores: requests with the same prompt share what is kept
        for request in running:
            if request.masked_tail:
                continue
            if request.computed == request.prompt and request in awaited and not request.held:
                request.held = request.group is not None and request.group.submitted
                continue
            request.held = False
            selection = request.selection
            try:
                self._drop(request)
                if selection is not None and request.computed >= request.prompt:
                    self._compact(request, selection, done, runner, grow)
            except Exception as error:
                failed.append((request, error))
        return failed

    def _drop(self, request: Request) -> None:
        """Give the pages back that a method without scores takes away."""
        for index in self.full:
            table = request.tables[index]
            slots = request.computed - table.evicted
            found = called(self.method, "excess", slots)
            if not _are_pages(found, (slots - 1) // self.store.page_size):
                raise CallbackFailed(
                    f"eviction {self.method.config.eviction!r}: excess({slots}) returned {found!r}; it is the first of "
                    f"the pages to give back and how many, all of them before the last one in use, or (0, 0)."
                )
            first, pages = found
            if pages:
                table.drop(first, pages)
                request.evicted = table.evicted

    def _compact(
        self,
        request: Request,
        selection: Selection,
        done: dict[int, Request],
        runner: Runner,
        grow: Callable[[list[int]], None],
    ) -> None:
        assert self.scored is not None
        scores, rest = selection.scores, request.computed - selection.prompt
        twin = done.get(id(scores))
        if twin is not None and not rest and twin.computed == request.computed:
            for index in self.full:
                request.tables[index].clear()
                request.tables[index] = twin.tables[index].fork()
        else:
            if self.method.replayed and not scores.layers:
                self._replay(request, selection, runner, grow)
            for index in self.full:
                kept = {
                    layer: with_rest(self._chosen(request, selection, index, layer), selection.held, rest)
                    for layer in self.store.groups[index].layers
                }
                table, total = request.tables[index], selection.kept + rest
                if (lacks := table.lacks(total)) > 0:
                    wanted = lacks + table.pool.free
                    grow([wanted if group == index else 0 for group in range(len(request.tables))])
                if table.lacks(total) > 0:
                    return  # pages that others share do not come back: once those have ended
                settled = selection.prompt - self.scored.recent
                compact(self.store, index, table, request.computed, kept, settled)
            done[id(scores)] = request
        request.evicted = request.tables[self.full[0]].evicted
        request.selection = None

    def _chosen(self, request: Request, selection: Selection, group: int, layer: int) -> Tensor:
        """The slots that each head of a layer keeps, `[kv_heads, kept]`."""
        assert self.scored is not None
        name = f"eviction {self.method.config.eviction!r}"
        seen = selection.scores.layers.get(layer)
        if seen is None:
            raise InvalidOption(
                f"{name} looks at the tokens {selection.looks} alone, and the keys of this prompt's came from "
                "past_key_values: nobody computes their queries. Leave past_key_values out, or choose 'sink'."
            )
        places = self.store.slots(request.tables[group], 0, selection.held).to(seen.device)
        read = lambda: self.store.read(layer, lambda slots: slots[places])  # noqa: E731
        scores = called(self.scored, "score", seen, read)
        self._check(f"{name}: score()", scores, layer, selection.held)
        chosen = called(self.scored, "choose", scores, selection.kept)
        self._check(f"{name}: choose()", chosen, layer, selection.kept)
        if type(self.scored).choose is not Scored.choose:  # one of the user's own
            in_order = bool((chosen.diff(dim=1) > 0).all()) and not chosen.is_floating_point()
            if not in_order or int(chosen[:, 0].min()) < 0 or int(chosen[:, -1].max()) >= selection.held:
                raise CallbackFailed(f"{name}: choose() returned no slots from 0 to {selection.held - 1} in order.")
        return cast(Tensor, chosen)

    def _check(self, what: str, given: object, layer: int, columns: int) -> None:
        wanted, got = [self.store.layers[layer].kv_heads, columns], type(given).__name__
        if not isinstance(given, Tensor) or list(given.shape) != wanted:
            got = str(list(given.shape)) if isinstance(given, Tensor) else got
            raise CallbackFailed(f"{what} returned {got}; a row for each key head is {wanted}.")

    def _replay(
        self, request: Request, selection: Selection, runner: Runner, grow: Callable[[list[int]], None]
    ) -> None:
        """Compute the prompt once more behind itself, piece by piece, and look how it attends to what came first."""
        end, tables, size = request.computed, request.tables, self.method.replayed
        position = request.next_position - request.remaining  # behind the end, where one that waited has a token
        for start in range(0, selection.prompt, size - REPEATED):
            tokens = request.tokens[max(0, start - REPEATED) : selection.prompt][:size]
            stop = end + len(tokens)
            piece = Request(
                tokens=request.tokens[:end] + tokens,
                positions=request.positions[:end] + list(islice(count(position), len(tokens))),
                next_position=position + len(tokens),
                rooms=[],
                left_padding=request.left_padding,
                adapter=request.adapter,
                tables=tables,
                computed=end,
                selection=replace(selection, looks=range(end, stop), scores=Scores(selection.scores.layers)),
            )
            needs = [table.missing(end, stop) for table in tables]
            if any(needs):  # where pages are shared
                grow(needs)
            for index, table in enumerate(tables):
                if copies := table.reserve(end, stop):
                    self.store.copy_pages(index, copies)
            runner.run([(piece, len(tokens))], lambda path: None)
        for table in tables:
            table.crop(end)


def _are_pages(found: object, last: int) -> bool:
    """Whether these are the first of some pages before `last`, and how many."""
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(number, int) for number in found):
        return False
    first, pages = found
    return bool(pages == 0 or (first >= 0 and pages > 0 and first + pages <= last))
