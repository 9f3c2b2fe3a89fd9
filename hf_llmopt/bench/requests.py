"""Requests of different lengths: the loads that they are drawn from, and the ways to serve all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_llmopt import Engine
from hf_llmopt.kernels import cpu

BATCHED, OURS = "stock generate_batch", "llmopt"
# Stock's name for a page: `block_size` until transformers 5.17.
_BLOCK = next(name for name in ("page_size", "block_size") if hasattr(ContinuousBatchingConfig, name))


@dataclass(frozen=True)
class Load:
    """A set of requests.

    Attributes:
        name: Says it in a table.
        requests: How many.
        prompts: Shortest and longest prompt, in tokens.
        new: Fewest and most new tokens.
        mean: Mean prompt and mean new tokens if lengths are log-normal, as those of people's chats are; else `None`,
            and they are uniform.
    """

    name: str
    requests: int
    prompts: tuple[int, int]
    new: tuple[int, int]
    mean: tuple[int, int] | None = None


LOADS_BY_NAME = {
    load.name: load
    for load in (
        Load("random-256", 256, (16, 128), (16, 128)),
        Load("ragged-16", 16, (32, 256), (32, 32)),
        # Means of the ShareGPT conversations as the vLLM paper gives them (arXiv:2309.06180).
        Load("sharegpt", 64, (4, 512), (4, 512), mean=(161, 338)),
        Load("nano-vllm", 256, (100, 1024), (100, 1024)),  # the benchmark of nano-vllm's README
    )
}
DEFAULT = ("random-256", "ragged-16", "sharegpt")
QUICK = (Load("random-8", 8, (4, 12), (2, 8)), Load("sharegpt", 4, (4, 16), (2, 8), mean=(8, 5)))


def in_miniature(load: Load, limit: int) -> Load:
    """The same load, its lengths bounded so that prompt and new tokens stay within `limit` positions."""
    half = limit // 2
    return replace(
        load,
        prompts=(min(load.prompts[0], half), min(load.prompts[1], half)),
        new=(min(load.new[0], half), min(load.new[1], half)),
    )


@dataclass(frozen=True)
class Job:
    """One request: prompt ids, and how many tokens to generate."""

    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Done:
    """A run over all jobs.

    Attributes:
        seconds: How long it took.
        tokens: The new tokens of each job.
        refusals: Why transformers served calls that llmopt was asked to serve.
    """

    seconds: float
    tokens: list[list[int]]
    refusals: tuple[str, ...] = ()


def jobs(load: Load, vocabulary: int, texts: Sequence[list[int]] | None = None, seed: int = 0) -> list[Job]:
    """Draw the requests of a load.

    Args:
        load: How many, and how long.
        vocabulary: Token ids of the model: 0 to `vocabulary - 1`.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        seed: Chooses lengths and places.

    Example:
        >>> [(len(job.prompt), job.new) for job in jobs(Load("two", 2, (3, 9), (1, 5)), vocabulary=50)]
        [(9, 2), (3, 3)]
    """
    rng = np.random.default_rng([seed, load.requests])
    lengths = [_lengths(rng, load, column) for column in (0, 1)]
    text = None if texts is None else [token for one in texts for token in one]
    drawn = []
    for length, new in zip(*lengths, strict=True):
        if text is None:
            prompt = rng.integers(0, vocabulary, size=length).tolist()
        else:
            start = int(rng.integers(len(text) - length + 1))
            prompt = text[start : start + length]
        drawn.append(Job(prompt, new))
    return drawn


def _lengths(rng: np.random.Generator, load: Load, column: int) -> list[int]:
    low, high = (load.prompts, load.new)[column]
    if load.mean is None:
        return list(map(int, rng.integers(low, high + 1, size=load.requests)))
    sigma = 1.0
    drawn = rng.lognormal(np.log(load.mean[column]) - sigma**2 / 2, sigma, size=load.requests)
    return list(map(int, drawn.clip(low, high)))


def stock(model: PreTrainedModel, rows: int, requests: Sequence[Job]) -> Done:
    """A loop of stock `generate` over batches of `rows` requests, padded on the left."""
    tokens = []
    began = perf_counter()
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        inputs = {name: tensor.to(model.device) for name, tensor in left_padded([job.prompt for job in batch]).items()}
        width = inputs["input_ids"].shape[1]
        longest = max(batch, key=lambda job: job.new)
        output = model.generate(**inputs, llmopt=False, **arguments(longest))  # type: ignore[operator]
        tokens += [row[width:][: job.new] for row, job in zip(output.tolist(), batch, strict=True)]
    return Done(perf_counter() - began, tokens)


def left_padded(prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Prompts as one batch: `input_ids` and `attention_mask`, both `[rows, longest]`.

    Example:
        >>> left_padded([[5, 6], [7]])["input_ids"].tolist()
        [[5, 6], [0, 7]]
    """
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def batched(model: PreTrainedModel, requests: Sequence[Job]) -> Done:
    """Stock's own continuous batching; its attention implementation is put back.

    On a GPU it chooses its own settings, CUDA graphs among them. On the CPU it cannot: it gets room for all requests.
    """
    former, size = model.config._attn_implementation, 32
    blocks = sum(-(-(len(job.prompt) + job.new) // size) + 1 for job in requests)
    room: dict[str, Any] = {_BLOCK: size, "num_blocks": blocks + 2, "max_batch_tokens": 512}
    batching = ContinuousBatchingConfig(**(room if model.device.type == "cpu" else {}))
    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found: dict[str, list[int]] = {}
    cpu.rest()  # it has a thread of its own, which this one's OpenMP threads would slow down
    began = perf_counter()
    try:
        with model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:  # type: ignore[operator]
            for number, job in enumerate(requests):
                manager.add_request(job.prompt, request_id=str(number), max_new_tokens=job.new)
            while len(found) < len(requests):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    found[output.request_id] = list(output.generated_tokens)
                elif output is None and not manager.is_running():
                    raise RuntimeError("stock's continuous batching stopped")
    finally:
        seconds = perf_counter() - began
        if model.config._attn_implementation != former:
            model.set_attn_implementation(former)
    return Done(seconds, [found[str(number)] for number in range(len(requests))])


def ours(engine: Engine, requests: Sequence[Job]) -> Done:
    """Submitted to an engine, all at once."""
    began = perf_counter()
    handles = [engine.submit(job.prompt, **arguments(job)) for job in requests]
    tokens = [handle.result() for handle in handles]
    seconds = perf_counter() - began
    refusals = {handle.stats.reason or "" for handle in handles if handle.stats.served_by != "llmopt"}
    return Done(seconds, tokens, tuple(sorted(refusals)))


def arguments(job: Job) -> dict[str, Any]:
    """What `generate` and `submit` are told: greedy, and EOS does not end the request."""
    return {"max_new_tokens": job.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
