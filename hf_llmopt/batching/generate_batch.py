"""Many prompts through one engine: submitted as places become free, handed out in order or as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import EngineFull
from .engine import Engine
from .handle import RequestHandle

Submit = Callable[[], "RequestHandle | None"]  # `None` if the caller has the result already


def generate_batch(
    model: PreTrainedModel,
    inputs: Iterable[Tensor | list[int]],
    llmopt: Any = "continuous_batching",
    *,
    seed: int | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> list[list[int]]:
    """Generate from many prompts of token ids, by continuous batching.

    Args:
        model: A causal language model.
        inputs: Prompt ids; a generator is read as requests are submitted.
        llmopt: Any form of the keyword but `False`.
        seed: Makes sampling repeatable, whatever runs beside; `torch.manual_seed` does so too.
        progress_bar: Show how many have finished.
        kwargs: What `Engine.submit` takes, for all prompts.

    Returns:
        The new tokens of each prompt, in the order of the prompts. With `num_return_sequences=n`, `n` entries for each
        prompt, behind one another.

    Raises:
        LLMOptError: A request failed; the others were cancelled.

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
        ended = progress(stream(submits, room(engine)), total, progress_bar)
        return [choice.result() for _, handle in ended if handle is not None for choice in handle.choices]


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


def stream(submits: Iterable[Submit], limit: int, in_order: bool = True) -> Iterator[tuple[int, RequestHandle | None]]:
    """Submit requests and yield each with its number once all of its sequences have ended.

    The iterator of requests is read only as far as needed. If the caller stops early, what runs is cancelled.

    Args:
        submits: Each hands in one request.
        limit: Most sequences that are submitted and have not ended.
        in_order: In the order of the requests, else as they end.
    """
    ended: SimpleQueue[int] = SimpleQueue()
    handles: dict[int, RequestHandle | None] = {}  # submitted, not yet handed out
    unfinished: dict[int, int] = {}  # how many sequences of each still run
    done: list[int] = []
    waiting = enumerate(submits)
    item = next(waiting, None)
    try:
        while item is not None or handles:
            while item is not None and sum(unfinished.values()) < limit and len(handles) < 4 * limit:
                number, submit = item
                try:
                    handle = submit()
                except EngineFull:
                    if not unfinished:
                        raise
                    break  # others fill the line too: try again when one of ours has ended
                handles[number] = handle
                item = next(waiting, None)
                if handle is None:
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
            for choice in left.choices if left is not None else ():
                choice.cancel()
