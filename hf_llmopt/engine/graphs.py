"""CUDA graphs: passes over short spans, and over a part of one prompt, are recorded once and replayed.

A pass is some thousand launches, which take the host longer than the device, unless it computes a thousand tokens or
two of a large model. A graph is launched at once. Replaying runs no Python, so whatever differs between passes must lie
in tensors at fixed addresses (`fixed.py`).

A kind of pass (`Key`) runs eagerly when it is first met, is recorded when it is met again (prompts, of which there are
many kinds: when it was met often), and then, on inputs other than those it was recorded with, compared with the eager
pass; from then on it is replayed. What cannot be recorded runs eagerly, and `Graphs.why_not` says why.

The passes of a model that is sharded over processes are collective operations, which all of them must launch in the
same way: what one of them finds against a graph counts for all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import FixedInputs, StepInputs, backend, configs_of, replayable
from ..config import LLMOptConfig
from ..errors import InvalidOption
from ..kv_cache import PagedStore
from ..prompt_cache.epoch import adapted, runs_more, settings
from ..walk import modules, running
from .capture import CAPTURES, Run
from .fixed import Batch, Inputs, Key, key_of
from .parallel import Ranks

MOST = 128  # kinds of passes; when there are more, the one whose turn is longest ago is given up
OFTEN = 4  # times that a prompt's kind runs eagerly: to record and compare takes as long as several replays save
ELSEWHERE = "another process of the sharded model can replay none"
LOOKS = 16  # passes between two looks at where the weights lie, which every call begins with


class Compute(Protocol):
    """The model's pass."""

    def __call__(self, ids: Tensor, positions: Tensor, kept: Tensor, columns: Tensor, step: StepInputs) -> Tensor:
        """Logits `[kept, vocabulary]`."""
        ...


@dataclass
class _Recorded:
    """A graph, the tensors it reads, the attention paths in it, and whether it was compared with the eager pass."""

    inputs: Inputs
    replay: Run
    paths: set[str] = field(default_factory=set)
    proven: bool = False


class Graphs:
    """The graphs of a model over a store's pages.

    Args:
        model: Its passes; held weakly.
        store: The pages.
        config: What the caller asked for.
        ranks: The processes that the model is sharded over, if it is.

    Attributes:
        why_not: Why no pass is replayed, or `None`.
        replays: Passes that were replayed.

    Raises:
        InvalidOption: Graphs cannot be recorded here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        config: LLMOptConfig,
        ranks: Ranks | None = None,
    ) -> None:
        device = store.layers[0].device
        if device.type not in CAPTURES:
            raise InvalidOption(
                f"graphs=True records CUDA graphs, and the model is on {device}. Move it to a GPU, or leave graphs out."
            )
        if config.attention.backend not in ("auto", "triton"):
            raise InvalidOption(
                f"graphs=True reads pages by the Triton kernels, got AttentionConfig({config.attention.backend!r}). "
                "Use 'auto' or 'triton', or leave graphs out."
            )
        backend("triton", device)  # or says why it cannot run
        self.store, self._device = store, device
        self._anybody: Callable[[bool], bool] = bool
        if ranks is not None:
            self._anybody = ranks.anybody
            ranks.call_at_the_end(self.give_up)
        self._capture = CAPTURES[device.type](device)
        self._graphs: dict[Key, _Recorded | int] = {}  # or how often it was met; the latest at the end
        self._prompts = True
        self._state: object = None
        self._owners: list[weakref.ref[nn.Module]] = []
        self._addresses: list[int] = []
        self._moves = store.moves
        self._passes = 0
        self.why_not: str | None = None
        self.replays = 0
        self.refresh(model, running(model))

    @classmethod
    def wanted(
        cls,
        model: PreTrainedModel,
        store: PagedStore,
        config: LLMOptConfig,
        device: torch.device,
        ranks: Ranks | None,
    ) -> Graphs | None:
        """The graphs that were asked for, or, on a GPU, those that can be recorded; arguments as of the class."""
        if config.graphs is True:
            return cls(model, store, config, ranks)
        if config.graphs is False or device.type != "cuda":
            return None
        try:
            found = cls(model, store, config, ranks)
        except InvalidOption:
            return None
        return found if found.why_not is None else None

    def refresh(self, model: PreTrainedModel, now: tuple[object, ...]) -> None:
        """Look at the model again, of which `now` runs: graphs of what it no longer is are given up."""
        experts = [getattr(config, "_experts_implementation_internal", None) for config in configs_of(model)]
        state = now, experts, settings(model, adapted(model))
        if not self._anybody(state != self._state or self._addresses != self._find_addresses()):
            return
        self._state = state
        every = modules(model)
        self._owners = [weakref.ref(module) for module in every if module._parameters or module._buffers]
        self._addresses = self._find_addresses()
        self._graphs.clear()
        self._prompts = True
        self.why_not = self._agreed(self._reason_against(model, every))

    def _agreed(self, reason: str | None) -> str | None:
        """This process's reason against graphs, or that another one has some."""
        somebody = self._anybody(reason is not None)
        return reason or (ELSEWHERE if somebody else None)

    def _reason_against(self, model: PreTrainedModel, every: Sequence[nn.Module]) -> str | None:
        """What of a model no graph would do."""
        devices = {layer.device for layer in self.store.layers}
        devices |= {tensor.device for module in every for tensor in _tensors(module)}
        if len(devices) > 1:
            return f"the model lies on {', '.join(sorted(map(str, devices)))}"
        if any(layer.offloaded for layer in self.store.layers):
            return "pages lie in host memory"
        if model.training:
            return "the model is in training mode"
        hooked = next((module for module in every if runs_more(module)), None)
        return None if hooked is None else f"a {type(hooked).__name__} has a hook or a forward of its own"

    def _find_addresses(self) -> list[int]:
        """Where weights lie, and how often they were written: a quantized copy is made in Python."""
        found = []
        for reference in self._owners:
            module = reference()
            for tensor in () if module is None else _tensors(module):
                plain = type(tensor) in (Tensor, nn.Parameter)  # others may have no address
                found.append(tensor.data_ptr() if plain else id(tensor))
                found.append(0 if tensor.is_inference() else tensor._version)
        return found

    def run(
        self, batch: Batch, compute: Compute, put_unknown: Callable[[Tensor], None], note: Callable[[str], None]
    ) -> Tensor | None:
        """Compute a pass, if there is a graph for it.

        Args:
            batch: The pass.
            compute: The model's pass, eagerly.
            put_unknown: Writes ids that only the device knows into those on the device.
            note: Called with the names of the attention paths in the pass.

        Returns:
            The logits `[kept, vocabulary]`, nobody else's; `None` if the pass has to run eagerly.
        """
        key = None if self.why_not is not None else key_of(batch, self.store.page_size)
        if key is None or (key.is_prompt and not self._prompts):
            return None
        self._passes += 1
        looks = self._passes % LOOKS == 0
        if self.store.moves != self._moves or (looks and self._anybody(self._find_addresses() != self._addresses)):
            self._moves, self._addresses = self.store.moves, self._find_addresses()
            self._graphs.clear()
        met = self._graphs.pop(key, 0)
        self._graphs[key] = met + 1 if isinstance(met, int) else met
        if isinstance(met, int) and met < (OFTEN if key.is_prompt else 1):
            if len(self._graphs) > MOST:
                del self._graphs[next(iter(self._graphs))]
            return None
        try:
            found = self._run(key, batch, compute, put_unknown)
        except Exception as error:  # of the model, maybe: then the eager pass raises it too
            self._without(key, f"recording a pass raised {type(error).__name__}: {error}")
            return None
        recorded = self._graphs.get(key)
        if found is None or not isinstance(recorded, _Recorded):
            return None
        for path in recorded.paths:
            note(path)
        self.replays += 1
        return found[: max(1, len(batch.kept))].clone()  # the next replay overwrites it

    def _run(self, key: Key, batch: Batch, compute: Compute, put_unknown: Callable[[Tensor], None]) -> Tensor | None:
        met = self._graphs[key]
        recorded = met if isinstance(met, _Recorded) else None
        inputs = Inputs(key, self.store, self._device) if recorded is None else recorded.inputs
        inputs.fill(batch)
        put_unknown(inputs.on_device.ids[: len(batch.ids)])
        if recorded is not None and recorded.proven:
            return recorded.replay()
        paths: set[str] = set()

        def run() -> Tensor:
            given = inputs.on_device
            lists = list(zip(given.tables, given.items, strict=True))
            parts = key.rows, key.length, key.context, given.slots, lists, given.tiles, key.runs
            return compute(
                given.ids, given.positions, given.kept, given.columns,
                FixedInputs(self.store, *parts, replayable, paths.add),
            )  # fmt: skip

        if recorded is None:
            self._record(key, inputs, run, paths)
            return None
        return self._prove(key, recorded, run, len(batch.kept))

    def _record(self, key: Key, inputs: Inputs, run: Run, paths: set[str]) -> None:
        reason = None
        try:
            self._graphs[key] = _Recorded(inputs, self._capture(run), paths)
        except Exception as error:  # of the model, maybe: then the eager pass raises it too
            reason = f"recording a pass raised {type(error).__name__}: {error}"
        if found := self._agreed(reason):
            self._without(key, found)

    def _prove(self, key: Key, recorded: _Recorded, run: Run, kept: int) -> Tensor | None:
        """The replay, if it gives what the eager pass gives from the same tensors; the keys it should write are gone.

        Both launch the same kernels on the same shapes, so they differ only where a kernel adds in no fixed order
        (atomics in mixtures of experts): then no farther than a few times two eager passes are apart.
        """
        expected = run()[:kept].clone()
        for layer, group in enumerate(self.store.group_of):
            for slots in (self.store.keys[layer], self.store.values[layer]):
                slots.index_fill_(0, recorded.inputs.on_device.slots[group], 0)
        found = recorded.replay()
        if self._anybody(not torch.equal(found[:kept], expected)):
            kept_found = found[:kept].clone()
            noise, distance = _distance(run()[:kept], expected), _distance(kept_found, expected)
            if self._anybody(not distance <= 4 * noise):
                self._without(key, f"a replay gave other logits than the eager pass: {distance:.1e} of their size")
                return None
            found = recorded.replay()
        recorded.proven = True
        return found

    def _without(self, key: Key, reason: str) -> None:
        """Replay no pass of a kind like this from now on: a model may wait for the device with many tokens alone."""
        if not key.is_prompt:
            return self.give_up(reason)
        self._prompts = False
        self._graphs = {other: found for other, found in self._graphs.items() if not other.is_prompt}

    def clear(self) -> None:
        """Drop what was recorded."""
        self._graphs.clear()

    def give_up(self, reason: str) -> None:
        """Replay nothing from now on."""
        self.why_not = reason
        self._graphs.clear()


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-6))
