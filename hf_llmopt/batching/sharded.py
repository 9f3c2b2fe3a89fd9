"""An engine whose model is sharded over processes of this machine, which it starts, watches and ends.

```
start ─▶ processes of ranks 1, 2, ... ─▶ all load their shard and make an engine ─▶ they follow rank 0: this process
```

Nobody outlives the others: a rank that ends by itself ends the engine, and ranks whose first one has gone end too. What
torch.distributed alone does about that depends on the backend: gloo raises at once, NCCL waits for minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Expired
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..engine.parallel import require_alike
from ..errors import EngineClosed, InvalidOption, LLMOptError, UnsupportedModel
from .engine import Engine
from .lockstep import Lockstep

LOADING = timedelta(hours=2)  # large models, slow disks
REFUSED = 3  # exit code
GRACE = 5.0  # seconds in which a rank that fails with the others says why, or ends when it was told to

Load = Callable[[], PreTrainedModel]


class ShardedEngine(Engine):
    """An `Engine` on rank 0, and the processes of the other ranks. Made by `start`.

    Args:
        model: This rank's shard.
        llmopt: Any form of the keyword but `False`.
        followers: The other ranks.
        on_loss: Called with a message, in a thread, when one of them has ended by itself.

    Raises:
        UnsupportedModel: transformers has no plan by which to shard this model.
    """

    def __init__(
        self, model: PreTrainedModel, llmopt: Any, followers: Followers, on_loss: Callable[[str], object] | None = None
    ) -> None:
        super().__init__(model, llmopt)
        if self._lockstep is None:
            raise UnsupportedModel(
                f"transformers has no tensor parallel plan for {type(model).__name__}, so its weights cannot be "
                "sharded. Load it into one process."
            )
        self._followers = followers
        self._on_loss = on_loss
        self._ending = False
        threading.Thread(
            target=_watch, args=(weakref.ref(self), followers), name="hf_llmopt-ranks", daemon=True
        ).start()

    @classmethod
    def start(
        cls, load: Load, ranks: int, llmopt: Any = True, on_loss: Callable[[str], object] | None = None
    ) -> ShardedEngine:
        """Start the other ranks, load the model on all of them, and return the engine of rank 0.

        Args:
            load: Loads a rank's shard, by `from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))`.
                It is pickled.
            ranks: How many there are, this process included.
            llmopt: Any form of the keyword but `False`.
            on_loss: Called with a message, in a thread, when a rank has ended by itself: before requests fail.

        Raises:
            InvalidOption: torch.distributed is in use, or something was asked for that ranks would do differently.
            UnsupportedModel: The model cannot be sharded or served.
            EngineClosed: A rank ended before there was an engine.
        """
        if dist.is_initialized():
            raise InvalidOption("torch.distributed is in use in this process; make an Engine on each of its ranks.")
        config = LLMOptConfig.parse(llmopt)
        if config is not None:
            require_alike(config, ranks)
        followers = Followers(load, ranks, llmopt)
        made: Future[ShardedEngine] = Future()

        def make() -> None:
            try:
                followers.join(0)
                made.set_result(cls(load(), llmopt, followers, on_loss))
            except BaseException as error:
                made.set_exception(error)

        # In a thread: it may wait for ever for a rank that is gone.
        threading.Thread(target=make, name="hf_llmopt-rank-0", daemon=True).start()
        lost = None
        try:
            while not made.done() and lost is None:
                lost = followers.lost(0.1)
            return made.result(GRACE if lost else None)  # what fails on all ranks is told best by this one
        except (LLMOptError, RuntimeError, Expired) as error:  # or a collective operation failed, or hangs
            lost = lost or followers.lost(1.0)
            if lost is None or followers.refused:
                raise
            raise EngineClosed(f"{lost}. That was while the model was loaded: its output says why.") from error
        finally:
            if not made.done() or made.exception() is not None:
                followers.end(0.0)
                if made.done() and dist.is_initialized():
                    dist.destroy_process_group()

    def close(self) -> None:
        """End what still runs with `EngineClosed`, and all ranks. Harmless if closed already."""
        if os.getpid() != self._process or self._ending:
            return
        self._ending = True
        if self.lost is not None:  # the thread is not waited for: it may never come back
            self.lost = self._followers.lost(1.0) or self.lost
            self._followers.end(0.0)
            return
        super().close()
        leaving = threading.Thread(target=_leave, args=(self._lockstep,), name="hf_llmopt-leave", daemon=True)
        leaving.start()  # in a thread: where a rank ends just now, it may wait for ever
        self._followers.end(GRACE)
        leaving.join(GRACE)

    def lose(self, message: str) -> None:
        """A rank has ended: nothing can be computed any more.

        The thread of the engine may wait in a collective operation for ever, so requests end without it.
        """
        self.lost = message
        if self._on_loss is not None:
            self._on_loss(message)
        with self._gate:
            self._closed = self._over = True
            self._gate.notify_all()
        for handle in list(self._live.values()):
            handle._finish(EngineClosed(message))


class Followers:
    """The processes of all ranks but the first. They end with the process that made them, however that ends.

    Args:
        load: As of `ShardedEngine.start`.
        ranks: How many there are, the first one included.
        llmopt: Any form of the keyword but `False`.
    """

    def __init__(self, load: Load, ranks: int, llmopt: Any) -> None:
        self._folder = TemporaryDirectory(prefix="hf_llmopt-ranks-")
        self.ranks = ranks
        spawn = multiprocessing.get_context("spawn")
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._threads // ranks))  # they share the cores
        arguments = (self._folder.name, ranks, torch.get_num_threads(), load, llmopt)
        self._processes = [
            spawn.Process(target=_follow, args=(rank, *arguments), name=f"hf_llmopt-rank-{rank}", daemon=True)
            for rank in range(1, ranks)
        ]
        for process in self._processes:
            process.start()

    def join(self, rank: int) -> None:
        """Enter the group as a rank."""
        _join(rank, self.ranks, self._folder.name)

    def lost(self, seconds: float | None = None) -> str | None:
        """Wait until a rank has ended, and say which; `None` if none did within some seconds."""
        ended = wait([process.sentinel for process in self._processes], seconds)
        for rank, process in enumerate(self._processes, 1):
            if process.sentinel in ended:
                process.join(1.0)  # its code comes a moment later
                return (
                    f"Rank {rank} of {self.ranks} has ended with exit code {process.exitcode}; a sharded model needs "
                    "all of them"
                )
        return None

    @property
    def refused(self) -> bool:
        """Whether those that have ended were refused what they were asked for, as rank 0 will be."""
        codes = {process.exitcode for process in self._processes}
        return REFUSED in codes and codes <= {REFUSED, None}

    def end(self, seconds: float) -> None:
        """Wait so long until all have ended, then kill those that have not."""
        until = monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, until - monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
        torch.set_num_threads(self._threads)


def _join(rank: int, ranks: int, folder: str) -> None:
    """Make the process group of all ranks, and bind this process to its GPU where there are any."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))  # transformers reads them
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=LOADING,
        device_id=device,
    )


def _follow(rank: int, folder: str, ranks: int, threads: int, load: Load, llmopt: Any) -> None:
    """What the process of another rank runs."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes at once, and rank 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _join(rank, ranks, folder)
        with Engine(load(), llmopt) as engine:
            engine.follow()
        _leave(engine._lockstep)
    except LLMOptError:
        raise SystemExit(REFUSED) from None  # rank 0 says why


def _leave(lockstep: Lockstep | None) -> None:
    """End the process group; harmless if a rank has ended before."""
    with suppress(RuntimeError):
        if lockstep is not None:
            lockstep.leave()


def _end_with_the_first() -> None:
    """End this process when rank 0 has ended: a collective operation may wait for it for ever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _watch(reference: weakref.ref[ShardedEngine], followers: Followers) -> None:
    """Tell the engine when a rank ends that was not told to. It holds no engine: one that is dropped is collected."""
    message = followers.lost()
    engine = reference()
    if engine is not None and message is not None and not engine._ending:
        engine.lose(message)
