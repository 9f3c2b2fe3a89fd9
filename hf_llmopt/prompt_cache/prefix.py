"""What a request remembers of the prompt cache, and what the cache needs of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..kv_cache import BlockTable
from .index import Node


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
