"""Whether the engine gives the logits of the model's own forward pass, before anybody relies on it.

What is known of a model (how its layers attend, what its modules compute) was found by watching it, and watching may
miss something. So a few tokens run through both: once as transformers runs them, once over pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..config import KVCacheConfig
from ..errors import CallbackFailed, LLMOptError, UnsupportedModel
from ..kv_cache import BlockTable, PagedStore
from ..quantization import QuantizedHead, QuantizedLinear
from .probe import input_device, input_weight
from .request import Request
from .runner import Runner
from .whole import take_in

PROMPT, NEW = 8, 4  # tokens computed together, and one by one
# What another order of additions may change, as a share of the logits' size; deep models in half precision drift far.
FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF = 0.25
INT8 = 0.05  # activations in int8: whatever moves one to its neighbour shows in every product behind it


def prove(runner: Runner) -> None:
    """Take what is replaced by C out of the engine, step by step, until it gives the model's own logits.

    Args:
        runner: Of an engine that runs nothing now.

    Raises:
        UnsupportedModel: Not even torch's operators over pages give them.
    """
    model = runner.model
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(input_weight(model).shape[0], (PROMPT + NEW,), generator=generator, device="cpu")
    try:
        truth, noise = _own_logits(model, tokens)
    except Exception:  # nothing to compare with: a hook that raises, say
        return
    if not truth.isfinite().all():
        return
    quantized = [m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedHead))]
    int8 = any(getattr(module, "activations", True) for module in quantized)  # a head has no say in it
    bound = max(FLOORS.get(runner.store.layers[0].dtype, HALF), INT8 if int8 else 0.0, 4 * noise)
    while True:
        try:
            distance = _distance(_over_pages(runner, tokens.tolist()), truth)
        except CallbackFailed:  # an attention of the user's own
            raise
        except (LLMOptError, RuntimeError, TypeError, ValueError, LookupError) as error:
            distance, reason = float("inf"), f"its pass over pages raised {type(error).__name__}: {error}"
        else:
            reason = f"its logits over pages differ from its own by {distance:.1%} of their size"
        if not runner.anybody(not distance <= bound):
            return
        if not runner.fall_back():
            raise UnsupportedModel(f"{type(model).__name__} cannot be optimized: {reason}")


@torch.no_grad()
def _own_logits(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, float]:
    """The model's logits `[1 + NEW, vocabulary]` behind the prompt, and what a pass of another size changes in them."""
    ids = tokens.to(input_device(model))[None]
    whole, shorter = (model(input_ids=given, use_cache=False).logits[0].float() for given in (ids, ids[:, :PROMPT]))
    return whole[PROMPT - 1 :], _distance(whole[:PROMPT], shorter)


@contextmanager
def _with_pages(runner: Runner, tokens: int) -> Iterator[list[BlockTable]]:
    """Let a runner work over pages of their own for a while; yields the tables of a request that may get `tokens`."""
    store = runner.store
    runner.store = PagedStore(store.layers, KVCacheConfig(page_size=4), store.dense, store.reads_columns)
    try:
        rooms = [group.pages_for(tokens, 4, tokens) for group in runner.store.groups]
        runner.store.provide(rooms)
        yield runner.store.tables(rooms)
    finally:
        runner.store = store


@torch.no_grad()
def pass_seconds(runner: Runner, tokens: int) -> float:
    """What a pass takes that computes a token of a request and `tokens - 1` drafts behind it, the faster of two."""
    times = []
    total = PROMPT + tokens
    with _with_pages(runner, total) as tables:
        request = Request([0] * total, list(range(total)), total, [], tables=tables, drafted=tokens - 1)
        for table in tables:
            table.reserve(0, total)
        request.computed = PROMPT
        for _ in range(2):
            began = perf_counter()
            runner.run([(request, tokens)], lambda path: None)
            if runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)
            times.append(perf_counter() - began)
    return min(times)


@torch.no_grad()
def _over_pages(runner: Runner, tokens: list[int]) -> Tensor:
    """The same logits from the engine, over pages of their own."""
    with _with_pages(runner, len(tokens)) as tables:
        request = Request(tokens[:PROMPT], list(range(PROMPT)), PROMPT, [], tables=tables)
        rows = []
        later: list[int | None] = [*tokens[PROMPT:], None]
        if runner.states:
            _compute_whole(runner, request)
            rows.append(request.logits)
            request.append(tokens[PROMPT])
            del later[0]
        for token in later:
            start, stop = request.computed, len(request.tokens)
            for table in request.tables:
                table.reserve(start, stop)
            ((_, logits),), _ = runner.run([(request, stop - start)], lambda path: None)
            rows.append(logits[-1])
            request.computed = stop
            if token is not None:
                request.append(token)
        return torch.stack(rows).float()


def _compute_whole(runner: Runner, request: Request) -> None:
    """Let the model's own pass compute a prompt."""
    ids = torch.tensor([request.tokens], device=runner.device)
    cache = DynamicCache(config=runner.model.config)
    logits = runner.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    mask = torch.ones(ids.shape, dtype=torch.bool, device="cpu")
    take_in(runner.store, [request], cache, mask, logits, states=True)


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth.to(found.device)).norm() / truth.norm().clamp_min(1e-6))
