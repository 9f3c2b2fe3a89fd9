"""A batch file on a pool of engines, on one machine or many, by Ray Data. Needs the extra `ray`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import ray.data
import torch

from . import batch
from .batch import Counts, Line, Tell
from .recipe import Recipe


class Answers:
    """What each actor of the pool runs: an engine that answers requests as a server would.

    Args:
        recipe: How its service is made.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._service = recipe.service()
        self._answer = batch.answerer(self._service)
        self._setting = recipe.setting

    async def __call__(self, asked: dict[str, Sequence[str]]) -> AsyncIterator[dict[str, list[str]]]:
        """Answer some requests; Ray calls it for several batches at one time, so that the engine stays busy."""
        lines = [_read(text) for text in asked["line"]]
        results = await asyncio.gather(*(batch.result_of(line, self._answer, self._setting) for line in lines))
        yield {"result": [json.dumps(result) for result in results]}


def run(
    source: Path,
    target: Path,
    recipe: Recipe,
    engines: int = 1,
    cpus: float = 1.0,
    gpus: float | None = None,
    batch_size: int = 32,
    tell: Tell = lambda *_: None,
    retry_failed: bool = False,
) -> Counts:
    """Answer all requests of a file that have no result yet, on a pool of engines.

    Input, output and their order are those of `hf-llmopt batch`, and either goes on where the other was stopped. If an
    engine's process dies, Ray starts another one and gives it those batches again.

    Args:
        source: One request a line.
        target: One result a line, in the order in which they came; an unfinished one is gone on with.
        recipe: Which model.
        engines: How many there are.
        cpus: Cores of each.
        gpus: GPUs of each; by default one where this machine has any.
        batch_size: Requests that are handed over together; an engine works on four times as many.
        tell: Called when results are on the disk, with the counts and how many came.
        retry_failed: Answer requests again whose result is an error.

    Raises:
        InvalidRequest: A `custom_id` comes twice, or `target` is not of this `source` and `recipe`.
        OSError: A file cannot be read or written. What was written before stays, and a later run goes on.
    """
    gpus = float(torch.cuda.is_available()) if gpus is None else gpus
    with batch.begun(source, target, recipe.setting, retry_failed) as work:
        tell(work.counts, work.counts.before)
        rows = [{"line": _written(line)} for line in work.lines]
        if not rows:
            return work.counts
        answered = ray.data.from_items(rows).map_batches(
            Answers,
            fn_constructor_args=(recipe,),
            batch_size=batch_size,
            concurrency=min(engines, -(-len(rows) // batch_size)),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for found in answered.iter_batches(batch_size=None):
            results = [json.loads(text) for text in found["result"]]
            batch.keep(results, work)
            tell(work.counts, len(results))
    return work.counts


def _written(line: Line) -> str:
    number, custom_id, url, body, error = astuple(line)
    return json.dumps([number, custom_id, url, body.decode(), error])


def _read(text: str) -> Line:
    fields: Any = json.loads(text)
    number, custom_id, url, body, error = fields
    return Line(number, custom_id, url, body.encode(), error)
