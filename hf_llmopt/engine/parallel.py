"""Models whose weights are sharded over processes by transformers' `tp_plan=`.

Every process, a rank, runs the same engine over its own heads: its pages hold the keys of its own key heads, found by
the probe as for any model. A forward pass is a collective operation, so ranks have to plan the same passes. They do,
because planning depends on nothing but requests; what depends on a clock or on free memory is decided in advance here,
or by all ranks together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..config import LLMOptConfig
from ..errors import InvalidOption, UnsupportedModel
from ..kv_cache import PagedStore

DRAFTS = 4  # guesses in each step where `num_tokens` leaves that to the clock
KEPT = 8  # one page in so many may be kept for prompts that come again, unless the user says otherwise


_at_the_end: list[tuple[dist.ProcessGroup, weakref.WeakMethod[Callable[[str], object]]]] = []


def _ending(destroy: Callable[..., None]) -> Callable[..., None]:
    @wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        for own, reference in _at_the_end:
            if group in (None, dist.group.WORLD, own) and (give_up := reference()):
                give_up("its process group has ended")
        destroy(group)

    return destroy_process_group


class Ranks:
    """The processes that a model is sharded over.

    Args:
        group: Of torch.distributed.
        device: Where its collectives find tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """How many there are."""
        return self.group.size()

    def least(self, number: int) -> int:
        """The smallest of the numbers that the ranks give; called by all of them."""
        shared = torch.tensor(number, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, self.group)
        return int(shared)

    def anybody(self, says: bool) -> bool:
        """Whether it is so on any rank; called by all of them."""
        return self.least(not says) == 0

    def call_at_the_end(self, give_up: Callable[[str], object]) -> None:
        """Have a method of an object called with a reason before the group ends, if the object lives till then.

        NCCL ends no group while there are graphs that hold operations of it.
        """
        if not _at_the_end:
            dist.destroy_process_group = _ending(dist.destroy_process_group)
        _at_the_end.append((self.group, weakref.WeakMethod(give_up)))


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """Over which processes a model's weights are sharded; `None` if this one has all of them.

    Raises:
        UnsupportedModel: They are sharded along more than one axis: tensor parallel is served, what it is combined with
            is not.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor  # takes a while to import, and few need it

    mesh = next((weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None)
    if mesh is None or mesh.size() == 1:
        return None
    if mesh.ndim > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is sharded over a mesh of shape {tuple(mesh.shape)}. What can be served is tensor "
            "parallel alone: from_pretrained(..., tp_plan='auto')."
        )
    return Ranks(mesh.get_group(), model.device)


def require_alike(config: LLMOptConfig, size: int) -> None:
    """Refuse what processes would do differently.

    Args:
        config: What was asked for.
        size: Processes that a model is sharded over.

    Raises:
        InvalidOption: It asks for such a thing.
    """
    cache, prompts, guesses = config.kv_cache, config.prompt_cache, config.speculative
    refused = {
        f"KVCacheConfig(eviction={cache.eviction!r})": cache.eviction is not None,
        "KVCacheConfig(offload=True)": cache.offload,
        "PromptCacheConfig(path=...)": prompts is not None and prompts.path is not None,
        "PromptCacheConfig(host_bytes=...)": prompts is not None and bool(prompts.host_bytes),
        "PromptCacheConfig(ttl=...)": prompts is not None and prompts.ttl is not None,
    }
    method = None if guesses is None else guesses.effective_method
    refused[f"SpeculativeConfig(method={method!r})"] = method not in (None, "suffix", "draft_model")
    if asked := next((option for option, given in refused.items() if given), None):
        raise InvalidOption(
            f"{asked} is not served where a model is sharded over {size} processes (tp_plan=): they have to run "
            "the same passes. Leave it out, or load the model into one process."
        )


def alike(config: LLMOptConfig, ranks: Ranks, store: PagedStore) -> LLMOptConfig:
    """A config with which all ranks plan the same passes; called by all of them.

    Args:
        config: What the caller asked for.
        ranks: The model's.
        store: Pages as the config asks for them; it says how many this rank has memory for.

    Raises:
        InvalidOption: Something was asked for that ranks would do differently.
    """
    require_alike(config, ranks.size)
    cache, prompts, guesses = config.kv_cache, config.prompt_cache, config.speculative
    # Processes of one machine share the memory that each sees free.
    pages = max(1, ranks.least(min(store.limits())) // (ranks.size if ranks.device.type == "cpu" else 1))
    if cache.max_tokens is None:
        cache = replace(cache, max_tokens=pages * cache.page_size)
    if prompts is not None:
        kept = pages // KEPT * sum(store.page_bytes(group) for group in range(len(store.groups)))
        prompts = replace(prompts, host_bytes=0, max_bytes=kept if prompts.max_bytes is None else prompts.max_bytes)
    if guesses is not None and guesses.num_tokens is None:
        guesses = replace(guesses, num_tokens=DRAFTS)
    batching = replace(config.batching, swap_bytes=0)
    return replace(config, kv_cache=cache, prompt_cache=prompts, speculative=guesses, batching=batching)
