"""`Request`: one sequence and everything that changes while it is generated (no torch here)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..kv_cache.pool import BlockTable
from ..prompt_cache import Prefix
from ..stats import Stats

if TYPE_CHECKING:
    from ..kv_cache.eviction import Selection

UNKNOWN = -1  # stands in `Request.tokens` for a token that the host does not know yet


class Rows(Protocol):
    """What the engine needs of a group: its requests, and a place for figures."""

    requests: list[Request]
    stats: Stats
    thread: int  # who waits for it
    submitted: bool  # to an `Engine`, whose other requests end without this one

    @property
    def only_best(self) -> bool:
        """Whether nobody reads more of its logits than which token is the best."""
        ...

    def account(self, seconds: float, paths: set[str], share: Share) -> None:
        """A step that computed some of the group's tokens took the model `seconds`, through these attention paths."""
        ...

    def notice(self) -> None:
        """A request of the group got its logits or failed; called with the engine's lock held."""
        ...


@dataclass(frozen=True)
class Share:
    """What a group had of a pass.

    Attributes:
        group: Whose tokens were computed.
        request: One of its rows that took part.
        computed: How many tokens of that row were computed then, in this pass and before.
        held: Pages it held then, per cache group.
        replayed: The pass came from a graph.
    """

    group: Rows
    request: Request
    computed: int
    held: list[int]
    replayed: bool = False


@dataclass(eq=False)
class Request:
    """One row: a prompt, and the tokens sampled so far.

    The engine computes `tokens[computed:]` in spans; once `computed == len(tokens)`, `logits` predict the next token
    and the request waits until its group appends one.

    Attributes:
        tokens: Ids whose keys are, or will be, in pages; padding is left out.
        positions: Position id of each token.
        next_position: Position id of the next appended token.
        left_padding: Padded columns before the first token.
        rooms: Pages set aside for the request when it is admitted, per cache group.
        masked_tail: The last prompt token is masked padding: it is a query, but nobody sees its key.
        embeds: Input embeddings `[tokens, hidden]` that stand in for the first `len(embeds)` ids, or `None`.
        chunk: Most tokens a prefill span may have, or `None`.
        parent: A request with the same prompt whose pages can be shared, or `None`.
        keeps_passed: Keep pages that windows have passed: the caller's cache wants them back.
        protected: Its pages cannot be taken away (they hold imported keys, or belong to a `generate` call).
        priority: Levels by which it goes before others, under that policy.
        tenant: Whose request it is, under the policy `"fair"`.
        arrival: Its number among those that the scheduler was given.
        salt: With whom it may share what was computed, or guessed.
        adapter: The LoRA adapter its tokens go through, `None` for what is active in the model.
        on_prompt: Called with the place of a prompt token and the logits `[tokens, vocabulary]` from there on, or
            `None` if nobody wants logits inside the prompt.
        brought: Leading tokens whose keys its group brings where it starts, from the caller's cache or a pass of the
            model's own.
        prompt: Tokens of its prompt, if some are to be evicted.
        selection: What its prompt will lose to eviction; `None` if that is nothing, or done.
        evicted: Tokens that its pages lack in groups of full attention.
        held: It stays out of the next pass, in which others share its prompt before that loses tokens.
        group: Who is told about logits, errors and figures; set when the request is added to an engine.
        computed: Tokens whose keys are in pages, or in `swapped`.
        swapped: Keys and values that lie in host memory until the request goes on, or `None`.
        tables: Block tables, one per cache group; none before it starts.
        drafted: How many of the last tokens are drafts: guesses, which the model's own choices confirm or not.
        parents: For each draft the place among the drafts of the one it stands behind, -1 for the last known token;
            `None` if each stands behind the one before.
        depths: How many drafts each stands behind.
        node: The last draft that was confirmed, -1 for none.
        chosen: By draft, -1 for before them, the token that was chosen behind it in the last step.
        moves: Tokens (from, to) whose keys have to be moved before anybody reads them: confirmed drafts close ranks.
        logits: Row `[vocabulary]` behind the last token that is no draft, once it is computed, else `None`.
        later: Rows `[vocabulary]` behind all drafts of the last step, which count where the drafts are confirmed.
        most_drafts: How many drafts can be of use, asked for before each step; `None` where nothing is drafted.
        guess: The token that it would choose with these logits, so many tokens behind its next one, and how likely its
            choice is; for drafters.
        drafted_tokens: Drafts that were computed.
        accepted_tokens: Those that were right.
        pending: Where the last token lies on the device, tokens and index, while the host does not know it; else
            `None`.
        proven: Tokens that were computed when the last known token was sampled: none of their keys is NaN.
        prefix: Whose pages may be shared, and which were; `None` for a request that shares none.
        state: Its recurrent states, `States` and a row, of a model that keeps such; else `None`.
        error: Why the request failed, or `None`.
        finished: No further token will be computed.
    """

    tokens: list[int]
    positions: list[int]
    next_position: int
    rooms: list[int]
    left_padding: int = 0
    masked_tail: bool = False
    embeds: Any = None
    chunk: int | None = None
    parent: Request | None = None
    keeps_passed: bool = False
    protected: bool = False
    priority: int = 0
    tenant: str = ""
    salt: str | None = None
    adapter: str | None = None
    on_prompt: Callable[[int, Any], None] | None = None
    brought: int = 0
    prompt: int = 0
    selection: Selection | None = None
    evicted: int = 0
    held: bool = False
    group: Rows | None = None
    computed: int = 0
    swapped: Any = None
    state: Any = None
    tables: list[BlockTable] = field(default_factory=list)
    drafted: int = 0
    parents: list[int] | None = None
    depths: list[int] = field(default_factory=list)
    node: int = -1
    chosen: dict[int, int] = field(default_factory=dict)
    moves: list[tuple[int, int]] = field(default_factory=list)
    logits: Any = None
    later: list[Any] = field(default_factory=list)
    pending: tuple[Any, int] | None = None
    proven: int = 0
    prefix: Prefix | None = None
    error: BaseException | None = None
    finished: bool = False
    most_drafts: Callable[[], int] | None = None
    guess: Any = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    charged: int = 0  # tokens that the tenant has been charged for
    proves: int = 0  # what `proven` will be once the pending token is known
    arrival: int = 0

    @property
    def remaining(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def may_draft(self) -> bool:
        """Whether only its last token is still to be computed, and guesses may stand behind it."""
        whole = self.embeds is None or self.computed >= len(self.embeds)  # embeddings are no tokens of a draft's pass
        plain = not self.masked_tail and self.on_prompt is None  # a query of its own; logits that are a prompt's
        return self.remaining == 1 and self.computed > 0 and whole and plain and self.error is None

    @property
    def awaits_keys(self) -> bool:
        """Whether its group will bring keys, which come before anything is computed."""
        return self.computed < self.brought

    @property
    def decodes(self) -> bool:
        """Whether all tokens that are still to be computed but one are drafts."""
        return self.remaining == 1 + self.drafted

    @property
    def pages_held(self) -> int:
        """Pages of all groups."""
        return sum(table.held for table in self.tables)

    @property
    def known(self) -> int:
        """Tokens that are computed, and that the host knows."""
        return min(self.computed, len(self.tokens) - max(self.drafted, self.pending is not None))

    def draft(self, tokens: Sequence[int], parents: list[int] | None = None) -> None:
        """Guess tokens that follow: they are computed together with the last one.

        Args:
            tokens: The guesses.
            parents: As the attribute.
        """
        self.parents, self.node, self.drafted = parents, -1, len(tokens)
        self.depths, self.chosen = [], {}
        for index in range(len(tokens)):
            parent = index - 1 if parents is None else parents[index]
            self.depths.append(0 if parent < 0 else self.depths[parent] + 1)
        self.tokens += tokens
        self.positions += [self.next_position + depth for depth in self.depths]

    def retract(self) -> None:
        """Forget all drafts that are not confirmed, and what was computed of them."""
        if self.drafted:
            del self.tokens[-self.drafted :], self.positions[-self.drafted :]
            self.computed = min(self.computed, len(self.tokens))
            self.drafted = 0
        self.parents = None
        self.later.clear()

    def _confirmed(self, token: int) -> int | None:
        """The draft behind the last known token that guessed this one."""
        first = len(self.tokens) - len(self.later)
        for index in range(self.node + 1, len(self.later)):
            parent = index - 1 if self.parents is None else self.parents[index]
            if parent == self.node and self.tokens[first + index] == token:
                return index
        return None

    @property
    def findable(self) -> int:
        """Leading tokens whose keys may be found: nobody wants logits inside them, nor to see how they attend."""
        if self.on_prompt is not None:
            return 0
        last = len(self.tokens) - 1
        return last if self.selection is None else min(last, self.selection.findable)

    @property
    def half_seen(self) -> bool:
        """A pass that failed has shown how its tokens attend in some layers: scores cannot be completed any more."""
        return self.selection is not None and self.selection.scores.seen > self.computed

    def ends_at(self, computed: int) -> int:
        """How far pages must reach before `computed` tokens can be computed: how the end of a prompt is decided on."""
        decides = self.selection is not None and computed >= self.prompt
        return computed + self.selection.spare if decides and self.selection is not None else computed

    def append(self, token: int) -> None:
        """Add a sampled token, confirm a draft, or say which token was expected.

        The key of a new token will be computed in the next step. That of a confirmed draft is there, and so are the
        logits behind it.
        """
        if (node := self._confirmed(token)) is not None:
            # What stands at its place is itself, or a guess before it that was wrong.
            place, source = len(self.tokens) - self.drafted, len(self.tokens) - len(self.later) + node
            self.tokens[place], self.positions[place] = token, self.next_position
            if source != place:
                self.moves.append((source, place))
            self.next_position += 1
            self.drafted -= 1
            self.node, self.proven, self.logits = node, place, self.later[node]
            return
        self.retract()
        if self.pending is None:
            self._add(token)
        self.tokens[-1], self.proven, self.pending = token, self.proves, None

    def expect(self, tokens: Any, index: int) -> None:
        """Go on with element `index` of `tokens`, which the device knows; `append` will tell the host."""
        self._add(UNKNOWN)
        self.pending = tokens, index

    def _add(self, token: int) -> None:
        self.proves = self.computed
        self.tokens.append(token)
        self.positions.append(self.next_position)
        self.next_position += 1
        self.logits = None

    def next_span(self, budget: int) -> int:
        """How many tokens the next span may have within `budget`."""
        length = min(self.remaining, budget)
        if self.decodes:
            return length
        if self.chunk is not None:
            length = min(length, self.chunk)
        if self.embeds is not None and self.computed < len(self.embeds):
            length = min(length, len(self.embeds) - self.computed)
        if self.masked_tail and length == self.remaining > 1:
            length -= 1  # the masked token is a span of its own: it sees one token less than it would
        return length

    def release(self) -> None:
        """Give every page back and forget what was computed."""
        self.retract()
        self.leave_pages()
        self.swapped = None
        if self.selection is not None:
            self.selection.restart()
        self.computed = self.proven = self.proves = 0
        self.logits = None

    def leave_pages(self) -> None:
        """Give every page back; what they held was saved, or is saved before anybody writes to them."""
        for table in self.tables:
            table.clear()
        self.tables = []
        self.held = False
        self.moves.clear()
