"""What a request and a token cost on the way to an engine, hop by hop; and what an all-reduce costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerBase

from hf_llmopt import Engine

from .measure import environment, interleave, summary
from .serve_load import Ask, Client
from .serve_process import started

ENGINE, HTTP, REPLICAS = "engine", "HTTP", "Ray Serve, one replica"
PROMPT = "import os\n"  # cached from its second request on, so that the way costs more than the engine
SIZES = (4096, 65_536, 1_048_576)  # bytes of an all-reduce: tokens times hidden size times bytes of a number
Way = Callable[[int], tuple[float, float, str]]  # by new tokens: seconds, seconds per further token, and the text
Opened = Callable[[], AbstractContextManager[Way]]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        requests: Of each kind in a run.
        tokens: New tokens of those that are streamed.
        repeats: Runs, the ways in turn.
        sizes: Bytes of all-reduces.
    """

    requests: int = 40
    tokens: int = 64
    repeats: int = 5
    sizes: tuple[int, ...] = SIZES


def commands(ours: list[str]) -> dict[str, list[str]]:
    """The servers: one process, and one replica behind Ray Serve, if Ray is installed."""
    found = {HTTP: ours}
    if find_spec("ray") is not None:
        found[REPLICAS] = [*ours, "--replicas", "1"]
    return found


def bench(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    servers: Mapping[str, Sequence[str]],
    name: str,
    logs: Path,
    plan: Plan,
    on_run: Callable[[str], None] = lambda way: None,
) -> dict[str, Any]:
    """Measure, one client at a time.

    Args:
        engine: Of the model, in this process.
        tokenizer: Its tokenizer.
        servers: Their commands.
        name: What they call the model.
        logs: Folder for what they write.
        plan: How much.
        on_run: Called after each run with its way.

    Returns:
        The report.

    Raises:
        NoServer: A server did not start.
    """
    with ExitStack() as stack:
        ways: dict[str, Opened] = {ENGINE: lambda: nullcontext(partial(_submitted, engine, tokenizer))}
        for way, command in servers.items():
            server = stack.enter_context(started(command, logs / f"{len(ways)}.log"))
            ways[way] = partial(_asked, server.url, name)
        texts = {}
        for way, opened in ways.items():
            with opened() as ask:
                texts[way] = ask(plan.tokens)[2]  # warms up, too
        runs = interleave({way: partial(_run, opened, plan) for way, opened in ways.items()}, plan.repeats, on_run)
    return {
        "bench": "hops",
        "environment": environment(),
        "plan": {"requests": plan.requests, "tokens": plan.tokens, "repeats": plan.repeats},
        "ways": {
            way: {
                "seconds_per_request": summary(one for one, _ in found),
                "seconds_per_token": summary(token for _, token in found),
            }
            for way, found in runs.items()
        },
        "all_reduce_seconds": {str(size): summary(found) for size, found in all_reduce(plan.sizes).items()},
        "reasons": (
            reasons := [f"{way}: other text than the engine's" for way in texts if texts[way] != texts[ENGINE]]
        ),
        "passed": not reasons,
    }


def _run(opened: Opened, plan: Plan) -> tuple[float, float]:
    """Medians of a run: seconds of a request for one token, and of each further token of a longer one."""
    with opened() as ask:  # anew: a server closes connections that are idle while the other ways run
        ones = summary(ask(1)[0] for _ in range(plan.requests))
        tokens = summary(ask(plan.tokens)[1] for _ in range(max(1, plan.requests // 8)))
    return ones["median"], tokens["median"]


def _submitted(engine: Engine, tokenizer: PreTrainedTokenizerBase, new: int) -> tuple[float, float, str]:
    began = perf_counter()
    ids = tokenizer(PROMPT)["input_ids"]
    tokens, times = [], []
    for token in engine.submit(ids, max_new_tokens=new, do_sample=False):
        tokens.append(token)
        times.append(perf_counter())
    return times[-1] - began, _each(times), str(tokenizer.decode(tokens, skip_special_tokens=True))


@contextmanager
def _asked(url: str, name: str) -> Iterator[Way]:
    with Client(url, name, streams=False) as whole, Client(url, name) as streamed:

        def ask(new: int) -> tuple[float, float, str]:
            began = perf_counter()
            reply = (streamed if new > 1 else whole)(Ask(PROMPT, new))
            if reply.error:
                raise RuntimeError(f"{url} answered with an error: {reply.error}")
            return perf_counter() - began, _each(reply.times), reply.text

        yield ask


def _each(times: Sequence[float]) -> float:
    return (times[-1] - times[0]) / max(1, len(times) - 1)


def all_reduce(sizes: Sequence[int], ranks: int = 2, repeats: int = 200) -> dict[int, list[float]]:
    """Seconds of all-reduces over processes of this machine, by their bytes: gloo's, in float32."""
    with TemporaryDirectory() as folder:
        spawn(_rank, (ranks, folder, tuple(sizes), repeats), nprocs=ranks)
        found: dict[int, list[float]] = torch.load(Path(folder, "0.pt"))
    return found


def _rank(rank: int, ranks: int, folder: str, sizes: Sequence[int], repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found: dict[int, list[float]] = {}
    for size in sizes:
        numbers = torch.ones(size // 4)
        for _ in range(10):
            dist.all_reduce(numbers)
        found[size] = []
        for _ in range(repeats):
            began = perf_counter()
            dist.all_reduce(numbers)
            found[size].append(perf_counter() - began)
    if rank == 0:
        torch.save(found, Path(folder, "0.pt"))
    dist.destroy_process_group()
