"""The rows of one `generate` call.

At step t the group waits until every row has its logits. Then processors run once on stock's padded ids `[rows,
length]` and float32 scores `[rows, vocabulary]`, one draw of noise picks the tokens, and criteria run once: whatever
objects the user passed see exactly what stock's loop would show them, in the same order. A GPU is told of the next pass
before the host knows these tokens; it is in vain where they turn out to be the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..engine import EngineLoop, Request, Share
from ..engine.sampling import draw, greedy, invalid, pick
from ..errors import CallbackFailed, LLMOptError, PromptTooLong
from ..kernels import cpu
from ..kv_cache import Download
from ..stats import Stats


class Group:
    """One call's rows, processors, criteria and outputs.

    Args:
        engine: Computes the rows' logits.
        requests: One per row.
        input_ids: Stock's padded ids `[rows, length]`; empty columns for a prompt given as embeddings.
        processors: As `generate` prepared them.
        criteria: As `generate` prepared them.
        generation_config: As `generate` prepared it.
        streamer: Gets every step's tokens, or `None`.
        keep_running: Finished rows go on with padding tokens, because somebody could see their scores or keys.
        position_limit: Positions the model has, or `None`.
    """

    def __init__(
        self,
        engine: EngineLoop,
        requests: list[Request],
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        keep_running: bool = True,
        position_limit: int | None = None,
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.input_ids = input_ids
        self.processors = processors
        self.criteria = criteria
        self.streamer = streamer
        self.keep_running = keep_running
        self.position_limit = position_limit
        self.do_sample = bool(generation_config.do_sample)
        self.returns_dict = returns = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if returns and generation_config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returns and generation_config.output_logits else None
        self.pad: Any = generation_config._pad_token_tensor
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.unfinished = torch.ones(len(requests), dtype=torch.long, device=input_ids.device)
        self.live = list(requests)
        self.thread, self.submitted = get_ident(), False
        self._active = len(requests)
        self.done = False
        # Run with the engine's lock held: once the rows have tables, and before their pages go back.
        self.on_start: Callable[[], None] | None = None
        self.on_done: Callable[[], None] | None = None
        self.cache: Cache | None = None  # what `past_key_values` of the output is to be
        self.stats = Stats(unfinished=True, prompt_tokens=sum(len(r.tokens) - r.masked_tail for r in requests))
        self.began = perf_counter()
        self._paths: set[str] = set()
        self._unread: list[tuple[float, set[str], Share]] = []  # steps that may have been in vain

    def run(self) -> None:
        """Generate until every row has finished, stepping the engine in this thread.

        Raises:
            LLMOptError: The call failed; its pages were given back.
        """
        with self.running():
            while not self.done:
                with self.engine.lock:
                    while not self.ready():
                        if not self.engine.step():
                            self.engine.lock.wait(0.05)
                self.advance()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Join the engine, and leave it in the end, whatever happens."""
        lock = self.engine.lock
        try:
            with lock:
                self.engine.refresh()
                while not self.start():
                    lock.wait(0.05)
            yield
        finally:
            self.count()
            with lock:
                self.engine.remove(self)
            if self.engine.owners:
                cpu.rest()  # the threads of an `Engine` go on

    @property
    def only_best(self) -> bool:
        """Whether nobody reads more of the logits than which token is the best."""
        return not (self.processors or self.do_sample or self.scores is not None or self.logits is not None)

    def users_objects(self) -> list[Any]:
        """Processors and criteria that are not transformers' own, and the streamer: they may carry state."""
        items = (*self.processors, *self.criteria)
        own = [item for item in items if not type(item).__module__.startswith("transformers.generation")]
        return own if self.streamer is None else [*own, self.streamer]

    def start(self) -> bool:
        """Join the engine, with its lock held; `False` if the group must wait for pages.

        Those that keys are brought to are taken from others in the steps that follow, if none are free.
        """
        if not (self in self.engine.groups or self.engine.add(self)) or not self.engine.budget.provided(self):
            return False
        if self.on_start is not None:
            self.on_start()
        return True

    def output(self) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` returns for this call."""
        if not self.returns_dict:
            return self.input_ids
        scores: Any = self.scores  # transformers annotates these as one-element tuples
        logits: Any = self.logits
        sequences: Any = self.input_ids
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, past_key_values=self.cache)

    def ready(self) -> bool:
        """Whether every row that is still computed has its logits.

        Raises:
            LLMOptError: A row failed.
        """
        for request in self.live:
            if request.error is not None:
                raise request.error
            if request.logits is None:
                return False
        return True

    def notice(self) -> None:
        """Whoever waits for the group looks by itself."""

    def account(self, seconds: float, paths: set[str], share: Share) -> None:
        """Count a step that computed some of these rows; if in doubt, once it is known to count."""
        if share.computed > len(share.request.tokens) - (share.request.pending is not None):
            self._unread.append((seconds, paths, share))
            return
        self.stats.steps += 1
        self.stats.graph_steps += share.replayed
        self.stats.forward_seconds += seconds
        if sum(share.held) > self.stats.pages:
            self.stats.pages = sum(share.held)
            self.stats.page_bytes = sum(n * self.engine.store.page_bytes(i) for i, n in enumerate(share.held))
        self._paths = self._paths | paths  # a new set: `count` may read the old one in another thread

    def advance(self) -> None:
        """One step of stock's loop: processors, the draw, criteria, streamer; then the rows get their tokens."""
        # Nobody has to be shown float32 scores; a GPU finds the best of all rows at once.
        straight = self.only_best and self.input_ids.device.type == "cpu"
        tokens = self._best() if straight else self._choose(self._next_logits())
        overlaps = self._overlaps()
        self.input_ids = torch.cat([self.input_ids, tokens.clamp_min(0)[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self._call(
            "stopping criterion", self.criteria, self.input_ids, self.scores
        )
        found = Download(tokens), Download(self.unfinished)
        if overlaps:
            self._step_ahead(tokens)
        chosen, unfinished = (part.read() for part in found)
        _check(chosen)
        if self.streamer is not None:
            self._call("streamer", self.streamer.put, torch.tensor(chosen))
        if not self.stats.time_to_first_token:
            self.stats.time_to_first_token = perf_counter() - self.began
        self.stats.generated_tokens += self._active
        self._active = sum(unfinished)
        with self.engine.lock:
            self._accept(chosen, unfinished)
            self._account_unread()
        if self.done and self.streamer is not None:
            self._call("streamer", self.streamer.end)

    def _overlaps(self) -> bool:
        """Whether the next pass may begin before the host knows the tokens that were chosen just now."""
        length = self.input_ids.shape[1] + 1
        ends = any(length >= getattr(criterion, "max_length", length + 1) for criterion in self.criteria)
        # A caller who gets the cache must not find a token in it that nobody asked for.
        return self.engine.overlaps and self.on_done is None and not ends and not any(map(self._at_limit, self.live))

    def _step_ahead(self, tokens: Tensor) -> None:
        with self.engine.lock:
            for index, request in enumerate(self.requests):
                if not request.finished:
                    request.expect(tokens, index)
            self.engine.step()

    def _account_unread(self) -> None:
        """The call goes on, so that what was computed ahead was of use; or it has ended."""
        unread, self._unread = self._unread, []
        for step in () if self.done else unread:
            self.account(*step)

    def _next_logits(self) -> Tensor:
        """float32 `[rows, vocabulary]` on the prompt's device; zeros for rows that are no longer computed."""
        some = self.live[0].logits
        missing = some.new_zeros(()).expand_as(some) if len(self.live) < len(self.requests) else some
        rows = [missing if request.finished else request.logits for request in self.requests]
        return torch.stack(rows).to(device=self.input_ids.device, dtype=torch.float32)

    def _best(self) -> Tensor:
        """The best tokens, straight from the model's own logits: nobody looks at or changes the scores."""
        best = [0 if request.finished else int(greedy(request.logits[None])) for request in self.requests]
        return self._padded(torch.tensor(best, device=self.input_ids.device))

    def _padded(self, tokens: Tensor) -> Tensor:
        return tokens * self.unfinished + self.pad.to(tokens.device) * (1 - self.unfinished) if self.pads else tokens

    def _choose(self, logits: Tensor) -> Tensor:
        scores: Tensor = self._call("logits processor", self.processors, self.input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if not isinstance(scores, Tensor) or scores.shape != logits.shape:
            given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise CallbackFailed(f"The logits processors returned {given}, scores have shape {list(logits.shape)}.")
        return self._padded(pick(scores, draw(scores) if self.do_sample else None))

    def _call(self, what: str, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except LLMOptError:
            raise
        except Exception as error:
            raise CallbackFailed(f"A {what} raised {type(error).__name__}: {error}") from error

    def _accept(self, tokens: list[int], unfinished: list[int]) -> None:
        if not any(unfinished):
            for request, token in zip(self.requests, tokens, strict=True):
                if not request.finished:
                    request.append(token)
            self._finish_all()
            return
        for request, token, flag in zip(self.requests, tokens, unfinished, strict=True):
            if request.finished:
                continue
            if not flag and not self.keep_running:
                request.append(token)
                self.engine.finish(request)
                continue
            self._check_limit(request)
            request.append(token)
        self.live = [request for request in self.requests if not request.finished]

    def _check_limit(self, request: Request) -> None:
        if request.pending is None and self._at_limit(request):
            raise PromptTooLong(
                f"The model has {self.position_limit} positions and all are used after "
                f"{self.stats.generated_tokens} new tokens. Lower max_new_tokens or shorten the prompt."
            )

    def _at_limit(self, request: Request) -> bool:
        return self.position_limit is not None and request.next_position >= self.position_limit

    def _finish_all(self) -> None:
        """Every row has its last token: figures, the caller's cache, and the pages go back."""
        self._close()
        if self.on_done is not None:
            self.on_done()
        self.on_start = self.on_done = None  # they refer back to the group, which must not outlive the call
        for request in self.requests:
            self.engine.finish(request)
        self.engine.remove(self)

    def _close(self) -> None:
        self.engine.account()
        for request in self.requests:
            self.engine.settle_drafts(request)
        self.count()
        self.done, self.stats.unfinished = True, False

    def count(self) -> None:
        """Bring the figures up to date, unless the call has ended and they are final. Needs no lock."""
        if self.done:
            return
        self.stats.seconds = perf_counter() - self.began
        self.stats.cached_tokens = sum(request.cached_tokens for request in self.requests)
        self.stats.evicted_tokens = sum(request.evicted for request in self.requests)
        self.stats.preemptions = sum(request.preemptions for request in self.requests)
        self.stats.swaps = sum(request.swaps for request in self.requests)
        self.stats.drafted_tokens = sum(request.drafted_tokens for request in self.requests)
        self.stats.accepted_tokens = sum(request.accepted_tokens for request in self.requests)
        self.stats.attention = tuple(sorted(self._paths))
        self.stats.fused = self.engine.runner.fused
        self.stats.no_graphs = self.engine.runner.no_graphs


def _check(tokens: list[int]) -> None:
    if broken := [row for row, token in enumerate(tokens) if token < 0]:
        raise invalid(broken)
