"""Many prompts through one engine: submitted as places become free, handed out in order or as they end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import EngineFull, LLMOptError, ObjectInUse
from ..generation import handle_of
from .engine import Engine
from .handle import RequestHandle

Submit = Callable[[], "RequestHandle | None"]  # `None` if the caller has the result already
Ended = RequestHandle | Exception | None  # an exception if the request could not be submitted


def generate_batch(
    model: PreTrainedModel,
    inputs: Iterable[Tensor | list[int]],
    llmopt: Any = "continuous_batching",
    *,
    seed: int | None = None,
    progress_bar: bool = False,
    return_exceptions: bool = False,
    return_handles: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Generate from many prompts of token ids, by continuous batching.

    Args:
        model: A causal language model.
        inputs: Prompt ids; a generator is read as requests are submitted.
        llmopt: Any form of the keyword but `False`.
        seed: Makes sampling repeatable, whatever runs beside; `torch.manual_seed` does so too.
        progress_bar: Show how many have finished.
        return_exceptions: Put the error of a request that fails into its place, as `asyncio.gather` does.
        return_handles: Return the requests' handles, which have `result()`, `stats` with `usage`, and `logprobs`.
        kwargs: What `Engine.submit` takes, for all prompts. Processors, criteria and streamers of your own may carry
            state: with them, one prompt runs at a time.

    Returns:
        The new tokens of each prompt, in the order of the prompts. With `num_return_sequences=n`, `n` entries for each
        prompt, behind one another.

    Raises:
        LLMOptError: A request failed, and the message says which; the others were cancelled.

    Example:
        >>> import hf_llmopt
        >>> from hf_llmopt import demo
        >>> model, tokenizer = demo.load()
        >>> prompts = tokenizer(["import", "class", "def main"])["input_ids"]
        >>> [len(tokens) for tokens in hf_llmopt.generate_batch(model, prompts, max_new_tokens=4)]
        [4, 4, 4]
    """
    total = len(inputs) if isinstance(inputs, Sized) else None
    with Engine(model, llmopt) as engine:
        submits = (
            partial(engine.submit, ids, seed=own, **kwargs) for ids, own in zip(inputs, seeds(seed), strict=False)
        )
        results: list[Any] = []
        for number, ended in progress(stream(submits, room(engine)), total, progress_bar):
            if isinstance(ended, Exception):
                outcomes = [ended] * _sequences(model, kwargs)
            else:
                outcomes = [c.error or (c if return_handles else c.result()) for c in ended.choices]
                handle_of(model).stats = ended.choices[0].stats
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    name_input(outcome, number)
                    if not return_exceptions:
                        raise outcome
            results += outcomes
        return results


def _sequences(model: PreTrainedModel, arguments: Mapping[str, Any]) -> int:
    config = arguments.get("generation_config") or model.generation_config
    return arguments.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1


def name_input(error: Exception, number: int) -> None:
    """Let the message of one of our errors say which input of a call it is about."""
    if isinstance(error, LLMOptError) and not str(error).startswith("Input "):
        error.args = (f"Input {number}: {error}",)


def seeds(seed: int | None) -> Iterator[int]:
    """A seed for each request, drawn from torch's default generator or from one with this seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    while True:
        yield int(torch.randint(2**62, (), generator=generator))


def room(engine: Engine) -> int:
    """How many requests are to be submitted at one time: twice as many as run, so that the line never gets empty."""
    return min(2 * engine.config.batching.max_requests, engine.config.batching.max_waiting)


def progress(items: Iterator[Any], total: int | None, shown: bool) -> Iterator[Any]:
    """The same items under a progress bar, unless transformers' progress bars are switched off."""
    return iter(logging.tqdm(items, total=total)) if shown else items


def stream(submits: Iterable[Submit], limit: int, in_order: bool = True) -> Generator[tuple[int, Any], None, None]:
    """Submit requests and yield each with its number once all of its sequences have ended.

    The iterator of requests is read only as far as needed. If the caller stops early, what runs is cancelled. In the
    place of a request that could not be submitted stands the exception.

    Args:
        submits: Each hands in one request.
        limit: Most sequences that are submitted and have not ended.
        in_order: In the order of the requests, else as they end.
    """
    ended: SimpleQueue[int] = SimpleQueue()
    handles: dict[int, Ended] = {}  # submitted, not yet handed out
    unfinished: dict[int, int] = {}  # how many sequences of each still run
    done: list[int] = []
    waiting = enumerate(submits)
    item = next(waiting, None)
    try:
        while item is not None or handles:
            while item is not None and sum(unfinished.values()) < limit and len(handles) < 4 * limit:
                number, submit = item
                handle: Ended
                try:
                    handle = submit()
                except Exception as error:
                    # Others fill the line too, or ours use the same objects: try again when one of ours has ended.
                    if unfinished and isinstance(error, (EngineFull, ObjectInUse)):
                        break
                    handle = error
                handles[number] = handle
                item = next(waiting, None)
                if not isinstance(handle, RequestHandle):
                    done.append(number)
                    break
                unfinished[number] = len(handle.choices)
                for choice in handle.choices:
                    choice.when_done(partial(ended.put, number))
            first = next(iter(handles))
            if in_order and first not in unfinished:
                yield first, handles.pop(first)
            elif done and not in_order:
                yield (number := done.pop(0)), handles.pop(number)
            else:
                number = ended.get()
                unfinished[number] -= 1
                if not unfinished[number]:
                    del unfinished[number]
                    done.append(number)
    finally:
        for left in handles.values():
            for choice in left.choices if isinstance(left, RequestHandle) else ():
                choice.cancel()
