"""Which pages hold which tokens: a tree with a page of tokens per node.

A node's place says all that its keys depend on: the tokens before it along the path, and everything else in the root's
name. Tokens are compared, not their hashes. Children are also kept in order, so that the one with the longest common
beginning is a neighbour of where the wanted tokens would stand.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from ..kv_cache import CacheGroup

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A page of tokens behind those of its parent.

    Attributes:
        tokens: As many as a page has; fewer only at the end of a text.
        parent: `None` for a root.
        digest: Names the path to here, in every process.
        depth: Pages before it.
        pages: Page of each cache group, 0 where it is not on the device.
        copies: The page's bytes in host memory, per cache group, or `None`.
        stored: Cache groups whose page is on disk.
        used: When the node was last found or entered, in seconds.
        ttl: Seconds after its last use at which it is given up, or `None`.
        claim: Who computed the page, and the end of its tokens, until a sampled token proves it free of NaN.
        name: Of a root: what else its tree's keys depend on.
    """

    tokens: Tokens
    parent: Node | None
    digest: bytes
    pages: list[int]
    copies: list[Any]
    stored: frozenset[int] = frozenset()
    used: float = 0.0
    depth: int = 0
    ttl: float | None = None
    claim: tuple[Any, int] | None = None
    name: Any = None
    children: dict[Tokens, Node] = field(default_factory=dict)
    _order: list[Tokens] = field(default_factory=list)

    @classmethod
    def root(cls, name: Any, digest: bytes, groups: int) -> Node:
        """The beginning of a tree."""
        return cls((), None, digest, [0] * groups, [None] * groups, name=name)

    def child_digest(self, tokens: Tokens) -> bytes:
        """128 bits for the path that goes on with `tokens`."""
        return blake2b(self.digest + array("q", tokens).tobytes(), digest_size=16).digest()

    def add(self, tokens: Tokens) -> Node:
        """A new child."""
        count = len(self.pages)
        depth = self.depth + (self.parent is not None)
        child = Node(tokens, self, self.child_digest(tokens), [0] * count, [None] * count, depth=depth)
        self.children[tokens] = child
        insort(self._order, tokens)
        return child

    def detach(self) -> None:
        """Leave the tree."""
        if self.parent is not None and self.parent.children.get(self.tokens) is self:
            del self.parent.children[self.tokens]
            del self.parent._order[bisect_left(self.parent._order, self.tokens)]

    def closest(self, tokens: Tokens) -> Node | None:
        """The child with the longest common beginning, or `None` if there is none."""
        place = bisect_left(self._order, tokens)
        near = [self.children[key] for key in self._order[max(0, place - 1) : place + 1]]
        best = max(near, key=lambda node: common(node.tokens, tokens), default=None)
        return best if best is not None and common(best.tokens, tokens) else None

    def subtree(self) -> Iterator[Node]:
        """This node and all below it, each before those below it."""
        todo = [self]
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    @property
    def bare(self) -> bool:
        """Whether neither the node nor anything below it holds contents in memory."""
        return not self.children and not any(self.pages) and not any(copy is not None for copy in self.copies)


def common(first: Tokens, second: Tokens) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def walk(
    root: Node,
    tokens: Sequence[int],
    size: int,
    limit: int,
    child_of: Callable[[Node, Tokens], Node | None],
) -> tuple[list[Node], int]:
    """Follow `tokens` down the tree.

    Args:
        root: Where to begin.
        tokens: The prompt.
        size: Tokens of a page.
        limit: Tokens that may be found.
        child_of: Looks up the child for a page of tokens, or else the one that begins like it.

    Returns:
        The nodes, and how many tokens they have in common with the prompt; of the last node perhaps only some.
    """
    nodes: list[Node] = []
    node, found = root, 0
    while found < limit:
        wanted = tuple(tokens[found : found + size])
        child = child_of(node, wanted)
        if child is None:
            break
        nodes.append(child)
        shared = common(child.tokens, wanted)
        found += shared
        if shared < size:
            break
        node = child
    return nodes, min(found, limit)


def longest(
    nodes: Sequence[Node], found: int, size: int, groups: Sequence[CacheGroup], has: Callable[[Node, int], bool]
) -> int:
    """How many of the `found` tokens every cache group has all pages for that the next token sees."""
    behind = []  # per group and node: nodes without a gap that end there
    for index in range(len(groups)):
        run, runs = 0, []
        for node in nodes:
            run = run + 1 if has(node, index) else 0
            runs.append(run)
        behind.append(runs)
    while found > 0:
        pages = -(-found // size)
        needed = [pages - group.first_visible(found) // size for group in groups]
        if all(runs[pages - 1] >= count for runs, count in zip(behind, needed, strict=True)):
            break
        found = (pages - 1) * size
    return found
