"""A drafter that reads hidden states follows texts, in pages of its own.

What it attends over are pairs: the features of token t, and token t + 1. Pairs of tokens that the model computed and
that are the text's for good are kept, each computed once. Those of guesses are written behind them and overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache

from ...attention import Span, StepInputs, backend, serving
from ...config import KVCacheConfig, LLMOptConfig
from ...errors import OutOfPages
from ...fusion import Fusion
from ...kv_cache import BlockTable, LayerSpec, PagedStore, SpanCache, upload
from ..drafter import Text

WAITING = 256  # tokens of a text whose features may wait until somebody wants a guess
ROOM = 1024  # tokens that a text may grow by within one run of pages


class Head(Protocol):
    """What the drafter computes; `EagleModel` or `MtpHead`.

    Attributes:
        needs: Indices into the model's `hidden_states`, 0 for the embeddings, of the features.
        configs: From which its attention modules read their implementation.
    """

    needs: tuple[int, ...]
    configs: list[Any]

    @property
    def specs(self) -> list[LayerSpec]:
        """What each of its layers stores for a token; all store alike."""
        ...

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """What the first layer reads of features, each `[tokens, target hidden]`: `[tokens, hidden]`."""
        ...

    def __call__(self, ids: Tensor, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The layers' output `[tokens, hidden]` for tokens, each one place behind its features."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Of that output `[rows, hidden]`, in the model's vocabulary, `[rows, vocabulary]`."""
        ...


class Seen(NamedTuple):
    """What the model computed of a text in a pass.

    Attributes:
        text: Whose tokens.
        start: The first of them.
        length: How many.
        known: Tokens of the text, from its beginning, whose next token is known for good.
    """

    text: Text
    start: int
    length: int
    known: int


@dataclass(eq=False)
class _Followed:
    """A text as far as it is known.

    Attributes:
        tables: Of its pages; one, since all layers attend to everything.
        start: The first token with features; its pair lies in the first slot.
        done: Tokens whose pairs are in pages.
        waiting: Features of the tokens from `done` on, in parts `[tokens, hidden]`.
        hidden: The layers' output behind the last pair, `[hidden]`, guesses not counted.
        guessed: That behind the last guess.
        guesses: How many are in pages.
        next: A guess that is yet to be computed.
    """

    tables: list[BlockTable]
    start: int
    done: int
    waiting: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None
    guessed: Tensor | None = None
    guesses: int = 0
    next: int | None = None

    @property
    def seen(self) -> int:
        """Tokens whose features are there, or were."""
        return self.done + sum(map(len, self.waiting))

    def crop(self, tokens: int) -> None:
        """Forget features from this token on, as far as they wait."""
        while self.waiting and self.seen > tokens:
            last = self.waiting.pop()
            kept = len(last) - (self.seen + len(last) - tokens)
            if kept > 0:
                self.waiting.append(last[:kept])


class _Pairs(NamedTuple):
    """Pairs of a text that a pass computes."""

    text: Text
    followed: _Followed
    ids: list[int]
    hidden: Tensor
    positions: list[int]
    place: int  # slot of the first


class Follower:
    """Follows texts; a `Second` for `DraftModelDrafter`.

    Args:
        model: The drafter.
        config: What the engine's caller asked for.
    """

    def __init__(self, model: Head, config: LLMOptConfig) -> None:
        self._model = model
        self._device = model.specs[0].device
        pages = config.kv_cache
        limits = {name: getattr(pages, name) for name in ("page_size", "max_tokens", "memory_fraction")}
        self.store = PagedStore(model.specs, KVCacheConfig(**limits))
        self._attend = backend(config.attention.backend, self._device)
        found: Any = model
        self._fusion = Fusion(found, self.store.layers, layers=False) if self._device.type == "cpu" else None
        self._cache = SpanCache(len(model.specs))
        self._texts: dict[Text, _Followed] = {}

    @torch.no_grad()
    def observe(self, spans: Sequence[Seen], features: Sequence[Tensor]) -> None:
        """A pass of the model has computed these spans.

        Args:
            spans: In the order of their tokens.
            features: What the drafter needs, each `[tokens of all spans, target hidden]`.
        """
        with self._fused(len(features[0])):
            hidden = self._model.fuse([feature.to(self._device) for feature in features])
        offset, long = 0, []
        for span in spans:
            followed = self._take_in(span, hidden[offset : offset + span.length])
            offset += span.length
            if followed.seen - followed.done > WAITING:
                long.append(self._pairs(span.text, followed, span.known))
        self._compute_known(long)

    def move(self, text: Text, moves: Sequence[tuple[int, int]]) -> None:
        """Guesses of a tree that were right stand at other places of the text now (from, to): so do their features."""
        followed = self._texts.get(text)
        if followed is None:
            return
        hidden, first = torch.cat(followed.waiting), followed.done
        sources, targets = ([place - first for place in places] for places in zip(*moves, strict=True))
        hidden[targets] = hidden[sources]
        followed.waiting = [hidden]

    def _take_in(self, span: Seen, hidden: Tensor) -> _Followed:
        followed = self._texts.get(span.text)
        if followed is None or span.start > followed.seen:  # what lies between was found, and never seen
            self.forget(span.text)
            followed = self._texts[span.text] = self._begin(span.text, span.start)
        followed.crop(span.start)  # guesses that were wrong
        if span.start + span.length > followed.done:  # else it is computed again, after its pages were taken away
            new = hidden[max(0, followed.done - span.start) :]
            few = 2 * len(new) < new.untyped_storage().nbytes() // new[0].nbytes  # they must not hold all the others
            followed.waiting.append(new.clone() if few else new)
        return followed

    def _begin(self, text: Text, start: int) -> _Followed:
        """A text of which nothing is known before `start`, but what another has in common with it."""
        for other, known in self._texts.items() if start else ():
            same = known.start == 0 and known.done >= start and other.salt == text.salt
            if same and all(
                ours[: start + 1] == theirs[: start + 1]
                for ours, theirs in ((text.tokens, other.tokens), (text.positions, other.positions))
            ):
                tables = [table.fork() for table in known.tables]
                for table in tables:
                    table.crop(start)
                return _Followed(tables, 0, start)
        room = -(-(len(text.tokens) + ROOM) // self.store.page_size)
        return _Followed(self.store.tables([room]), start, start)

    def _pairs(self, text: Text, followed: _Followed, known: int) -> _Pairs:
        """Those that can be computed of a text, of whose tokens so many have a next one that is known for good."""
        start, stop = followed.done, max(followed.done, min(known, followed.seen))
        hidden = torch.cat(followed.waiting) if followed.waiting else torch.empty(0)
        followed.waiting = [hidden[stop - start :].clone()] if stop < followed.seen else []
        followed.done = stop
        ids, positions = text.tokens[start + 1 : stop + 1], text.positions[start:stop]
        return _Pairs(text, followed, ids, hidden[: stop - start], positions, start - followed.start)

    @torch.no_grad()
    def follow(self, texts: Sequence[Text]) -> None:
        """Know the tokens of these texts, and nothing behind them."""
        missing = []
        for text in texts:
            if (followed := self._texts.get(text)) is not None:
                followed.guesses, followed.next = 0, None
                known = len(text.tokens) - 1
                missing.append(self._pairs(text, followed, known))
        self._compute_known(missing)
        for text in texts:
            if (followed := self._texts.get(text)) is not None:
                complete = followed.done == len(text.tokens) - 1
                followed.guessed = followed.hidden if complete else None

    @torch.no_grad()
    def logits(self, texts: Sequence[Text]) -> list[Tensor | None]:
        """Behind all tokens of each text, `[vocabulary]`; `None` where features or pages are missing."""
        behind = []
        for text in texts:
            followed = self._texts.get(text)
            if followed is not None and followed.next is not None and followed.guessed is not None:
                place = followed.done - followed.start + followed.guesses
                position = text.next_position - 1 + followed.guesses
                behind.append(_Pairs(text, followed, [followed.next], followed.guessed[None], [position], place))
                followed.guesses, followed.next = followed.guesses + 1, None
        for pairs, hidden in zip(behind, self._compute(behind), strict=True):
            pairs.followed.guessed = hidden
        found = [self._texts[text].guessed if text in self._texts else None for text in texts]
        rows = [hidden for hidden in found if hidden is not None]
        with self._fused(len(rows)):
            logits = iter(self._model.logits(torch.stack(rows)) if rows else ())
        return [None if hidden is None else next(logits) for hidden in found]

    def append(self, text: Text, token: int) -> None:
        """A guess follows."""
        if text in self._texts:
            self._texts[text].next = token

    def forget(self, text: Text) -> None:
        """The text has ended."""
        if (followed := self._texts.pop(text, None)) is not None:
            self._give_back(followed)

    def _give_back(self, followed: _Followed) -> None:
        for table in followed.tables:
            table.clear()

    def _fused(self, tokens: int) -> AbstractContextManager[None]:
        """Let our products and norms stand in for the drafter's, on the CPU."""
        model: Any = self._model
        return nullcontext() if self._fusion is None else self._fusion.entered(model, tokens)

    def _compute_known(self, wanted: Sequence[_Pairs]) -> None:
        for pairs, hidden in zip(wanted, self._compute(wanted), strict=True):
            if hidden is not None:
                pairs.followed.hidden = hidden

    def _compute(self, wanted: Sequence[_Pairs]) -> list[Tensor | None]:
        """The layers' output behind the last pair of each, `[hidden]`; `None` where there is no pair, or no page."""
        pairs = self._fitting(sorted((each for each in wanted if each.ids), key=lambda each: len(each.ids)))
        if not pairs:
            return [None] * len(wanted)
        spans: list[Span] = []
        slots: list[int] = []
        for each in pairs:
            (table,) = each.followed.tables
            stop = each.place + len(each.ids)
            if copies := table.reserve(each.place, stop):  # of pages that texts have in common
                self.store.copy_pages(0, copies)
            spans.append(Span(each.followed.tables, len(slots), len(each.ids), stop))
            slots += table.slots(range(each.place, stop))
        tokens, places = [token for each in pairs for token in each.ids], [p for each in pairs for p in each.positions]
        listed = tokens, places, slots, [span.offset + span.length - 1 for span in spans]
        ids, positions, to, ends = (upload(torch.tensor(values, device="cpu"), self._device) for values in listed)
        step = StepInputs(self.store, spans, [to], self._attend, lambda path: None)
        with self._fused(len(slots)), serving(self._model.configs, step):
            hidden = self._model(ids, torch.cat([each.hidden for each in pairs]), positions, self._cache)
        last = {id(each): row for each, row in zip(pairs, hidden[ends], strict=True)}
        return [last.get(id(each)) for each in wanted]

    def _fitting(self, pairs: list[_Pairs]) -> list[_Pairs]:
        """Those that there are pages for; texts that give theirs up for it begin anew with what is computed of them."""
        (group,) = self.store.groups
        while pairs:
            need = sum(p.followed.tables[0].missing(p.place, p.place + len(p.ids)) for p in pairs)
            with suppress(OutOfPages):  # the device is full
                self.store.provide([need])
            if need <= group.pool.free:
                break
            inside = [each.text for each in pairs]
            victim = next((text for text in self._texts if text not in inside), inside[-1])
            pairs = [each for each in pairs if each.text is not victim]
            self.forget(victim)
        return pairs
