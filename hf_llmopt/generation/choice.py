"""The tokens of rows that were submitted, and of their drafts, in one pass over all scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.sampling import invalid, pick
from ..errors import CallbackFailed
from ..kv_cache import Download
from .row import Row, TokenLogprob, report
from .warp import Shaped, apply


class Chosen:
    """Tokens for rows, which the host may not know yet.

    A row has a place for its next token, and one for each draft whose follower can be chosen before it is known that
    the draft is right.

    Attributes:
        rows: Rows whose requests had caught up.
        errors: For each row, why no token could be chosen, or `None`. One row's failure is nobody else's.
        failed: Why no token could be chosen at a place.
        logprobs: By place, of the rows that want them.
        tokens: `[places with a token]`, on the device; -1 where the scores contain NaN.
    """

    def __init__(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        self.rows = rows
        self.errors: list[BaseException | None] = [None] * len(rows)
        self.failed: dict[int, BaseException] = {}
        self.logprobs: dict[int, TokenLogprob] = {}
        self._counts = counts
        self._places: list[int] = []
        self._parts: list[Tensor] = []

    def add(self, places: Sequence[int], tokens: Tensor) -> None:
        """The tokens of these places."""
        self._places += places
        self._parts.append(tokens)

    def close(self) -> None:
        """No more tokens will be added: they go on their way to the host."""
        device = self.rows[0].input_ids.device if len(self._parts) > 1 else None
        parts = self._parts if device is None else [part.to(device, non_blocking=True) for part in self._parts]
        self.tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        self._download = Download(self.tokens)

    def go_on(self) -> None:
        """Let rows that do not end with their token take part in the next step before the host knows it.

        There are no drafts then: a row has one place.
        """
        for index, place in enumerate(self._places):
            row = self.rows[place]
            if not row.ends_next and not row.request.finished:
                row.request.expect(self.tokens, index)

    def accept(self) -> None:
        """Wait for the tokens, and hand each row its own, as many as its drafts were right and one more."""
        tokens = dict(zip(self._places, self._download.read(), strict=True))
        place = 0
        for index, (row, count) in enumerate(zip(self.rows, self._counts, strict=True)):
            try:
                self._accept(row, range(place, place + count), tokens)
            except BaseException as error:  # a criterion may exit: that ends its request, not the thread
                self.errors[index] = error
            place += count

    def _accept(self, row: Row, places: range, tokens: dict[int, int]) -> None:
        place, node = places.start, row.request.node
        if row.request.most_drafts is not None:  # drafters learn from it
            known = [(node + index, tokens.get(place, -1)) for index, place in enumerate(places)]
            row.request.chosen |= {index: token for index, token in known if token >= 0}
        while place in places:
            if place in self.failed:
                raise self.failed[place]
            if tokens[place] < 0:
                raise invalid([0])
            if row.request.finished or not row.accept(tokens[place], self.logprobs.get(place)):
                return  # cancelled meanwhile, or a token that nobody guessed
            place = places.start + 1 + row.request.node
        with row.engine.lock:
            row.notice()  # there are logits that nothing was chosen from


def choose(rows: Sequence[Row], logits: Sequence[Sequence[Tensor]]) -> Chosen:
    """Choose tokens for every row, in one pass over all scores.

    Args:
        rows: Rows whose requests have caught up.
        logits: The logits `[vocabulary]` of each, and those behind each of its drafts.
    """
    counts = [len(own) if row.foresees and row.request.node < 0 else 1 for row, own in zip(rows, logits, strict=True)]
    chosen = Chosen(rows, counts)
    places = [  # each with how many tokens behind the row's next one it is
        (row, row.request.depths[index - 1] + 1 if index else 0, own[index])
        for row, own, count in zip(rows, logits, counts, strict=True)
        for index in range(count)
    ]
    plain: list[int] = []
    shaped: list[int] = []
    for place, (row, _, _) in enumerate(places):
        (plain if row.only_best else shaped).append(place)
    if plain:
        chosen.add(plain, pick(stack([places[place][2] for place in plain])))
    if shaped:
        own_rows, aheads, found = zip(*(places[place] for place in shaped), strict=True)
        scores = stack(found).to(device=own_rows[0].input_ids.device, dtype=torch.float32)
        _shaped(own_rows, aheads, shaped, scores, chosen)
    chosen.close()
    return chosen


def stack(rows: Sequence[Tensor]) -> Tensor:
    """`[rows, vocabulary]`, without a copy where the rows lie behind one another, as those of one pass do."""
    first, step = rows[0], rows[0].numel()
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for index, row in enumerate(rows):
        if row.untyped_storage().data_ptr() != storage or row.storage_offset() != start + index * step:
            return torch.stack(list(rows))
    return first.as_strided((len(rows), step), (step, 1))


def _shaped(rows: Sequence[Row], aheads: Sequence[int], places: Sequence[int], logits: Tensor, chosen: Chosen) -> None:
    """Choose for rows with processors, noise or log-probabilities."""
    errors = chosen.failed
    scores = _applied([row.wished for row in rows], rows, places, logits, errors)
    if any(row.called for row in rows):
        scores = scores.clone()
    for row, place, own in zip(rows, places, scores, strict=True):
        if row.called:
            try:
                own.copy_(_call_processors(row, own))
            except BaseException as error:
                errors[place] = error
    scores = _applied([row.stages for row in rows], rows, places, scores, errors)
    alive = [index for index, place in enumerate(places) if place not in errors]
    for index in alive:
        rows[index].show(logits[index : index + 1], scores[index : index + 1])
    for drawing in (False, True):
        part = [index for index in alive if rows[index].do_sample is drawing]
        if part:
            own = scores if len(part) == len(rows) else scores[part]
            noise = torch.cat([rows[index].noise(own[:1], aheads[index]) for index in part]) if drawing else None
            tokens = pick(own, noise)
            own_places = [places[index] for index in part]
            chosen.add(own_places, tokens)
            _report_chosen(chosen, [rows[index] for index in part], own_places, logits[part], tokens)


def _applied(
    stages: Sequence[Sequence[Shaped]],
    rows: Sequence[Row],
    places: Sequence[int],
    scores: Tensor,
    errors: dict[int, BaseException],
) -> Tensor:
    """The scores after each row's stages; a row whose stages cannot be applied gets an error and keeps its own."""
    try:
        return apply(list(zip(stages, rows, strict=True)), scores)
    except Exception:  # whose fault it was shows row by row
        found = [scores[index : index + 1] for index in range(len(rows))]
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            try:
                found[index] = apply([(stages[index], row)], found[index])
            except Exception as error:
                errors[place] = error
        return torch.cat(found)


def _call_processors(row: Row, scores: Tensor) -> Tensor:
    found = row._call("logits processor", row.called, row.ids(), scores[None].clone())
    if not isinstance(found, Tensor) or found.shape != (1, *scores.shape):
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CallbackFailed(f"The logits processors returned {given}, scores have shape {[1, *scores.shape]}.")
    return found[0]


def _report_chosen(chosen: Chosen, rows: Sequence[Row], places: Sequence[int], logits: Tensor, tokens: Tensor) -> None:
    wanted = [index for index, row in enumerate(rows) if row.wishes.logprobs is not None]
    if not wanted:
        return
    known = tokens[wanted].tolist()
    wanted = [index for index, token in zip(wanted, known, strict=True) if token >= 0]
    known = [token for token in known if token >= 0]
    if wanted:
        found = report(logits[wanted], known, [rows[index].wishes.logprobs or 0 for index in wanted])
        chosen.logprobs |= {places[index]: entry for index, entry in zip(wanted, found, strict=True)}
