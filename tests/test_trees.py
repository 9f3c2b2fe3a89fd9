"""Trees of guesses in a span: every node computes what it would compute in a text of its own."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from architectures import build

from hf_llmopt.attention import Span, StepInputs, backend, configs_of, gpu, paths, serving
from hf_llmopt.attention.inputs import Call
from hf_llmopt.attention.tree import MOST_NODES
from hf_llmopt.config import KVCacheConfig
from hf_llmopt.engine.fixed import Batch, key_of
from hf_llmopt.engine.probe import probe
from hf_llmopt.fusion import Fusion
from hf_llmopt.kernels import cpu
from hf_llmopt.kernels.arguments import PAGE_FORMATS
from hf_llmopt.kv_cache import BlockTable, LayerSpec, PagedStore, SpanCache

CPU = torch.device("cpu")
FORMATS = ["auto", *PAGE_FORMATS]
WINDOWS = [("full", 0), ("sliding", 20), ("sliding", 3), ("chunked", 16), ("chunked", 3)]


def tree(nodes: int, seed: int = 0) -> list[int]:
    """Parents: a random node before, or the token before all."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(nodes)]


def path(parents: Sequence[int], node: int) -> list[int]:
    """A node's ancestors and itself."""
    return [*(path(parents, parents[node]) if parents[node] >= 0 else []), node]


class Pass(NamedTuple):
    """Spans of a pass over one layer, and their queries, keys and values in `call`."""

    store: PagedStore
    spans: list[Span]
    call: Call

    def run(self, attend: Any) -> tuple[torch.Tensor, list[str]]:
        ran: list[str] = []
        slots = [self.store.slots(s.tables[0], s.context - s.length, s.context) for s in self.spans]
        step = StepInputs(self.store, self.spans, [torch.cat(slots)], attend, ran.append)
        module: Any = SimpleNamespace(layer_idx=0)
        _, query, key, value, scaling, softcap, sinks = self.call
        options = {"softcap": softcap, "s_aux": sinks}
        return step.read(module, query, key, value, scaling, options)[0], ran

    def expected(self) -> torch.Tensor:
        """By the definition, token by token: `[tokens, heads, value_dim]`."""
        outputs, group = [], self.store.groups[0]
        for span in self.spans:
            parents = list(span.parents or ())
            base = span.context - len(parents)
            for place in range(span.context - span.length, span.context):
                own = [base + node for node in path(parents, place - base)] if place >= base else []
                text = [*range(min(place + 1, base)), *own]
                seen = text[group.first_visible(len(text) - 1) :]
                slots = self.store.slots(span.tables[0], 0, span.context)[seen]
                keys, values = self.store.read(0, lambda all_slots, slots=slots: all_slots[slots])
                token = span.offset + place - (span.context - span.length)
                outputs.append(self.attended(self.call.query[0, :, token], keys, values))
        return torch.stack(outputs)

    def attended(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        share = query.shape[0] // keys.shape[1]
        keys, values = (part.double().repeat_interleave(share, 1) for part in (keys, values))
        scores = torch.einsum("hd,nhd->hn", query.double(), keys) * self.call.scaling
        if self.call.softcap:
            scores = self.call.softcap * torch.tanh(scores / self.call.softcap)
        if self.call.sinks is not None:
            scores = torch.cat([scores, self.call.sinks.double()[:, None]], dim=1)
        return torch.einsum("hn,nhd->hd", scores.softmax(1)[:, : len(keys)], values)


def passed(
    spans: Sequence[tuple[int, int, Sequence[int] | None]],
    window: tuple[str, int] = ("full", 0),
    form: str = "auto",
    extras: bool = False,
) -> Pass:
    """Spans (context, length, parents), pages in no order, and NaN in every slot that nobody sees."""
    torch.manual_seed(0)
    widths = (16, 16) if not extras else (16, 24)
    layer = LayerSpec(*window, 2, *widths, torch.float32, CPU)
    store = PagedStore([layer], KVCacheConfig(page_size=4, dtype=form))
    store.provide([200])
    placed, offset = [], 0
    tables: list[BlockTable] = []
    for _ in spans:
        tables += store.tables([0])
    for start in range(0, max(context for context, *_ in spans), 4):  # in turns, so that pages are no runs
        for (context, *_), table in zip(spans, tables, strict=True):
            if start < context:
                table.reserve(start, min(start + 4, context))
    if form == "auto":
        store.keys[0].fill_(torch.nan), store.values[0].fill_(torch.nan)
    for (context, length, parents), table in zip(spans, tables, strict=True):
        placed.append(Span([table], offset, length, context, parents))
        offset += length
        first = store.groups[0].first_visible(context - length)
        before = [torch.randn(context - length - first, 2, width) for width in widths]
        store.write(0, store.slots(table, first, context - length), *before)
    query = torch.randn(1, 6, offset, widths[0])
    key, value = (torch.randn(1, 2, offset, width) for width in widths)
    extra = (5.0, torch.randn(6)) if extras else (None, None)
    return Pass(store, placed, Call(0, query, key, value, 0.5, *extra))


# A decode, a draft, trees that C computes query by query and tile by tile, one of guesses alone, and pieces of prompts.
MIX = [(9, 1, None), (23, 3, [-1, 0]), (30, 4, [-1, -1, 0]), (27, 12, tree(11)), (17, 14, tree(14, 3))]
LONG = [*MIX, (40, 32, tree(MOST_NODES, 1)), (70, 60, None), (75, 75, tree(20, 2))]
WAYS = ["reference", "sdpa", *(f"cpu {level}" for level in cpu.levels()), "triton"]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_nodes_see_their_own_branch(
    way: str, window: tuple[str, int], extras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "TILE", 8)  # of torch's way: trees lie in several
    name, *level = way.split()
    if gpu.why_not(CPU) is not None and name == "triton":
        pytest.skip("needs triton's interpreter")
    given = passed(LONG, window, extras=extras)
    with cpu.using(*level or [cpu.used()]):
        found, ran = given.run(backend(name, CPU))
    torch.testing.assert_close(found.double(), given.expected(), rtol=0, atol=2e-5)
    assert ran


@pytest.mark.parametrize("form", PAGE_FORMATS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
def test_quantized_pages(way: str, form: str) -> None:
    name, *level = way.split()
    if name == "triton" and gpu.why_not(CPU) is not None:
        pytest.skip("needs triton's interpreter")
    given = passed(LONG, ("sliding", 20), form)
    with cpu.using(*level or [cpu.used()]):
        found, _ = given.run(backend(name, CPU))
    torch.testing.assert_close(found.double(), given.expected(), rtol=0, atol=5e-5)


def test_a_chain_is_no_tree() -> None:
    """Its tokens see all before them, as ever: bit for bit the same, and without bits."""
    chain = [(23, 8, list(range(-1, 6)))]
    plain, named = passed([(23, 8, None)]), passed(chain)
    for name in ("reference", "sdpa", *(["cpu"] if cpu.available() else [])):
        assert torch.equal(plain.run(backend(name, CPU))[0], named.run(backend(name, CPU))[0])
    step = StepInputs(named.store, named.spans, [], backend("sdpa", CPU), print)
    assert step.seen(0, 1.0).tree is None


def test_bits_are_made_once_a_step() -> None:
    given = passed(MIX)
    step = StepInputs(given.store, given.spans, [], backend("sdpa", CPU), print)
    first, second = step.seen(0, 1.0).tree, step.seen(0, 2.0).tree
    assert first is not None
    assert first is second
    assert first[:4].tolist() == [-1] * 4  # a decode, and a span whose guesses are a chain
    assert step.seen(0, 1.0, spans=range(2)).tree is None


@pytest.mark.parametrize("parents", [tree(MOST_NODES + 1), [-1, 2, 0], [-2], [-1, 1]], ids=str)
def test_trees_that_are_none(parents: list[int]) -> None:
    given = passed([(60, 40, parents)])
    with pytest.raises(ValueError, match="A tree has at most 31 nodes"):
        given.run(backend("reference", CPU))


def test_a_pass_with_a_tree_is_not_replayed() -> None:
    def batch(parents: list[int]) -> Batch:
        return Batch([Span((), 0, 4, 40, parents)], [5] * 4, range(36, 40), range(4), [], None)

    assert key_of(batch([-1, 0, 1]), 4) is not None
    assert key_of(batch([-1, 0, 0]), 4) is None


def test_nothing_that_knows_no_trees_takes_part_in_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = pytest.importorskip("hf_llmopt.kernels.triton.tuning")
    monkeypatch.setattr(tuning, "raced", lambda *_: pytest.fail("a race was run"))
    given = passed(MIX)
    found, ran = given.run(gpu.fastest_paged)
    torch.testing.assert_close(found.double(), given.expected(), rtol=0, atol=2e-5)
    assert set(ran) == {"triton-decode"}


# ------------------------------------------------------------------------------------------------------ in whole models


class Text:
    """A request of one model, computed pass by pass.

    Args:
        name: Of the architecture.
        way: A backend, or `"fused"` for the C kernels in joined layers.
    """

    def __init__(self, name: str, way: str) -> None:
        self.model, self.ran = build(name), set[str]()
        layout = probe(self.model)
        self.store = PagedStore(layout.layers, KVCacheConfig(page_size=4), layout.dense, layout.reads_columns)
        self.store.provide([40] * len(self.store.groups))
        self.tables = self.store.tables([0] * len(self.store.groups))
        self.attend = backend("cpu" if way == "fused" else way, CPU)
        self.fusion = Fusion(self.model, self.store.layers, True) if way == "fused" else None

    def logits(self, ids: Sequence[int], start: int, parents: Sequence[int] = ()) -> torch.Tensor:
        """Of each token, `[tokens, vocabulary]`; the last ones are the nodes of a tree."""
        stop = start + len(ids)
        for table in self.tables:
            table.reserve(start, stop)
        base = stop - len(parents)
        positions = [*range(start, base), *(base - 1 + len(path(parents, node)) for node in range(len(parents)))]
        slots = [self.store.slots(table, start, stop) for table in self.tables]
        span = Span(self.tables, 0, len(ids), stop, parents or None)
        step = StepInputs(self.store, [span], slots, self.attend, self.ran.add)
        cache = SpanCache(len(self.store.layers))
        cache.columns = torch.tensor(positions) - torch.arange(len(ids))
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        with torch.inference_mode(), serving(configs_of(self.model), step):
            if self.fusion is None:
                return self.model(**inputs, past_key_values=cache, use_cache=True).logits[0]
            with self.fusion.entered(self.model, len(ids)):
                found = self.model(**inputs, past_key_values=cache, use_cache=True).logits[0]
        if step.ahead is not None:
            step.ahead.close()
        return found

    def keep(self, base: int, nodes: Sequence[int]) -> None:
        """Let the text go on with some nodes of the tree that begins at `base`."""
        for group, table in enumerate(self.tables):
            slots = self.store.slots(table, 0, base + max(nodes) + 1).tolist()
            self.store.move(group, [(slots[base + node], slots[base + i]) for i, node in enumerate(nodes)])

    def stock(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("way", ["sdpa", "fused"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_oss", "llama4_text"])
def test_models(name: str, way: str) -> None:
    """Every node's logits are stock's for its own text, before and behind a branch that was kept."""
    if way == "fused" and not cpu.available():
        pytest.skip("needs the C kernels")
    text, parents = Text(name, way), [-1, 0, 0, 1, 2, 4, -1, 5, 3]
    ids = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    known, nodes = ids[:14], ids[14:23]
    text.logits(known[:-1], 0)
    found = text.logits([known[-1], *nodes], 13, parents)
    for node in range(-1, len(nodes)):
        own = [nodes[i] for i in path(parents, node)] if node >= 0 else []
        torch.testing.assert_close(found[node + 1], text.stock(known + own), rtol=1e-4, atol=1e-4)
    kept = path(parents, 7)
    text.keep(14, kept)
    known = known + [nodes[node] for node in kept]
    again = text.logits(ids[23:26], len(known), [-1, -1, 0])
    for node, own in enumerate(([23], [24], [23, 25])):
        torch.testing.assert_close(again[node], text.stock(known + [ids[i] for i in own]), rtol=1e-4, atol=1e-4)
    if way == "fused" and name in ("llama", "gemma3_text"):
        assert text.ran == {"cpu"}  # attention apart would be "flash" for the prompt


# ---------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("form", FORMATS)
def test_slots_move_together(form: str) -> None:
    """Whatever overlaps: all are read first. Layers of other groups stay."""
    layers = [
        LayerSpec(kind, 8 * (kind != "full"), 2, 16, 8, torch.float32, CPU) for kind in ("full", "sliding", "full")
    ]
    store = PagedStore(layers, KVCacheConfig(page_size=4, dtype=form))
    store.provide([4, 4])
    every = torch.arange(16)
    for layer in range(3):
        store.write(layer, every, torch.randn(16, 2, 16), torch.randn(16, 2, 8))
    before = [[slots.clone() for slots in both] for both in (store.keys, store.values)]
    moves = [(5, 4), (7, 5), (10, 6), (4, 7), (8, 8)]
    store.move(0, moves)
    source, target = map(list, zip(*moves, strict=True))
    for found, was in zip((store.keys, store.values), before, strict=True):
        for layer in (0, 2):
            was[layer][target] = was[layer][source]
        assert all(map(torch.equal, found, was))
    store.move(1, [])
    assert torch.equal(store.keys[1], before[0][1])
