"""Which replica gets a request: the one that holds the beginning of its prompt, unless it has too much to do."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from . import ray_request
from .ray_request import Asked

REMEMBERED = 100_000  # beginnings of prompts


class PrefixRouter(RequestRouter):
    """Remembers where prompts went, and sends those that begin alike to the same replica.

    Its engine has the pages of that beginning, so it computes the rest only. Everything else goes where the fewest
    requests run, as far as this process knows. Options of `RequestRouterConfig(request_router_kwargs=...)`:

    Args:
        chunk: Characters by which beginnings are compared.
        slack: How many requests more than the idlest replica the preferred one may have.
    """

    def initialize_state(self, chunk: int = 256, slack: int = 16) -> None:
        """Called once by Ray, with the options."""
        self._chunk = chunk
        self._slack = slack
        self._homes: OrderedDict[bytes, ReplicaID] = OrderedDict()  # by beginning
        ray_request.ROUTERS.add(self)  # by its module: Ray sends copies of what is global in this one

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which they are asked; of one rank, the one with the fewest requests is."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))  # the first wins a tie
        asked = _asked(pending_request)
        if pending_request is None or asked is None:
            return [replicas]
        pending_request.routing_context.should_backoff = True  # all have been asked, so wait before the next round
        if asked.replica:
            return [[replica for replica in replicas if replica.replica_id.unique_id == asked.replica] or replicas]
        home = self._home(asked, {replica.replica_id: replica for replica in replicas})
        return [replicas] if home is None else [[home], [replica for replica in replicas if replica is not home]]

    def _home(self, asked: Asked, alive: dict[ReplicaID, RunningReplica]) -> RunningReplica | None:
        """The replica that holds the longest beginning of a prompt; `None` if nobody has it, or time for it."""
        running = {replica: self.replica_queue_len_cache.get(replica) or 0 for replica in alive}
        for name in reversed(asked.beginnings(self._chunk)):
            home = self._homes.get(name)
            if home in alive:
                return alive[home] if running[home] <= min(running.values()) + self._slack else None
        return None

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken a request: from now on it holds that prompt."""
        asked = _asked(pending_request)
        for name in [] if asked is None or asked.replica else asked.beginnings(self._chunk):
            self._homes[name] = replica_id
            self._homes.move_to_end(name)
        while len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)

    @property
    def replicas(self) -> list[str]:
        """The replicas that it knows."""
        return [replica.unique_id for replica in self.curr_replicas]


def _asked(pending: PendingRequest | None) -> Asked | None:
    given = pending.args[0] if pending is not None and pending.args else None
    return given if isinstance(given, Asked) else None
