"""`BatchingPipeline`: transformers' text generation pipeline over an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TextGenerationPipeline

from ..errors import InvalidOption, InvalidRequest, NotServed
from ..generation import Wishes, handle_of
from .engine import Engine
from .generate_batch import name_input, progress, room, seeds, stream
from .handle import RequestHandle

# What a call takes for itself, and what stands for it.
_OURS = {"in_order": True, "progress_bar": False, "return_exceptions": False, "return_stats": False}


class BatchingPipeline(TextGenerationPipeline):
    """What `pipeline("text-generation", ..., llmopt="continuous_batching")` returns.

    Takes strings, chats, lists, generators, torch datasets and any other iterable, such as a column of a `datasets`
    object, and gives what the stock pipeline gives. Inputs are requests that come and go: as one ends, the next one
    starts, and none is padded. `batch_size` and `num_workers` are not needed and have no effect.

    Every call also takes `progress_bar=True`, and what `Engine.submit` takes beyond the arguments of `generate`:
    `seed`, `salt`, `priority`, `deadline`, ... With sampling, `torch.manual_seed` makes a call repeatable, and the
    tokens of an input do not depend on the others. With `logprobs=` and `prompt_logprobs=` each output has a key of
    that name, with `return_stats=True` the key `stats` (`Stats`, with `usage`).

    An input that fails raises when it is its turn, as in the stock pipeline; the inputs behind it are cancelled. With
    `return_exceptions=True` its error stands in the place of its outputs, and all others are completed. Processors,
    criteria and streamers of your own may carry state: with them, one input runs at a time, as in the stock pipeline.

    Args:
        args: As of `TextGenerationPipeline`.
        llmopt: Any form of the keyword but `False`.
        kwargs: As of `TextGenerationPipeline`.

    Example:
        >>> from hf_llmopt import BatchingPipeline, demo
        >>> model, tokenizer = demo.load()
        >>> complete = BatchingPipeline(model=model, tokenizer=tokenizer)
        >>> outputs = complete(["import", "class"], max_new_tokens=4)
        >>> [list(output[0]) for output in outputs]
        [['generated_text'], ['generated_text']]
        >>> complete.close()
    """

    def __init__(self, *args: Any, llmopt: Any = "continuous_batching", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._llmopt = llmopt
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine that serves the pipeline; made on first use."""
        if self._engine is None:
            self._engine = Engine(self.model, self._llmopt)
        return self._engine

    def close(self) -> None:
        """Stop the engine's thread and cancel what runs; the next call makes a new one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Complete one or several prompts.

        Args:
            text_inputs: A string, a chat, or a list, generator, dataset or other iterable of them.
            kwargs: As of the stock pipeline, and what the class describes.

        Returns:
            As the stock pipeline: for one input its outputs, for a list a list, for anything else an iterator, which
            yields in the order of the inputs as soon as it can.

        Raises:
            LLMOptError: An input failed, and the message says which.
        """
        if "llmopt" in kwargs:
            raise InvalidOption("llmopt= belongs to pipeline(..., llmopt=...), a call takes other arguments.")
        return super().__call__(_generator(text_inputs), **kwargs)

    def as_completed(self, text_inputs: Iterable[Any], **kwargs: Any) -> Iterator[tuple[int, Any]]:
        """Complete prompts and yield each as soon as it has ended.

        Args:
            text_inputs: A list, generator, dataset or other iterable of strings or chats.
            kwargs: As of a call.

        Yields:
            The number of the input, and its outputs.
        """
        inputs: Any = (item for item in text_inputs)
        results: Any = super().__call__(inputs, in_order=False, **kwargs)
        yield from results

    def _sanitize_parameters(  # type: ignore[override]
        self, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        ours = {name: kwargs.pop(name) for name in _OURS if name in kwargs}
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, {**forward, **ours}, postprocess

    def run_single(self, inputs: Any, preprocess: Any, forward: Any, postprocess: Any) -> Any:
        """Complete one prompt; called by transformers."""
        return next(self.get_iterator([inputs], 0, 1, preprocess, forward, postprocess))

    def get_iterator(
        self, inputs: Any, num_workers: int, batch_size: int, preprocess: Any, forward: Any, postprocess: Any
    ) -> Iterator[Any]:
        """Complete many prompts; called by transformers."""
        own = {name: forward.get(name, default) for name, default in _OURS.items()}
        wishes, forward = Wishes.split({name: value for name, value in forward.items() if name not in _OURS})
        total = len(inputs) if hasattr(inputs, "__len__") else None
        prepared: dict[int, Any] = {}  # inputs of those that run

        def submit(number: int, item: Any, seed: int) -> RequestHandle | None:
            if isinstance(item, dict):
                raise InvalidRequest(
                    f"A prompt is a string or a chat, got a row with {sorted(item)}; give a column, "
                    "dataset['text'] say, or KeyDataset(dataset, 'text')."
                )
            if number not in prepared:
                prepared[number] = self.preprocess(item, **preprocess)
            return self._submit(prepared[number], forward, replace(wishes, seed=seed))

        def submits() -> Iterator[Any]:
            items = (inputs[i] for i in range(total)) if total is not None else iter(inputs)
            for number, (item, seed) in enumerate(zip(items, seeds(wishes.seed), strict=False)):
                yield partial(submit, number, item, seed)

        def outputs() -> Iterator[Any]:
            with closing(stream(submits(), room(self.engine), own["in_order"])) as ended:
                for number, handle in ended:
                    ready = prepared.pop(number, None)
                    try:
                        if isinstance(handle, Exception):
                            raise handle
                        found: Any = self.postprocess(self._outputs(ready, handle), **postprocess)
                        self._report(found, ready, handle, wishes, own["return_stats"])
                    except Exception as error:
                        if total != 1:
                            name_input(error, number)
                        if not own["return_exceptions"]:
                            raise
                        found = error
                    yield found if own["in_order"] else (number, found)

        return progress(outputs(), total, own["progress_bar"])

    def _submit(self, inputs: Any, forward: dict[str, Any], wishes: Wishes) -> RequestHandle | None:
        """Submit what the stock pipeline would generate; `None` if it has to generate it itself."""
        # The stock method prepares the call as always; where it calls `generate`, `submit_call` takes over.
        prepare = partial(TextGenerationPipeline._forward, self)
        try:
            on_device = self._ensure_tensor_on_device(dict(inputs), device=self.device)
            return self.engine.submit_call(lambda: prepare(on_device, **forward), wishes)
        except NotServed:
            asked = (wishes.logprobs, wishes.prompt_logprobs, wishes.constraint)
            if any(wish is not None for wish in asked):
                raise  # stock has none of them
            if wishes.salt is not None:
                forward = {**forward, "llmopt": self.engine.config_for(wishes)}
            inputs["served"] = self.forward(dict(inputs), **forward)
            inputs["stats"] = handle_of(self.model).stats
            return None

    def _report(
        self, outputs: list[Any], inputs: dict[str, Any], handle: RequestHandle | None, wishes: Wishes, stats: bool
    ) -> None:
        """Add what was asked for to the output of each sequence, and note the figures on the model."""
        if handle is not None:
            handle_of(self.model).stats = handle.choices[0].stats
        for place, output in enumerate(outputs):
            choice = None if handle is None else handle.choices[place]
            if stats:
                output["stats"] = inputs["stats"] if choice is None else choice.stats
            for name in ("logprobs", "prompt_logprobs"):
                if getattr(wishes, name) is not None:
                    output[name] = getattr(choice, name)

    def _outputs(self, inputs: dict[str, Any], handle: RequestHandle | None) -> dict[str, Any]:
        """What the stock method returns for a request that has ended."""
        if handle is None:
            served: dict[str, Any] = inputs["served"]
            return served
        rows = [choice.sequence() for choice in handle.choices]
        longest = max(len(row) for row in rows)
        padded = torch.full((1, len(rows), longest), handle.choices[0].pad, device="cpu")
        for place, row in enumerate(rows):
            padded[0, place, : len(row)] = row
        ids: Tensor = inputs["input_ids"]
        return {
            "generated_sequence": padded,
            "input_ids": ids if ids.shape[1] else None,
            "prompt_text": inputs["prompt_text"],
        }


def _generator(inputs: Any) -> Any:
    """Iterables that the stock pipeline would take for a single input, as a generator; others as they are."""
    if isinstance(inputs, (str, dict, list, tuple, Dataset, GeneratorType)) or not hasattr(inputs, "__iter__"):
        return inputs
    return (item for item in inputs)
