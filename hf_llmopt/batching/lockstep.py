"""Requests to a model that is sharded over processes (`tp_plan=`): all of them take the same turns.

Requests are handed in on rank 0. Before each turn it tells the others which requests came and which were given up since
the last one; then every rank prepares, schedules and samples by itself, from the same seeds, and finds the same.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from random import SystemRandom
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..engine.parallel import Ranks
from ..errors import InvalidRequest, LLMOptError, RequestCancelled
from ..generation import Wishes
from .handle import RequestHandle

PATIENCE = timedelta(days=365)  # nobody asks for anything at night; a rank that dies is noticed at once
Handles = tuple[RequestHandle, ...]  # of the sequences of a request
Repeat = Callable[[Tensor, dict[str, Any], Wishes], Handles]


@dataclass
class Told:
    """What rank 0 tells the others before a turn.

    Attributes:
        came: Requests, each as `pack` made it.
        gone: Numbers of sequences that were given up, counted from 0 as they came.
        closes: It is the last one.
    """

    came: list[bytes] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    closes: bool = False


class Turn(NamedTuple):
    """The same on each rank: requests that take part from now on, those that end, and whether it is the last turn."""

    came: list[Handles]
    gone: list[tuple[RequestHandle, LLMOptError]]
    closes: bool


class Lockstep:
    """How the ranks of an engine talk to one another. Made by all of them.

    Args:
        ranks: The model's.
        gate: Guards `came` and `gone`.

    Attributes:
        leads: Whether requests are handed in here: on rank 0.
        came: Requests of which the other ranks have not heard.
        gone: Sequences that were given up, likewise.
        numbers: By which ranks name sequences that have not ended.
    """

    def __init__(self, ranks: Ranks, gate: threading.Condition) -> None:
        members = dist.get_process_group_ranks(ranks.group)
        self.leads = ranks.rank == 0
        self.came: list[tuple[bytes, Handles]] = []
        self.gone: list[tuple[RequestHandle, LLMOptError]] = []
        self.numbers: dict[RequestHandle, int] = {}
        self._next = itertools.count()
        self._rank = ranks.rank
        self._first = members[0]
        self._gate = gate
        # Not the model's group: on GPUs that is NCCL's, which would keep a GPU busy while nobody asks for anything.
        self._group = dist.new_group(members, PATIENCE, "gloo", use_local_synchronization=True)

    @property
    def untold(self) -> int:
        """Sequences of which the other ranks have not heard."""
        return sum(len(handles) for _, handles in self.came)

    def turn(self, closed: bool, repeat: Repeat) -> Turn:
        """Agree on the next turn; called by all ranks.

        Args:
            closed: Whether it is to be the last one; counts on rank 0.
            repeat: Makes a request that came on rank 0 on another rank.

        Raises:
            RuntimeError: A rank has ended.
        """
        if not self.leads:
            told = self.share()
            came = [repeat(*pickle.loads(packed)) for packed in told.came]
            self._number(came)
            named = {number: handle for handle, number in self.numbers.items()}
            return Turn(came, [(named[number], RequestCancelled("Given up.")) for number in told.gone], told.closes)
        with self._gate:
            asked, self.came = self.came, []
            gone, self.gone = self.gone, []
        came = [handles for _, handles in asked]
        self._number(came)
        gone = [(handle, error) for handle, error in gone if handle in self.numbers]  # others have ended by themselves
        self.share(Told([packed for packed, _ in asked], [self.numbers[handle] for handle, _ in gone], closed))
        return Turn(came, gone, closed)

    def _number(self, came: list[Handles]) -> None:
        for handle in itertools.chain.from_iterable(came):
            self.numbers[handle] = next(self._next)

    def share(self, told: Told | None = None) -> Told:
        """Tell the others, or hear of it; called by all ranks.

        Raises:
            RuntimeError: A rank has ended.
        """
        shared: list[Any] = [told]
        dist.broadcast_object_list(shared, self._first, self._group)
        heard: Told = shared[0]
        return heard

    def leave(self) -> None:
        """End the process group after the last turn; called by all ranks at the same time, as NCCL needs it.

        Raises:
            RuntimeError: A rank has ended.
        """
        dist.barrier(self._group)
        dist.destroy_process_group()

    def require_leader(self) -> None:
        """Refuse requests elsewhere.

        Raises:
            InvalidRequest: This is not rank 0.
        """
        if not self.leads:
            raise InvalidRequest(
                f"This is rank {self._rank} of a sharded model, and requests are handed in on rank 0. Here, call "
                "engine.follow(), which takes part until rank 0 closes its engine."
            )


def settled(wishes: Wishes) -> Wishes:
    """Wishes that mean the same on every rank: their seed is drawn here, where there is none."""
    return wishes if wishes.seed is not None else replace(wishes, seed=SystemRandom().randrange(2**63))


def pack(ids: Tensor, kwargs: dict[str, Any], wishes: Wishes) -> bytes:
    """A request for the other ranks; its time runs on rank 0 alone.

    Raises:
        InvalidRequest: Something in it belongs to this process.
    """
    try:
        return pickle.dumps((ids.cpu(), kwargs, replace(wishes, deadline=None)))
    except Exception as error:
        raise InvalidRequest(
            "The model is sharded over processes, and every one of them needs the whole request: objects that cannot "
            f"be pickled (streamers, say) are not served ({type(error).__name__}: {error})."
        ) from error
