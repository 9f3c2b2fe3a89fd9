"""Trees of guesses in a span, and what each guess sees (SpecInfer, Miao et al. 2024).

A span's last tokens may be guesses that follow one another in more than one way. They lie in neighbouring slots, a
parent before its children:

    parents   -1  0  0  1        slots   ... base - 1 | base  base + 1  base + 2  base + 3
                                                  (-1)    0         1         2         3

Node 3 follows 1, which follows 0, which follows the token before the nodes. Each sees all tokens before the nodes, its
ancestors and itself, and what it computes is what it would compute in a span without the others. What it sees of a
window or chunk counts from its place in the text, that of its parent plus one, and not from its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..kv_cache import CacheGroup

MOST_NODES = 31  # so that 32 bits also say that what lies before the nodes is seen


class Nodes(NamedTuple):
    """What the nodes of a tree see.

    Attributes:
        firsts: The first slot of its request that each node sees, or that a node may see.
        bits: Whether it sees the slot that lies j before its own, bit j; what lies farther back is seen.
    """

    firsts: list[int]
    bits: list[int]


def nodes_of(parents: Sequence[int], base: int, group: CacheGroup) -> Nodes:
    """What each node sees of its request's slots in a cache group.

    Args:
        parents: The node that each one follows, a parent before its children; -1 for the token before the nodes.
        base: The first node's slot in the request.
        group: The cache group.

    Raises:
        ValueError: There are more than `MOST_NODES`, or a child stands before its parent.

    Example:
        >>> from hf_llmopt.kv_cache import CacheGroup, PagePool
        >>> nodes = nodes_of([-1, 0, 0, 1], 5, CacheGroup("full", 0, [0], PagePool(0)))
        >>> [format(bits & 0b1111, "04b") for bits in nodes.bits]
        ['1111', '1111', '1101', '1101']
    """
    if len(parents) > MOST_NODES or any(not -1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError(
            f"A tree has at most {MOST_NODES} nodes, each behind its parent or behind -1, got {list(parents)}."
        )
    paths, depths = [-1], [0]  # of the token before the nodes, then of each node
    firsts, bits = [], []
    for node, parent in enumerate(parents):
        paths.append(paths[parent + 1] << (node - parent) | 1)
        depths.append(depths[parent + 1] + 1)
        first = group.first_visible(base - 1 + depths[-1])
        own = paths[-1] & (2 << node) - 1
        for _ in range(first - base):  # the window does not reach back to the tree's beginning
            own ^= 1 << own.bit_length() - 1
        bits.append(own | -2 << node)
        firsts.append(min(first, base))
    return Nodes(firsts, bits)


def visible(queries: range, keys: range, group: CacheGroup, base: int, nodes: Nodes, device: torch.device) -> Tensor:
    """Which slots of a request are seen by slots of a span that ends in a tree.

    Args:
        queries: Slots of the span.
        keys: Slots of the request.
        group: The cache group.
        base: The first node's slot.
        nodes: What the nodes see.
        device: Of the result.

    Returns:
        Bool `[queries, keys]`.
    """
    place, key = (torch.arange(slots.start, slots.stop, device="cpu") for slots in (queries, keys))
    mask = reference.visible(place, key, group.kind, group.window)
    place = place[place >= base]
    first, bits = (torch.tensor(values, device="cpu")[place - base, None] for values in nodes)
    back = place[:, None] - key
    seen = (bits >> back.clamp(0, MOST_NODES) & 1).bool()  # the last bit, that of what lies before all nodes, is set
    mask[len(mask) - len(place) :] = seen & (back >= 0) & (key >= first)
    return mask.to(device)
