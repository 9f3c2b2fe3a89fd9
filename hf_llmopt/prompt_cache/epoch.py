"""Whether keys that were computed before are still those that the model would compute now.

Everything that changes a key or value is in one of two places. What can be switched back and forth (adapters, rotary
settings) is part of an entry's name, so that both states keep their entries. Weights, and what runs beside the modules'
own code, only move on: each change begins an epoch, and what was computed in an earlier one is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import chain
from os import urandom
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..walk import forward_hooks, is_adapted, modules, running, sharded_forward

SAMPLES = 4  # elements of each tensor that are compared before a hit


class WeightsEpoch:
    """Counts the changes of a model's weights and modules, as far as they can be seen.

    Seen are: steps of torch's optimizers, fused ones too; writes that torch counts (`load_state_dict`, in-place
    operations); tensors and modules that were exchanged, moved or added; hooks, replaced forwards and plain attributes;
    and writes through `.data` that reach one of four random elements of some tensor. Others need `advance`.

    Args:
        anybody: Whether a change was seen in any of the processes that the model is sharded over.

    Attributes:
        number: The current epoch.
    """

    def __init__(self, anybody: Callable[[bool], bool] = bool) -> None:
        self.number = 0
        self._anybody = anybody
        self._tensors: tuple[tuple[int, int, int], ...] = ()
        self._samples = b""
        self._modules: tuple[object, ...] = ()
        self._places: list[Tensor] = []
        reference = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            epoch = reference()
            if epoch is not None:
                known = {identity for identity, _, _ in epoch._tensors}
                groups = optimizer.param_groups
                if any(id(parameter) in known for group in groups for parameter in group["params"]):
                    epoch.advance()

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def advance(self) -> None:
        """Begin a new epoch."""
        self.number += 1

    def check(self, model: PreTrainedModel) -> None:
        """Compare the model with what it was at the last check, and begin a new epoch if it differs."""
        tensors = [tensor for tensor in _weights(model) if tensor.device.type != "meta"]
        versions = (0 if tensor.is_inference() else tensor._version for tensor in tensors)
        seen = tuple((id(t), t.data_ptr(), version) for t, version in zip(tensors, versions, strict=True))
        if [tensor[:2] for tensor in seen] != [tensor[:2] for tensor in self._tensors]:
            # Where to look is chosen anew for every set of tensors, and is nobody's to guess.
            random = Random()
            self._places = [
                torch.tensor([random.randrange(tensor.numel()) for _ in range(SAMPLES)], device=tensor.device)
                for tensor in tensors
                if tensor.numel()
            ]
        samples, modules = self._sample(tensors), running(model)
        if self._anybody((seen, samples, modules) != (self._tensors, self._samples, self._modules)):
            self._tensors, self._samples, self._modules = seen, samples, modules
            self.advance()

    @torch.no_grad()
    def _sample(self, tensors: list[Tensor]) -> bytes:
        filled = [tensor for tensor in tensors if tensor.numel()]
        taken = [torch.take(_readable(tensor), places) for tensor, places in zip(filled, self._places, strict=True)]
        kinds = {(part.device, part.dtype): None for part in taken}
        together = [torch.cat([part for part in taken if (part.device, part.dtype) == kind]) for kind in kinds]
        # Bytes, because NaN differs from itself.
        return b"".join(part.cpu().view(torch.uint8).numpy().tobytes() for part in together)


def _readable(tensor: Tensor) -> Tensor:
    """Torch takes elements of every format but the smallest floating-point ones."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _weights(model: PreTrainedModel) -> Iterator[Tensor]:
    return chain.from_iterable(map(_parts, chain(model.parameters(), model.buffers())))


def _parts(tensor: Any) -> Iterator[Tensor]:
    """A tensor, or those that it wraps, as torchao's do, and those of a model that is sharded over processes."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # not the mesh that a shard belongs to
            yield from _parts(part)


def runs_more(module: torch.nn.Module) -> bool:
    """Whether more runs than the class's own code, what accelerate moves and tensor parallel sums."""
    if forward_hooks(module) or module._forward_pre_hooks:
        return True
    if "forward" not in vars(module) or sharded_forward(module) is not None:
        return False
    return not type(getattr(module, "_hf_hook", None)).__module__.startswith("accelerate.")


def adapted(model: PreTrainedModel) -> list[Any]:
    """The layers of a model that PEFT put in."""
    return [module for module in modules(model) if is_adapted(module)]


def settings(model: PreTrainedModel, layers: Iterable[Any], adapter: str | None = None) -> str:
    """What changes keys and can be switched back: adapters and rotary settings, as text.

    Args:
        model: The model.
        layers: As `adapted` returned them.
        adapter: The one adapter of a request, `None` for what is active in the model.
    """
    config = model.config.get_text_config(decoder=True)
    adapters = []
    for layer in layers:
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        parts = [getattr(layer, part, None) for part in ("merged_adapters", "scaling")]
        adapters.append((active if adapter is None else [adapter], *parts))
    return repr((getattr(config, "rope_parameters", None), adapters))


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> bytes:
    """128 bits that name a model's weights, modules and config in every process.

    Each tensor is summed as 64-bit words, along two grids of different widths: a word that changes or changes its place
    changes a sum of one of them. That runs at the memory's speed; the sums are hashed.
    """
    digest = blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(repr((transformers.__version__, type(model).__name__, sorted(config.items()))).encode())
    for module in model.modules():
        if runs_more(module):  # what, no other process can know
            return urandom(16)
        digest.update(repr((type(module), module.extra_repr())).encode())
    named = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in ((name, part) for name, held in named for part in _parts(held)):
        if tensor.device.type == "meta":  # offloaded: not here to be looked at, so no other process may match
            return urandom(16)
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole = flat.numel() - flat.numel() % 8
        digest.update(flat[whole:].cpu().numpy().tobytes())
        words = flat[:whole].view(torch.int64)
        for width in (1024, 1009):
            rows = words.numel() - words.numel() % width
            for part in (words[:rows].view(-1, width).sum(0), words[rows:]):
                digest.update(part.cpu().numpy().tobytes())
    return digest.digest()
