"""Rows that were submitted one by one: each is a call of its own, and their tokens are chosen in one pass.

A row's result never depends on the others. Its noise comes from its own generator, and every operation below works
along the vocabulary, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from ..engine.sampling import Tape, pick
from ..errors import InvalidRequest
from .group import Group
from .warp import REMOVED, STAGES, Constraint, Shaped, apply, constrain, count_penalty, logit_bias

MAX_PROMPT_SPAN = 256  # prompt tokens whose logits are held at one time


class TokenLogprob(NamedTuple):
    """How likely the model found a token, before any processor changed its scores.

    Attributes:
        token: The token's id.
        logprob: Natural logarithm of its probability.
        top: The most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Wishes:
    """What a submitted request asks for beyond the arguments of `generate`; `Engine.submit` describes them.

    Raises:
        InvalidRequest: A value is not allowed.
    """

    seed: int | None = None
    salt: str | None = None
    priority: int = 0
    tenant: str = ""
    adapter: str | None = None
    deadline: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        _check("seed", self.seed, int, optional=True, low=-(2**63), high=2**64 - 1)
        _check("salt", self.salt, str, optional=True)
        _check("priority", self.priority, int, low=-100, high=100)
        _check("tenant", self.tenant, str)
        _check("adapter", self.adapter, str, optional=True)
        _check("deadline", self.deadline, (int, float), optional=True, low=0)
        for name in ("logprobs", "prompt_logprobs"):
            _check(name, getattr(self, name), int, optional=True, low=0)
        for name in ("frequency_penalty", "presence_penalty"):
            _check(name, getattr(self, name), (int, float))
        for token, bias in (self.logit_bias or {}).items():
            _check("a token of logit_bias", token, int, low=0)
            _check("a value of logit_bias", bias, (int, float))
        if self.constraint is not None and not callable(self.constraint):
            raise InvalidRequest(f"constraint makes one for each sequence when it is called, got {self.constraint!r}.")

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[Wishes, dict[str, Any]]:
        """Part the arguments of a call into wishes and the arguments of `generate`."""
        own = {option.name for option in fields(cls)}
        wishes = cls(**{name: value for name, value in arguments.items() if name in own})
        return wishes, {name: value for name, value in arguments.items() if name not in own}


def _check(
    name: str, value: Any, kind: Any, optional: bool = False, low: float = -float("inf"), high: float = float("inf")
) -> None:
    if value is None and optional:
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {int: "an int", str: "a string"}.get(kind, "a number")
        raise InvalidRequest(f"{name} is {wanted}{' or None' if optional else ''}, got {value!r}.")
    if kind is not str and not low <= value <= high:
        raise InvalidRequest(f"{name} must be at least {low} and at most {high}, got {value!r}.")


class Row(Group):
    """A group of one row, whose token is chosen together with other rows' by `choose`.

    Takes the arguments of `Group`; the rest is set before it starts.

    Attributes:
        tokens: New tokens, the EOS token included.
        logprobs: One entry for each new token, if asked for.
        prompt_logprobs: One entry for each prompt token but the first, if asked for.
        on_notice: Called when there are logits to choose from, or the request failed; with the engine's lock held.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (self.request,) = self.requests
        self.submitted = True
        self.tokens: list[int] = []
        self.wishes = Wishes()
        self.tape = Tape(1)
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.on_notice: Callable[[Row], None] = lambda row: None
        self._prompt_length = self.input_ids.shape[1]
        shaped = [stage_of(processor) for processor in self.processors]
        # From here on the processors are known and come in the order of the stages; those before it are called.
        first = len(shaped)
        while first and shaped[first - 1] is not None and _ordered(shaped[first - 1 : first + 1]):
            first -= 1
        self.wished: list[Shaped] = []  # come before all processors
        self.stages: list[Shaped] = [stage for stage in shaped[first:] if stage is not None]
        self.called = type(self.processors)(self.processors[:first])
        self._longest: int = self.criteria.max_length  # type: ignore[assignment]  # `translate` saw that there is one
        if self.engine.speculator is not None:
            self.request.most_drafts, self.request.guess = self.most_drafts, self.guess
        self._max_length: int | None = None
        self._eos: set[int] = set()
        self._criteria = type(self.criteria)()
        for criterion in self.criteria:
            if type(criterion) is MaxLengthCriteria and not _may_warn(criterion):
                self._max_length = min(criterion.max_length, self._max_length or criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self._eos |= set(criterion.eos_token_id.tolist())
            else:
                self._criteria.append(criterion)

    def wish(self, wishes: Wishes, generator: torch.Generator) -> None:
        """Set what is asked for beyond `generate`'s arguments; before the row starts.

        Args:
            wishes: Applies to this row.
            generator: Source of its noise.
        """
        self.wishes, self.tape = wishes, Tape(1, generator)
        self.request.priority, self.request.tenant = wishes.priority, wishes.tenant
        self.request.adapter = wishes.adapter
        if self.request.prefix is not None:
            self.request.prefix.adapter = wishes.adapter
        if wishes.prompt_logprobs is not None:
            self.request.parent = None
            self.request.chunk = min(self.request.chunk or MAX_PROMPT_SPAN, MAX_PROMPT_SPAN)
            self.request.on_prompt = self._score_prompt
        if wishes.logit_bias:
            self.wished.append(logit_bias(dict(wishes.logit_bias)))
        if wishes.frequency_penalty or wishes.presence_penalty:
            self.wished.append(count_penalty(wishes.frequency_penalty, wishes.presence_penalty))
        if wishes.constraint is not None:
            self.wished.append(constrain(wishes.constraint()))

    @property
    def only_best(self) -> bool:
        """Whether nobody reads more of the logits than which token is the best."""
        return not (self.do_sample or self.called or self.stages or self.wished or self.shows)

    def forget(self) -> None:
        """No further token will be chosen: what said which may come is dropped, with the memory that it holds."""
        self.wished, self.wishes = [], replace(self.wishes, constraint=None)

    @property
    def shows(self) -> bool:
        """Whether anybody wants to see scores or log-probabilities."""
        return self.wishes.logprobs is not None or self.scores is not None or self.logits is not None

    def show(self, logits: Tensor, scores: Tensor) -> None:
        """Keep the model's logits and the scores they became, both `[1, vocabulary]`, for who wants them."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def notice(self) -> None:
        """Logits arrived, or the request failed."""
        self.on_notice(self)

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation, as stock counts them."""
        return self._prompt_length + len(self.tokens)

    def ids(self) -> Tensor:
        """Prompt and continuation `[1, length]`, for objects that want them."""
        if missing := self.length - self.input_ids.shape[1]:
            new = torch.tensor([self.tokens[-missing:]], device=self.input_ids.device)
            self.input_ids = torch.cat([self.input_ids, new], dim=1)
        return self.input_ids

    @property
    def ends_next(self) -> bool:
        """Whether nothing can be computed behind the next token, whichever it is, or must not be."""
        longest = self._max_length is not None and self.length + 1 >= self._max_length
        return longest or self._at_limit(self.request) or self.on_done is not None

    def most_drafts(self) -> int:
        """How many tokens behind the next one can count."""
        most = self._longest - self.length - 1
        if self.position_limit is not None:
            most = min(most, self.position_limit - self.request.next_position)
        return max(0, most)

    def noise(self, like: Tensor, ahead: int = 0) -> Tensor:
        """Of the row's next token, or one so many tokens behind it, in the shape of its scores `[1, vocabulary]`."""
        return self.tape.read(0, len(self.tokens) + ahead, like)

    def guess(self, logits: Tensor, ahead: int, most: int) -> list[tuple[int, float]]:
        """The tokens that the row would choose with these logits `[vocabulary]`, so many tokens behind its next one.

        Returns:
            The first, and what it would choose if those before were not allowed, with their probabilities.
        """
        stages = [stage for stage in (*self.wished, *self.stages) if not (ahead and stage.outdates)]
        scores = apply([(stages, self)], logits[None].float())
        chances = scores.softmax(-1)
        race = chances / self.noise(scores, ahead) if self.do_sample else scores.clone()
        guesses: list[tuple[int, float]] = []
        while len(guesses) < most:
            token = int(pick(race))
            chance = float(chances[0, token]) if token >= 0 else 0.0
            if not chance > 0:  # NaN, or nothing else is allowed
                break
            guesses.append((token, chance))
            race[0, token] = REMOVED
        return guesses

    @property
    def foresees(self) -> bool:
        """Whether tokens behind drafts can be chosen before it is known that the drafts are right."""
        looks_back = any(stage.looks_back for stage in (*self.wished, *self.stages))
        return not (self.called or self.shows or looks_back)

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Take the chosen token: criteria, streamer, figures; then the request goes on, or ends.

        Returns:
            Whether the token was a draft: then the logits behind it are there already.
        """
        if logprob is not None:
            self.logprobs.append(logprob)
        self.tokens.append(token)
        self.tape.passed(len(self.tokens))
        self.stats.generated_tokens += 1
        if not self.stats.time_to_first_token:
            self.stats.time_to_first_token = perf_counter() - self.began
        ended = token in self._eos or (self._max_length is not None and self.length >= self._max_length)
        if self._criteria:
            ended |= bool(self._call("stopping criterion", self._criteria, self.ids(), None).any())
        if self.streamer is not None:
            self._call("streamer", self.streamer.put, torch.tensor([token]))
        with self.engine.lock:
            if self.request.finished:  # cancelled meanwhile
                return False
            drafts = bool(self.request.later)
            self._accept([token], [not ended])
            right = drafts and not self.done and self.request.logits is not None
            self._account_unread()
        if self.done and self.streamer is not None:
            self._call("streamer", self.streamer.end)
        return right

    def _score_prompt(self, start: int, logits: Tensor) -> None:
        """Log-probabilities of the tokens behind places `start ...`, `[tokens, vocabulary]`."""
        targets = self.request.tokens[start + 1 : start + 1 + len(logits)]
        known = len(self.prompt_logprobs) - start  # a preempted request computes its prompt again
        if targets[known:]:
            found = logits[known : len(targets)].float()
            self.prompt_logprobs += report(found, targets[known:], [self.wishes.prompt_logprobs or 0] * len(found))
        if start + len(logits) >= len(self.request.tokens):
            self.request.on_prompt = None


def _may_warn(criterion: MaxLengthCriteria) -> bool:
    """Whether it says something when the model's positions are exceeded."""
    return criterion.max_position_embeddings is not None and criterion.max_length > criterion.max_position_embeddings


def stage_of(processor: Any) -> Shaped | None:
    """The vectorised form of a processor, or `None` if it has to be called."""
    make = STAGES.get(type(processor))
    return None if make is None else make(processor)


def _ordered(pair: Sequence[Shaped | None]) -> bool:
    return len(pair) < 2 or (pair[0] is not None and pair[1] is not None and pair[0].order < pair[1].order)


def report(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` under `logits` `[tokens, vocabulary]`, each with its `tops` most likely ones."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(max(tops), logits.shape[-1]), dim=-1)
    entries = []
    for token, logprob, count, ids, values in zip(
        tokens, chosen, tops, best.indices.tolist(), best.values.tolist(), strict=True
    ):
        entries.append(TokenLogprob(token, logprob, tuple(zip(ids[:count], values[:count], strict=True))))
    return entries
