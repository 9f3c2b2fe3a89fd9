"""Spans to tensors to logits: one forward pass of the unchanged model."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import LoraLayers
from ..attention import Attend, Observer, Span, StepInputs, backend, configs_of, serving
from ..config import LLMOptConfig
from ..errors import InvalidOption, UnsupportedModel
from ..fusion import Fusion, Screened, launches
from ..kernels import cpu
from ..kernels.arguments import TILED
from ..kv_cache import Clock, PagedStore, SpanCache, Staged, Streams, states_of, upload
from ..kv_cache.eviction import Scored, called
from ..walk import running
from .fixed import Batch
from .graphs import Graphs
from .parallel import Ranks
from .probe import input_device
from .request import Request
from .spans import columns_of, ids_of, long, put_unknown, slots_of, watches_of
from .taps import Taps

OFFLOADED = {"cuda"}  # types of devices whose pages host memory can take


class Runner:
    """Runs the model over spans.

    Args:
        model: Kept weakly: an engine must not keep a model alive.
        store: The pages.
        config: Which backend reads them, whether results may depend on the batch, and whether passes are replayed.
        eviction: Who looks at how requests with a `selection` attend, if anybody does.
        states: The model keeps recurrent states: a pass computes one token of each request, in rows.
        ranks: The processes that the model is sharded over, if it is.

    Raises:
        InvalidOption: The backend cannot run here, or graphs cannot be recorded here.
        UnsupportedModel: `batch_invariant` is asked for and the model has products that are torch's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        config: LLMOptConfig,
        eviction: Scored | None = None,
        states: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.states = states
        self.ranks = ranks
        self._model = weakref.ref(model)
        self._configs = configs_of(model)
        self.device = input_device(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.store = store
        self.cache = SpanCache(len(store.layers))
        device = store.layers[0].device
        self._lora = LoraLayers()
        self.attend = backend(config.attention.backend, device, config.batch_invariant)
        self._eviction = eviction
        self._invariant = config.batch_invariant
        self._streams: dict[torch.device, Streams] = {}
        if config.kv_cache.offload:
            self._streams = self._offloading(store)
        launched = launches(device)
        # Joined layers write pages themselves, those of C to where they lie, and compute a row of tokens.
        layers = launched or (config.attention.backend in ("auto", "cpu") and not self._streams)
        wide = not launched and any(max(each.key_dim, each.value_dim) > cpu.MAX_DIM for each in store.layers)
        if wide and self._invariant:
            raise UnsupportedModel(f"batch_invariant=True needs the C kernels: heads of up to {cpu.MAX_DIM} numbers.")
        layers = layers and not states and not wide
        timed = ranks is None  # the clocks of several processes would choose differently
        fuses = layers if launched else device.type == "cpu"
        self.fusion = Fusion(model, store.layers, layers, self._invariant, timed) if fuses else None
        self._less: tuple[str, ...] = ()  # what the engine does without
        # Where states lie depends on who runs: no address is fixed.
        self.graphs = None if states else Graphs.wanted(model, store, config, self.device, ranks)
        self.taps: Taps | None = None  # of a drafter that reads hidden states

    def _offloading(self, store: PagedStore) -> dict[torch.device, Streams]:
        """What copies pages to and from each device."""
        devices = {layer.device for layer in store.layers if layer.offloaded}
        if inside := sorted(str(device) for device in devices if device.type not in OFFLOADED):
            raise InvalidOption(
                f"KVCacheConfig(offload=True) moves pages from a GPU to host memory, and the model is on {inside[0]}: "
                "there is nothing to offload. Move the model to a GPU, or leave offload out."
            )
        streams = {device: Streams(device) for device in devices}

        def settle() -> None:
            for stream in streams.values():
                stream.settle()

        store.settle = settle
        return streams

    @property
    def model(self) -> PreTrainedModel:
        """The model; it lives as long as somebody outside holds it."""
        model = self._model()
        if model is None:
            raise ReferenceError("The model of this engine was deleted; keep a reference to it while you generate.")
        return model

    def fall_back(self) -> bool:
        """Do without joined layers, then without any replaced module; `False` if nothing is left to do without."""
        if self.fusion is None or self._invariant:
            return False
        part = "decoder layer" if self.fusion.layers else "modules"
        self._less = (f"{part}: eager, together they gave other logits",)
        again = self.fusion.layers and not self.fusion.launched
        self.fusion = Fusion(self.model, self.store.layers, False, timed=self.fusion.timed) if again else None
        return True

    def refresh(self) -> bool:
        """Look at the model again; `True` if modules were exchanged, adapted or hooked since the last call."""
        self._configs = configs_of(self.model)
        self.device = input_device(self.model)
        self._lora.refresh(self.model)
        now = running(self.model)
        if self.graphs is not None:
            self.graphs.refresh(self.model, now)
        return self.anybody(self.fusion is not None and self.fusion.refresh(self.model, now))

    def weights_changed(self) -> None:
        """Somebody says that weights were written in a way that cannot be seen."""
        if self.graphs is not None:
            self.graphs.clear()
        if self._head is not None:
            self._head.forget()

    def anybody(self, says: bool) -> bool:
        """Whether it is so in any process that the model is sharded over; called by all of them."""
        return says if self.ranks is None else self.ranks.anybody(says)

    @property
    def _head(self) -> Screened | None:
        """The output head that can be asked for the best tokens only."""
        return None if self.fusion is None else self.fusion.head

    @property
    def replays(self) -> int:
        """Passes that were replayed from graphs."""
        return 0 if self.graphs is None else self.graphs.replays

    @property
    def no_graphs(self) -> str | None:
        """Why none is replayed though graphs were asked for, or `None`."""
        if self.states:
            return "the model keeps recurrent states"
        if self.graphs is not None and self.taps is not None:
            return "a drafter reads the model's hidden states, which a replay would not hand out"
        return None if self.graphs is None else self.graphs.why_not

    @property
    def fused(self) -> tuple[str, ...]:
        """What our kernels compute instead of the model's own modules."""
        return self._less if self.fusion is None else (*self.fusion.describe(), *self._less)

    def run(
        self, spans: Sequence[tuple[Request, int]], note: Callable[[str], None]
    ) -> tuple[list[tuple[Request, Tensor]], list[Clock]]:
        """Compute every span.

        Args:
            spans: Pairs (request, tokens to compute), shortest first.
            note: Called with the names of the attention paths that ran.

        Returns:
            The logits of each request that has caught up, `[1 + drafts, vocabulary]`, and the clocks of the model's
            passes.
        """
        model = self.model
        # Embeddings cannot share an input tensor with ids: spans of a prompt given as embeddings run in their own pass.
        by_ids = [span for span in spans if span[0].embeds is None or span[0].computed >= len(span[0].embeds)]
        by_embeds = [span for span in spans if span not in by_ids]
        results: list[tuple[Request, Tensor]] = []
        clocks: list[Clock] = []
        for part in (by_ids, by_embeds):
            if part:
                logits, needed, clock = self._forward(model, part, note, part is by_embeds)
                results += [(request, logits[row - request.drafted : row + 1]) for request, row in needed]
                clocks.append(clock)
        return results, clocks

    def _forward(
        self,
        model: PreTrainedModel,
        spans: Sequence[tuple[Request, int]],
        note: Callable[[str], None],
        embeds: bool,
    ) -> tuple[Tensor, list[tuple[Request, int]], Clock]:
        device = self.device
        positions: list[int] = []
        kept: list[int] = []  # places in the pass whose logits somebody wants
        needed: list[tuple[Request, int]] = []  # requests that caught up, and where in `kept` their last token is
        inside: list[tuple[Request, int]] = []  # requests that want the logits of a whole span, and where it starts
        placed: list[Span] = []
        for request, length in spans:
            start, stop = request.computed, request.computed + length
            context = stop - (request.masked_tail and stop == len(request.tokens))
            placed.append(Span(request.tables, len(positions), length, context, request.parents))
            if request.on_prompt is not None:
                inside.append((request, len(kept)))
                kept += range(len(positions), len(positions) + length - 1)
            elif request.decodes:
                kept += range(len(positions), len(positions) + request.drafted)
            positions += request.positions[start:stop]
            if request.on_prompt is not None or length == request.remaining:
                kept.append(len(positions) - 1)
            if length == request.remaining:
                needed.append((request, len(kept) - 1))
        columns = columns_of(spans) if self.store.reads_columns else None
        slots = slots_of(self.store, spans)
        watches, attend = watches_of(spans), self.attend
        if watches and self._eviction is not None:
            attend = Observer(attend, watches, partial(called, self._eviction, "fold"), self._eviction.weighs)
        names = [request.adapter for request, length in spans for _ in range(length)]
        if self.states:
            self.cache.layers = states_of([request for request, _ in spans]).layers
        # Nobody reads more of the logits than which token is the best, and the head makes use of it.
        best = not inside and all(request.group is not None and request.group.only_best for request, _ in needed)
        best = best and self._head is not None and self._head.returned
        batch = Batch(placed, ids_of(spans), positions, kept, slots, columns, best)
        put, logits = partial(put_unknown, spans), None
        eager = embeds or any(names) or watches or self.taps is not None
        if self.graphs is not None and self.graphs.store is self.store and not eager:
            clock = Clock(device)
            logits = self.graphs.run(batch, partial(self._fused, model, batch.best), put, note)
            clock.stop()
        if logits is None:
            given = long(batch.ids, device)
            if embeds:
                rows = [request.embeds[request.computed : request.computed + length] for request, length in spans]
                given = torch.cat(rows)[None].to(device)
            else:
                put(given)
            logits, clock = self._eagerly(model, batch, given, attend, note, names, bool(watches))
        self.cache.layers = []  # states belong to their requests
        if self.taps is not None:
            self.taps.hand_out(spans)
        lengths = dict(spans)
        for request, row in inside:
            if request.on_prompt is not None:
                request.on_prompt(request.computed, logits[row : row + lengths[request]])
        return logits, needed, clock

    def _eagerly(
        self,
        model: PreTrainedModel,
        batch: Batch,
        given: Tensor,
        attend: Attend,
        note: Callable[[str], None],
        adapters: Sequence[str | None],
        watched: bool,
    ) -> tuple[Tensor, Clock]:
        """A pass, launch by launch.

        Args:
            model: The model.
            batch: The pass.
            given: Ids `[tokens]`, or embeddings `[1, tokens, hidden]`.
            attend: Who reads the pages.
            note: Called with the names of the attention paths that ran.
            adapters: Of each token.
            watched: Somebody looks at how tokens attend.

        Returns:
            The logits `[kept, vocabulary]`, and the clock of the model's pass.
        """
        device, store, spans, slots = self.device, self.store, batch.spans, batch.slots
        tokens, kept = len(batch.positions), batch.kept
        keep = None if len(kept) == tokens else long(kept or [0], device)
        columns = None if batch.columns is None else upload(batch.columns, device)
        if self._streams:
            store = staged = Staged(store, [span.tables for span in spans], slots, self._streams)
            spans = [span._replace(tables=own) for span, own in zip(spans, staged.tables_of_pass, strict=True)]
            slots = staged.slots_of_pass
        tiled = sys.maxsize if self._invariant else TILED
        step = StepInputs(store, spans, [upload(each, device) for each in slots], attend, note, tiled, watched)
        adapted = self._lora.entered(adapters, kept or [0], device) if any(adapters) else nullcontext()
        tapped = nullcontext() if self.taps is None else self.taps.entered()
        with self._entered(model, tokens, batch.best), adapted, tapped:
            positions, clock = long(batch.positions, device), Clock(device)
            logits = self._compute(model, given, positions, keep, columns, step)
            clock.stop()
            if step.ahead is not None:
                step.ahead.close()
        return logits, clock

    def _entered(self, model: PreTrainedModel, tokens: int, best: bool = False) -> AbstractContextManager[None]:
        """Our kernels in the place of modules, for a pass of `tokens` tokens; `best` as of `Batch`."""
        return nullcontext() if self.fusion is None else self.fusion.entered(model, tokens, best)

    def _fused(self, model: PreTrainedModel, best: bool, given: Tensor, *inputs: Any) -> Tensor:
        """The pass that a graph records: as `_compute`, with the layers that are launched."""
        launched = self.fusion is not None and self.fusion.launched
        with self._entered(model, len(given), best) if launched else nullcontext():
            return self._compute(model, given, *inputs)

    def _compute(
        self,
        model: PreTrainedModel,
        given: Tensor,
        positions: Tensor,
        keep: Tensor | None,
        columns: Tensor | None,
        step: StepInputs,
    ) -> Tensor:
        """The model's pass; reads nothing but the tensors it is given.

        Args:
            model: The model.
            given: Ids `[tokens]`, or embeddings `[1, tokens, hidden]`.
            positions: `[tokens]`.
            keep: Places of the tokens whose logits are wanted, `[kept]`; `None` for all.
            columns: As in `SpanCache`.
            step: What attention reads.

        Returns:
            `[kept, vocabulary]`.
        """
        inputs: dict[str, Any] = {"position_ids": positions[:, None] if self.states else positions[None]}
        rows = (-1, 1) if self.states else (1, *given.shape[-2:])
        inputs["inputs_embeds" if given.is_floating_point() else "input_ids"] = given.view(rows)
        if keep is not None and self._keeps_logits and not self.states:
            inputs["logits_to_keep"] = keep
        self.cache.columns = 0 if columns is None else columns
        with serving(self._configs, step):
            output = model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        if self._head is not None:
            self._head.see(output.logits)
        logits: Tensor = output.logits[:, 0] if self.states else output.logits[0]
        return logits if keep is None or (self._keeps_logits and not self.states) else logits[keep.to(logits.device)]
