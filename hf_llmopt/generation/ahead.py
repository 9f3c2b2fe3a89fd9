"""The rows of a `generate` call, each going its own way: where drafts are right, a row gains several tokens at once.

Rows do not wait for one another, and still get the tokens they would get in step: a row's step t uses the noise that
stock draws for it there (`Tape`). What is shown both rows at once, an object of the user's say, cannot be served so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria, generation

from ..engine.sampling import Tape
from .choice import choose
from .group import Group
from .row import Row, stage_of

LEAD = 32  # steps by which a row may be ahead of another: their noise is kept

# transformers' own, beside those that have a stage in `warp.py`, that look at each row for itself and keep nothing
# between steps.
ROW_WISE = tuple(
    getattr(generation, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TypicalLogitsWarper",
    )
)

OWN_ENDS = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)  # criteria that see nothing but the row's tokens


def why_not(group: Group) -> str | None:
    """Why the rows of a call have to keep in step; `None` if each may go its own way."""
    if len(group.requests) == 1:
        return None
    if group.keep_running:
        return (
            "return_dict_in_generate, past_key_values, guidance, stop strings without an EOS token, or a processor or "
            "criterion of yours could see rows of a step together; a row by itself may draft"
        )
    alone = [item for item in group.processors if stage_of(item) is not None or type(item) in ROW_WISE]
    alone += [item for item in group.processors if _ignores_padding(item)]
    together = [type(item).__name__ for item in group.processors if item not in alone]
    together += [type(item).__name__ for item in group.criteria if type(item) not in OWN_ENDS]
    together += [type(item).__name__ for item in group.users_objects() if type(item).__name__ not in together]
    if together:
        return f"{', '.join(together)} may look at all rows of a step together"
    return None


def _ignores_padding(processor: Any) -> bool:
    """Whether it is a repetition penalty that was told how much of each row is padding."""
    ours = type(processor) is generation.RepetitionPenaltyLogitsProcessor
    return ours and isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)


def _of_row(processor: Any, index: int) -> Any:
    """The processor for one row."""
    if not _ignores_padding(processor):
        return processor
    padding = processor.prompt_ignore_length[index : index + 1]
    return generation.RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding)


class AheadGroup(Group):
    """A call whose rows do not wait for one another. Takes the arguments of `Group`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tape = Tape(len(self.requests))
        self.rows = [_OwnWay(self, index, *args, **kwargs) for index in range(len(self.requests))]

    def run(self) -> None:
        """Generate until every row has finished, stepping the engine in this thread.

        Raises:
            LLMOptError: The call failed; its pages were given back.
        """
        try:
            with self.running():
                while not self.done:
                    self._advance_some()
        finally:
            self.tape.rewind(max(len(row.tokens) for row in self.rows))  # guesses read ahead

    def _advance_some(self) -> None:
        """Choose the next tokens of the rows that have logits, once there are some."""
        with self.engine.lock:
            while not (ready := self._ready_rows()):
                if not self.engine.step():
                    self.engine.lock.wait(0.05)
        chosen = choose(ready, [[row.request.logits, *row.request.later] for row in ready])
        chosen.accept()
        for error in filter(None, chosen.errors):
            raise error
        self.tape.passed(min((len(row.tokens) for row in self.rows if not row.done), default=0))
        if all(row.done for row in self.rows):
            with self.engine.lock:
                self._end()

    def _ready_rows(self) -> list[Row]:
        """Rows that have logits.

        Raises:
            LLMOptError: A row failed.
        """
        for row in self.rows:
            if not row.done and row.request.error is not None:
                raise row.request.error
        return [row for row in self.rows if not row.done and row.request.logits is not None]

    def lead(self, row: Row) -> int:
        """By how many steps a row is ahead of the last."""
        return len(row.tokens) - min(len(other.tokens) for other in self.rows if not other.done)

    def _end(self) -> None:
        length = max(len(row.tokens) for row in self.rows)
        new = torch.full((len(self.rows), length), 0 if self.pad is None else int(self.pad), device="cpu")
        for row, own in zip(self.rows, new, strict=True):
            own[: len(row.tokens)] = torch.tensor(row.tokens)
        self.input_ids = torch.cat([self.input_ids, new.to(self.input_ids.device)], dim=1)
        self.scores, self.logits = self.rows[0].scores, self.rows[0].logits
        self._finish_all()

    def count(self) -> None:
        """Those of the rows too."""
        if not self.done:
            self.stats.generated_tokens = sum(row.stats.generated_tokens for row in self.rows)
            self.stats.time_to_first_token = max(row.stats.time_to_first_token for row in self.rows)
        super().count()


class _OwnWay(Row):
    """A row of such a call."""

    def __init__(
        self,
        call: AheadGroup,
        index: int,
        engine: Any,
        requests: Any,
        input_ids: Tensor,
        processors: Any,
        *args: Any,
    ) -> None:
        own = type(processors)(_of_row(processor, index) for processor in processors)
        super().__init__(engine, [requests[index]], input_ids[index : index + 1], own, *args)
        self._call_of = call
        self._index = index

    def noise(self, like: Tensor, ahead: int = 0) -> Tensor:
        """Of the row's next step, or one so many steps behind it, `[1, vocabulary]`."""
        return self._call_of.tape.read(self._index, len(self.tokens) + ahead, like)

    def most_drafts(self) -> int:
        """As many as can count before the row ends, none where it is far ahead of the others."""
        # Others may step the engine between a row's last token and the end of its call.
        return 0 if self.done or self._call_of.lead(self) >= LEAD else super().most_drafts()

    def _accept(self, tokens: list[int], unfinished: list[int]) -> None:
        (token,), (goes_on,) = tokens, unfinished
        if goes_on:
            self._check_limit(self.request)
            self.request.append(token)
            return
        self.done = True
        self.request.append(token)
        if self._call_of.on_done is None:  # else its pages are wanted
            self.engine.finish(self.request)
