"""The server under a load that does not wait for it, beside `transformers serve`; and what HTTP costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_llmopt import Engine

from .continuous_batching import Limits
from .kv_cache import describe
from .measure import environment, interleave, paired_ratio, summary
from .serve_expected import Expected
from .serve_load import Ask, Client, Load, Reply, arrivals, closed_loop, draw, open_loop
from .serve_process import NoServer, Server, ending, paused, started

OURS, THEIRS = "hf-llmopt serve", "transformers serve"
RATES, OVERHEAD = "rates", "overhead"
PARTS = (RATES, OVERHEAD)
ENGINE, WHOLE, STREAMED = "engine", "HTTP", "HTTP, streamed"
SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)  # request rates, of what our server does when all requests come at once
WARM_UP, SATURATED, AT_RATE, CLOSED = range(4)  # what a draw is for: no two of them have a prompt in common
LOAD, LIMITS = Load(), Limits()
OnRun = Callable[[str, str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        load: The requests.
        rates: Requests per second; by default `SHARES` of what our server does at most.
        limits: What counts as good.
        clients: Of the closed loop that overhead is measured with.
        repeats: Runs of that loop.
        parts: `"rates"`, `"overhead"`.
        seed: Of prompts, lengths and arrivals.
    """

    load: Load = LOAD
    rates: tuple[float, ...] = ()
    limits: Limits = LIMITS
    clients: int = 8
    repeats: int = 3
    parts: tuple[str, ...] = PARTS
    seed: int = 0

    @property
    def runs(self) -> int:
        """How often `on_run` is called, if both servers start."""
        rates = 2 * (1 + len(self.rates or SHARES)) if RATES in self.parts else 0
        return rates + (4 * self.repeats if OVERHEAD in self.parts else 0)


def bench(
    model: PreTrainedModel,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    commands: Mapping[str, Sequence[str]],
    logs: Path,
    name: str,
    plan: Plan = Plan(),
    on_run: OnRun = lambda part, way: None,
) -> dict[str, Any]:
    """Measure latencies at several request rates, and the time that HTTP takes above the engine's own.

    Greedy. All text that came over HTTP is compared with what `generate` of transformers gives to the prompts, one by
    one; of a model in float32 all of ours must be the same.

    Args:
        model: What the servers serve, for `generate`.
        engine: The same in this process, with the settings of our server.
        tokenizer: The model's.
        texts: Prompts are cut from them.
        commands: How `OURS`, and maybe `THEIRS`, is started.
        logs: A folder for what they write.
        name: What both call the model.
        plan: What to measure.
        on_run: Called with the part's and the way's name after each run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether our answers were right.

    Raises:
        NoServer: Our own does not start.
    """
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        servers = {}
        for way, command in commands.items():
            log = logs / f"{way.split()[0]}.log"
            try:
                servers[way] = stack.enter_context(started(command, log))
                _warm_up(servers[way], name, texts, plan, log)
            except NoServer as error:
                if way == OURS:
                    raise
                refused[way] = str(error)
                servers.pop(way, None)
        connect = {way: partial(Client, server.url, name) for way, server in servers.items()}
        found = _rates(servers, connect, texts, plan, on_run) if RATES in plan.parts else []
        overhead = None
        if OVERHEAD in plan.parts:
            closed = partial(_closed, engine, tokenizer, servers, name, plan)
            closed(ENGINE, draw(plan.load, texts, [plan.seed, WARM_UP]))
            overhead = _loops(closed, texts, plan, partial(on_run, OVERHEAD))
    expect = Expected(model, tokenizer)
    points = [_point(*measured, plan.limits, expect) for measured in found]
    exact = describe(model)["dtype"] == "float32"
    reasons = _reasons(points, overhead, expect, exact)
    return {
        "bench": "serve",
        "schema": 1,
        "seed": plan.seed,
        "environment": environment(),
        "model": describe(model),
        "load": asdict(plan.load),
        "limits": asdict(plan.limits),
        "refused": refused,
        "points": points,
        "best": {} if reasons else _best(points),
        "overhead": overhead and _overhead(overhead, plan, said=not reasons),
        "exact": exact,
        "reasons": reasons,
        "passed": not reasons,
    }


def _warm_up(server: Server, name: str, texts: Sequence[str], plan: Plan, log: Path) -> None:
    """A few requests: what is made at first use is made.

    Raises:
        NoServer: It answers them with an error.
    """
    asks = draw(plan.load, texts, [plan.seed, WARM_UP])[: plan.clients]
    for reply in open_loop(asks, [0.0] * len(asks), partial(Client, server.url, name))[2]:
        if reply.error is not None:
            raise NoServer(f"{reply.error}; {ending(log)}")


# --------------------------------------------------------------------------------------------------------------- rates

Measured = tuple[str, float | None, list[Ask], float, list[float], list[Reply]]


def _rates(
    servers: Mapping[str, Server],
    connect: Mapping[str, Callable[[], Client]],
    texts: Sequence[str],
    plan: Plan,
    on_run: OnRun,
) -> list[Measured]:
    """Every server at every rate, the same requests at the same times; first all at once."""
    found: list[Measured] = []

    def run(way: str, rate: float | None, seed: list[int]) -> float:
        asks = draw(plan.load, texts, seed)
        times = [0.0] * len(asks) if rate is None else arrivals(rate, len(asks), seed)
        with paused(server for other, server in servers.items() if other != way):
            measured = open_loop(asks, times, connect[way])
        found.append((way, rate, asks, *measured))
        on_run("all at once" if rate is None else f"{rate:.2f}/s", way)
        return len(asks) / measured[0]

    most = {way: run(way, None, [plan.seed, SATURATED]) for way in servers}
    for number, rate in enumerate(plan.rates or [share * most[OURS] for share in SHARES]):
        for way in servers if number % 2 else reversed(list(servers)):
            run(way, rate, [plan.seed, AT_RATE, number])
    return found


def _point(
    way: str,
    rate: float | None,
    asks: Sequence[Ask],
    seconds: float,
    due: Sequence[float],
    replies: Sequence[Reply],
    limits: Limits,
    expect: Expected,
) -> dict[str, Any]:
    whole = [(reply, at) for reply, at in zip(replies, due, strict=True) if reply.error is None]
    first = [reply.times[0] - at for reply, at in whole]
    each = [(reply.times[-1] - reply.times[0]) / max(1, reply.tokens - 1) for reply, _ in whole]
    gaps = [float(gap) for reply, _ in whole for gap in np.diff(reply.times)]
    good = sum(f <= limits.first and e <= limits.each for f, e in zip(first, each, strict=True))
    return {
        "way": way,
        "rate": rate,
        "requests": len(asks),
        "seconds": seconds,
        "errors": sorted({reply.error for reply in replies if reply.error is not None}),
        "answered": len(whole),
        "same": sum(expect.same(ask, reply) for ask, reply in zip(asks, replies, strict=True)),
        "first_token": percentiles(first),
        "between_tokens": percentiles(gaps),
        "tokens_per_second": sum(reply.tokens for reply, _ in whole) / seconds,
        "requests_per_second": len(whole) / seconds,
        "goodput": good / seconds,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """The median and what 9 of 10 and 99 of 100 stay below.

    Example:
        >>> percentiles([1.0, 2.0, 3.0])["p50"]
        2.0
    """
    return {f"p{q}": float(np.percentile(seconds, q)) if len(seconds) else None for q in (50, 90, 99)}


def _best(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The most good requests per second that each server reached, of requests that came at random."""
    best: dict[str, float] = {}
    for point in (point for point in points if point["rate"] is not None):
        best[point["way"]] = max(best.get(point["way"], 0.0), point["goodput"])
    return best


# ------------------------------------------------------------------------------------------------------------ overhead


@dataclass(frozen=True)
class Loop:
    """A run of the closed loop: its requests, the seconds it took, and the replies."""

    asks: list[Ask]
    seconds: float
    replies: list[Reply]


def _loops(
    closed: Callable[[str, list[Ask]], tuple[float, list[Reply]]],
    texts: Sequence[str],
    plan: Plan,
    on_run: Callable[[str], None],
) -> dict[str, dict[str, list[Loop]]]:
    """The same requests through the engine and over HTTP, for either kind of answer requests of their own.

    Otherwise one of them would find the prompts of the other.
    """
    loops: dict[str, dict[str, list[Loop]]] = {}
    for kind, over in enumerate((WHOLE, STREAMED)):
        turns = {way: iter(range(plan.repeats)) for way in (ENGINE, over)}

        def run(way: str, kind: int = kind, turns: Any = turns) -> Loop:
            asks = draw(plan.load, texts, [plan.seed, CLOSED, kind, next(turns[way])])
            return Loop(asks, *closed(way, asks))

        loops[over] = interleave({way: partial(run, way) for way in turns}, plan.repeats, on_run)
    return loops


def _closed(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    servers: Mapping[str, Server],
    name: str,
    plan: Plan,
    way: str,
    asks: list[Ask],
) -> tuple[float, list[Reply]]:
    if way != ENGINE:
        with paused(server for other, server in servers.items() if other != OURS):
            return closed_loop(asks, plan.clients, lambda: Client(servers[OURS].url, name, way == STREAMED))
    ids = {ask: tokenizer(ask.prompt)["input_ids"] for ask in asks}
    tokens: dict[Ask, list[int]] = {}

    def answer(ask: Ask) -> Reply:
        tokens[ask] = engine.submit(ids[ask], max_new_tokens=ask.new, do_sample=False).result()
        return Reply(tokens=len(tokens[ask]))

    with paused(servers.values()):
        seconds, replies = closed_loop(asks, plan.clients, lambda: nullcontext(answer))
    for ask, reply in zip(asks, replies, strict=True):
        reply.text = tokenizer.decode(tokens[ask], skip_special_tokens=True)  # type: ignore[assignment]
    return seconds, replies


def _overhead(loops: Mapping[str, Mapping[str, list[Loop]]], plan: Plan, said: bool) -> dict[str, Any]:
    """How much longer the same requests take over HTTP; `said` is whether anything is said about speed."""
    ways = {}
    for over, pair in loops.items():
        seconds = {way: [loop.seconds for loop in found] for way, found in pair.items()}
        ratio = paired_ratio(seconds[over], seconds[ENGINE])
        ways[over] = {
            "engine_seconds": summary(seconds[ENGINE]),
            "seconds": summary(seconds[over]),
            "times": asdict(ratio) if said else None,
        }
    return {"clients": plan.clients, "repeats": plan.repeats, "ways": ways}


# ------------------------------------------------------------------------------------------------------------ equality


def _reasons(
    points: Sequence[Mapping[str, Any]],
    overhead: Mapping[str, Mapping[str, list[Loop]]] | None,
    expect: Expected,
    exact: bool,
) -> list[str]:
    """Why our server did not pass, a line each."""
    mine = [point for point in points if point["way"] == OURS]
    reasons = [f"{OURS}: {error}" for point in mine for error in point["errors"]]
    if exact:
        wrong = sum(point["requests"] - point["same"] for point in mine)
        reasons += [f"{OURS} gave {wrong} answers other than generate's"] if wrong else []
    for over, pair in (overhead or {}).items():
        loops = [(way, loop) for way, found in pair.items() for loop in found[: None if exact else 0]]
        for way in (ENGINE, over):
            wrong = sum(
                not expect.same(ask, reply)
                for whose, loop in loops
                if whose == way
                for ask, reply in zip(loop.asks, loop.replies, strict=True)
            )
            reasons += [f"{way} gave {wrong} answers other than generate's in the closed loop"] if wrong else []
        reasons += [f"{over}: {r.error}" for loop in pair[over] for r in loop.replies if r.error is not None]
    return reasons
