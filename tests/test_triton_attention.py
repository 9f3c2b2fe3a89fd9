"""Attention over pages in Triton against float64: on a GPU where there is one, else in Triton's interpreter."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import build
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from hf_llmopt import attention
from hf_llmopt.attention import inputs
from hf_llmopt.bench import flash_attention
from hf_llmopt.cli import app
from hf_llmopt.errors import InvalidOption
from hf_llmopt.kernels import reference
from hf_llmopt.kernels.arguments import PAGE_FORMATS, Seen
from hf_llmopt.kernels.arguments import Shape as Layer

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

from hf_llmopt.kernels.triton import decode, extend, pages  # noqa: E402
from hf_llmopt.kernels.triton.decode import Plan  # noqa: E402
from hf_llmopt.kernels.triton.extend import Shape  # noqa: E402

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
# What a kernel's error may be, in units of that of torch's attention on the same inputs. Both are a few roundings, and
# the interpreter cuts bfloat16 where a GPU rounds.
SLACK = 1.3 if GPU else 2.0


@dataclass(frozen=True)
class Case:
    """What to compute.

    Attributes:
        spans: Context and length of each request's span.
        heads: Of queries, and of keys.
        widths: Of keys and values.
        window: Kind of visibility, and tokens.
        tree: Whether a span's tokens are a tree.
    """

    spans: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (16, 16)
    page: int = 4
    window: tuple[str, int] = ("full", 0)
    softcap: float | None = None
    sinks: bool = False
    scaling: float = 0.3
    tree: bool = False
    dtype: torch.dtype = torch.float32
    form: str | None = None  # of quantized pages
    seed: int = 0


def first_visible(position: int, kind: str, window: int) -> int:
    if kind == "sliding":
        return max(0, position + 1 - window)
    return position - position % window if kind == "chunked" else 0


def make(case: Case, runs: bool = False) -> tuple[torch.Tensor, Seen]:
    """Queries, and pages in random order with NaN wherever no token lies."""
    torch.manual_seed(case.seed)
    tokens = sum(length for _, length in case.spans)
    held = [-(-context // case.page) for context, _ in case.spans]
    order = (torch.arange if runs else torch.randperm)(sum(held) + 2).int() + 1
    table = torch.zeros(len(held), max(held) + 1, dtype=torch.int32)
    slots = (len(order) + 1) * case.page
    pages = [torch.full((slots, case.heads[1], width), float("nan")) for width in case.widths]
    items, begin = [], 0
    for row, (context, length) in enumerate(case.spans):
        table[row, : held[row]] = order[begin : begin + held[row]]
        begin += held[row]
        index = torch.arange(context)
        where = table[row].long()[index // case.page] * case.page + index % case.page
        for part in pages:
            part[where] = torch.randn(context, *part.shape[1:])
        table[row, : first_visible(context - length, *case.window) // case.page] = 0  # given back: nobody's, or others'
        ends = range(context - length + 1, context + 1)
        items += [(row, first_visible(end - 1, *case.window), context if case.tree else end) for end in ends]
    tree = torch.randint(0, 2**31 - 1, (tokens,), dtype=torch.int32) | 1 if case.tree else None
    sinks = torch.randn(case.heads[0]).to(case.dtype).to(DEVICE) if case.sinks else None
    form = None if case.form is None else PAGE_FORMATS[case.form]
    coded = None if form is None else Layer(case.heads[1], *case.widths)
    if form is None:
        pages = [part.to(case.dtype) for part in pages]
    else:
        pages = [reference.pack_rows(pages[0], form, form.rotates), reference.pack_rows(pages[1], form)]
    query = torch.randn(case.heads[0], tokens, case.widths[0]).to(case.dtype).to(DEVICE).transpose(0, 1)
    keys, values, table = (part.to(DEVICE) for part in (*pages, table))
    return query, Seen(
        keys, values, table, torch.tensor(items, dtype=torch.int32, device=DEVICE), case.page,
        max(context for context, _ in case.spans), case.scaling, case.softcap, sinks,
        form=form, coded=coded, tree=None if tree is None else tree.to(DEVICE),
    )  # fmt: skip


def dense(query: torch.Tensor, seen: Seen) -> list[tuple[torch.Tensor, ...]]:
    """Per query token its own keys and values, `[kv_heads, keys, width]` in float64, and which it sees."""
    found = []
    branches = [-1] * len(query) if seen.tree is None else seen.tree.tolist()
    for (row, first, end), branch in zip(seen.items.tolist(), branches, strict=True):
        index = torch.arange(first, end, device=DEVICE)
        back = end - 1 - index
        sees = (back >= 32) | (branch >> back.clamp(max=31) & 1).bool()
        index = seen.table[row, index // seen.page_size] * seen.page_size + index % seen.page_size
        parts = [seen.keys[index], seen.values[index]]
        if seen.form is not None:
            kv_heads, *widths = seen.shape
            parts = [
                reference.unpack_rows(part, seen.form, kv_heads, width, torch.float64, rotates)
                for part, width, rotates in zip(parts, widths, (seen.form.rotates, False), strict=True)
            ]
        parts = [part.double().transpose(0, 1) for part in parts]
        found.append((*parts, sees))
    return found


def exact(query: torch.Tensor, seen: Seen) -> torch.Tensor:
    """The definition, in float64."""
    outputs = []
    for token, (keys, values, sees) in zip(query.double(), dense(query, seen), strict=True):
        group = token.shape[0] // keys.shape[0]
        scores = torch.einsum("hd,hnd->hn", token, keys.repeat_interleave(group, 0)) * seen.scaling
        if seen.softcap:
            scores = seen.softcap * torch.tanh(scores / seen.softcap)
        scores = scores.masked_fill(~sees, float("-inf"))
        if seen.sinks is not None:
            scores = torch.cat([scores, seen.sinks.double()[:, None]], dim=1)
        weights = scores.softmax(-1)[:, : keys.shape[1]]
        outputs.append(torch.einsum("hn,hnd->hd", weights, values.repeat_interleave(group, 0)))
    return torch.stack(outputs)


def theirs(query: torch.Tensor, seen: Seen) -> torch.Tensor:
    """torch's attention; the twin where that has no such thing."""
    if seen.softcap or seen.sinks is not None:
        return reference.paged_attention(query, seen)
    outputs = []
    for token, (keys, values, sees) in zip(query, dense(query, seen), strict=True):
        arguments = (token[None, :, None], keys.to(query.dtype)[None], values.to(query.dtype)[None])
        mask = sees[None, None, None].expand(1, len(token), 1, -1)
        outputs.append(scaled_dot_product_attention(*arguments, mask, scale=seen.scaling, enable_gqa=True)[0, :, 0])
    return torch.stack(outputs)


def tiles_of(case: Case, size: int, empty: int = 0) -> torch.Tensor:
    """Spans cut into tiles of at most `size` tokens, the longest contexts first, and `empty` tiles behind them."""
    found, offset = [], 0
    for context, length in case.spans:
        found += [(offset + i, min(size, length - i), context) for i in range(0, length, size)]
        offset += length
    return torch.tensor(found[::-1] + [(0, 0, 0)] * empty, dtype=torch.int32, device=DEVICE)


def check(ours: torch.Tensor, query: torch.Tensor, seen: Seen) -> None:
    expected = exact(query, seen)
    assert ours.dtype == query.dtype
    assert ours.shape == expected.shape
    assert ours.isfinite().all()
    # What rounding the output costs, and float32 scores: torch may be luckier than that in a small case.
    floor = torch.finfo(query.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    bound = SLACK * float((theirs(query, seen).double() - expected).norm()) + floor * float(expected.norm())
    assert float((ours.double() - expected).norm()) <= bound


def extended(case: Case, shape: Shape, windowed: bool | None = None) -> tuple[torch.Tensor, torch.Tensor, Seen]:
    query, seen = make(case)
    tiles = tiles_of(case, shape.rows // (case.heads[0] // case.heads[1]), empty=1)
    if windowed is None:
        windowed = case.window[0] != "full"
    return extend.extend(query, seen, tiles, shape, windowed), query, seen


def decoded(case: Case, shape: Shape, split: int, ahead: bool = False) -> tuple[torch.Tensor, torch.Tensor, Seen]:
    query, seen = make(case)
    tokens = max(length for _, length in case.spans)
    return decode.decode(query, seen, tiles_of(case, tokens, empty=1), tokens, Plan(shape, split, ahead)), query, seen


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Shape(16, 16, 4, 2)
MIXES = {
    "prompt": [(37, 37)],
    "prefix": [(50, 20)],
    "mix": [(5, 1), (40, 3), (33, 33), (70, 18)],
    "page": [(16, 16), (32, 16)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_extend(mix: str, dtype: torch.dtype) -> None:
    check(*extended(Case(MIXES[mix], dtype=dtype), SMALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [1, 3, 8])
def test_decode(split: int, dtype: torch.dtype) -> None:
    check(*decoded(Case([(1, 1), (70, 1), (33, 1), (200, 1)], dtype=dtype), SMALL, split))


@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape(16, 64, 4, 1), Shape(16, 16, 4, 3)], ids=["one block", "a loop behind"])
def test_decode_that_reads_ahead(shape: Shape, dtype: torch.dtype, split: int) -> None:
    for case in (
        Case([(1, 1), (70, 1), (33, 2), (200, 1)], widths=(24, 16), dtype=dtype),
        Case([(90, 3), (130, 2)], window=("sliding", 30), sinks=True, tree=True, dtype=dtype),
    ):
        check(*decoded(case, shape, split, ahead=True))


def test_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, the whole part, while these fill the device once, or twice behind a product of one row; a row's first
    block behind that."""
    monkeypatch.setattr(decode, "early", lambda device: {"EARLY": True})
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 16)
    query, seen = make(Case([(70, 1)], dtype=torch.float16))

    def planned(tokens: int, longest: int) -> Plan:
        return decode.plan(query.expand(tokens, -1, -1), seen._replace(longest=longest), tokens, 1)

    one, wide = Shape(16, 128, 4, 1), Shape(16, 256, 8, 1)
    assert [planned(1, longest) for longest in (64, 2048)] == [Plan(one, 1, True), Plan(one, 16, True)]
    assert planned(1, 4096) == Plan(Shape(16, 64, 4, 3), 24, True)
    assert [planned(2, longest) for longest in (512, 1024)] == [Plan(one, 4, True), Plan(wide, 4, True)]
    assert planned(2, 2048) == Plan(Shape(16, 64, 4, 2), 16)
    monkeypatch.setattr(decode, "early", lambda device: {"EARLY": False})
    assert planned(1, 256) == Plan(Shape(16, 64, 4, 2), 4)


FEATURES = {
    "gqa": {"heads": (6, 2)},
    "mqa": {"heads": (5, 1)},
    "mha": {"heads": (3, 3)},
    "odd width": {"widths": (24, 24)},
    "unequal widths": {"widths": (40, 16)},
    "sliding": {"window": ("sliding", 9)},
    "chunked": {"window": ("chunked", 12)},
    "softcap": {"softcap": 2.0, "scaling": 1.0},
    "sinks": {"sinks": True},
    "all": {"window": ("sliding", 21), "softcap": 3.0, "sinks": True, "heads": (4, 1), "widths": (24, 40)},
    "int8": {"form": "int8"},
    "fp8": {"form": "fp8"},
    "int4": {"form": "int4"},
    "int4, odd widths": {"form": "int4", "widths": (24, 40)},
    "int4, all": {"form": "int4", "window": ("sliding", 21), "softcap": 3.0, "sinks": True, "heads": (4, 1)},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_extend(feature: str) -> None:
    check(*extended(Case([(29, 29), (45, 12)], **FEATURES[feature]), SMALL))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("split", [1, 4])
def test_features_of_decode(feature: str, split: int) -> None:
    check(*decoded(Case([(5, 1), (61, 1), (90, 3)], **FEATURES[feature]), SMALL, split))


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("form", PAGE_FORMATS)
def test_packing(form: str, rotates: bool) -> None:
    """The twin's codes and scales, but for the interpreter's rounding to float8; of zeros and constants too."""
    torch.manual_seed(1)
    for heads, width, dtype in ((2, 64, torch.bfloat16), (3, 24, torch.float32), (1, 80, torch.float16)):
        x = torch.randn(heads, 5, width).to(dtype).to(DEVICE).transpose(0, 1)
        x[1, 0], x[2, 0] = 0, 1.5
        assert pages.serves(x, PAGE_FORMATS[form])
        ours = pages.pack_rows(x, PAGE_FORMATS[form], rotates)
        differ = (ours != reference.pack_rows(x, PAGE_FORMATS[form], rotates)).float().mean()
        assert differ <= (0.05 if form == "fp8" else 1e-3 if GPU else 0)  # a GPU joins products and sums
        again = reference.unpack_rows(ours, PAGE_FORMATS[form], heads, width, torch.float32, rotates)
        assert float((again - x.float()).norm() / x.float().norm()) < {"int8": 0.01, "fp8": 0.06, "int4": 0.15}[form]


def test_rows_that_no_kernel_packs() -> None:
    assert not pages.serves(torch.ones(1, 1, 6), PAGE_FORMATS["int4"])  # a scale would lie at byte 3
    assert not pages.serves(torch.ones(1, 1, 8, dtype=torch.float64), PAGE_FORMATS["int8"])


@pytest.mark.parametrize("split", [1, 4])
def test_tree(split: int) -> None:
    case = Case([(3, 2), (80, 7), (40, 16)], tree=True, heads=(2, 2))
    check(*decoded(case, SMALL, split))
    check(*extended(case, SMALL))


def test_windowed_is_only_a_hint() -> None:
    """What is true of every span may be compiled in, and changes nothing."""
    for case in (Case(MIXES["mix"]), Case(MIXES["mix"], tree=True)):
        assert torch.equal(extended(case, SMALL, True)[0], extended(case, SMALL, False)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_graph() -> None:
    """One recorded launch serves longer contexts, other pages, and fewer requests than it was recorded for."""
    case = Case([(30, 1), (500, 1), (77, 1)], dtype=torch.float16)
    query, seen = make(case)
    tiles = tiles_of(case, 1)
    items, table = seen.items.clone(), seen.table.clone()
    seen.items[:, 2] = 1
    decode.decode(query, seen, tiles, 1, Plan(SMALL, 4))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = decode.decode(query, seen, tiles, 1, Plan(SMALL, 4))
    seen.items.copy_(items)
    graph.replay()
    check(ours, query, seen)
    before = ours.clone()
    order = torch.tensor([1, 0, 2], device=DEVICE)
    seen.table.copy_(table[order])
    seen.items[:, 0] = order
    tiles[0] = 0  # of the third request
    ours.fill_(float("nan"))
    graph.replay()
    assert torch.equal(ours[:2], before[:2])
    assert ours[2].isnan().all()


@pytest.mark.parametrize("form", [None, "int4"])
def test_a_query_that_sees_nothing(form: str | None) -> None:
    query, seen = make(Case([(20, 3)], form=form))
    seen.items[1, 1:] = 0
    tiles = torch.tensor([[i, 1, 20] for i in range(3)], dtype=torch.int32, device=DEVICE)
    for ours in (extend.extend(query, seen, tiles, SMALL), decode.decode(query, seen, tiles, 1, Plan(SMALL, 3))):
        assert not ours[1].any()
        assert ours[0].isfinite().all()


HOPPER = {
    "prompt": [(150, 150)],
    "prefix": [(500, 20)],
    "mix": [(640, 3), (17, 17), (700, 40), (129, 70)],
}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "feature", ["gqa", "mqa", "sliding", "sliding 200", "chunked", "softcap", "sinks", "64", "page"]
)
def test_hopper(feature: str, dtype: torch.dtype) -> None:
    from hf_llmopt.kernels.triton import hopper

    features = {
        **FEATURES,
        "sliding 200": {"window": ("sliding", 200)},
        "64": {"widths": (64, 64)},
        "page": {"page": 16},
    }
    for mix in HOPPER:
        given = {"widths": (128, 128), "page": 128, "scaling": 0.1, "dtype": dtype, **features[feature]}
        case = Case(HOPPER[mix], **given)
        query, seen = make(case, runs=True)
        tiles = tiles_of(case, hopper.ROWS // (case.heads[0] // case.heads[1]))
        check(hopper.extend(query, seen, tiles, case.window[0] != "full"), query, seen)


def spans(most: int, longest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    span = st.tuples(st.integers(1, longest), st.integers(0, 150 if GPU else 40)).map(
        lambda pair: (pair[0] + pair[1], pair[0])
    )
    return st.lists(span, min_size=1, max_size=most)


# A kernel is compiled for every kind of case: a GPU's test does not look for the smallest that fails.
PHASES = [phase for phase in Phase if not GPU or phase in (Phase.explicit, Phase.generate)]
CASES: dict[str, Any] = {
    "heads": st.sampled_from([(1, 1), (4, 2), (4, 1), (6, 2), (7, 1)]),
    "widths": st.sampled_from([(16, 16), (32, 32), (24, 24), (48, 32), (16, 40)]),
    "page": st.sampled_from([1, 4, 16, 6]),
    "window": st.one_of(st.just(("full", 0)), st.tuples(st.sampled_from(["sliding", "chunked"]), st.integers(1, 60))),
    "softcap": st.sampled_from([None, None, 1.5, 30.0]),
    "sinks": st.booleans(),
    "scaling": st.sampled_from([0.05, 0.3, 1.0]),
    "dtype": st.sampled_from(DTYPES),
    "form": st.sampled_from([None, None, "int8", "fp8", "int4"]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=20 if GPU else 12, deadline=None, phases=PHASES)
@given(
    case=st.builds(Case, spans(4, 200) if GPU else spans(3, 24), tree=st.just(False), **CASES),
    keys=st.sampled_from([16, 32]),
)
@example(Case([(33, 1)], window=("sliding", 1)), 16)
def test_any_extend(case: Case, keys: int) -> None:
    check(*extended(case, Shape(16, keys, 4, 2)))


@settings(max_examples=20 if GPU else 12, deadline=None, phases=PHASES)
@given(
    case=st.builds(Case, spans(4, 8) if GPU else spans(3, 6), tree=st.booleans(), **CASES),
    keys=st.sampled_from([16, 32]),
    split=st.integers(1, 9),
)
def test_any_decode(case: Case, keys: int, split: int) -> None:
    check(*decoded(case, Shape(64, keys, 4, 2), split))


NAMES = ["llama", "qwen3", "gpt2", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3"]


def same_tokens(name: str, rows: int, length: int, new: int, config: dict) -> tuple[str, ...]:
    model = build(name).to(DEVICE)
    ids = torch.randint(3, 90, (rows, length), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[rows - 1, : length // 3] = 0
    arguments = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    stock = model.generate(ids, **arguments)
    ours = model.generate(ids, **arguments, llmopt={"strict": True, **config})
    assert model.llmopt.stats.served_by == "llmopt"
    assert torch.equal(ours, stock)
    assert model.llmopt.engine.store.pages_used == 0
    return model.llmopt.stats.attention


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in NAMES])
def test_tokens(name: str, backend: str) -> None:
    """Long prompts in parts, short ones, and windows that have been passed."""
    config = {"attention": backend, "batching": {"max_batch_tokens": 50}, "kv_cache": {"page_size": 4}}
    paths = same_tokens(name, 3, 67, 24, config)
    if backend == "triton":
        assert paths == ("triton-decode", "triton-extend")


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_quantized_pages(form: str) -> None:
    """The kernels and the twin read the same pages: the logits, and so the tokens, differ by rounding alone."""
    model = build("llama", num_hidden_layers=1).to(DEVICE)
    ids = torch.randint(3, 90, (1, 21), device=DEVICE)
    config = {"attention": "triton", "kv_cache": {"dtype": form, "page_size": 4}, "strict": True}
    ours = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, llmopt=config)
    expected = model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None,
        llmopt={**config, "attention": "reference"},
    )  # fmt: skip
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.skipif(GPU, reason="a GPU runs `test_tokens`")
def test_tokens_in_the_interpreter(name: str) -> None:
    paths = same_tokens(name, 2, 21, 3, {"attention": "triton"})
    assert paths == ("triton-decode", "triton-extend")


@pytest.mark.skipif(GPU, reason="it can run here")
def test_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.kernels.triton.int_linear.INTERPRETED", False)
    with pytest.raises(InvalidOption, match=r"backend='triton'.*keys lie on cpu.*Use 'auto'"):
        attention.backend("triton", torch.device("cpu"))


@pytest.mark.parametrize("pages", [[0, 1, 2, 3, 4], [8, 9, 2, 3, 5], [4, 5, 7, 6], [1]], ids=str)
def test_runs_are_found(pages: list[int]) -> None:
    table = SimpleNamespace(pages=array("i", pages), run=1)
    expected = all(pages[i] + 1 == pages[i + 1] for i in range(0, len(pages) - 1, 2))
    assert inputs.aligned(table, 2, 1) == expected


def test_bench() -> None:
    """A saved report is shown, an error larger than torch's is a failure, and without a GPU nothing is measured."""
    path = Path(__file__).parents[1] / "docs" / "results" / "flash_attention-gpu.json"
    report = json.loads(path.read_text("utf-8"))
    prompts, decoding, forwards = flash_attention.tables(report)
    assert len(prompts.rows) == len(flash_attention.PREFILLS)
    assert len(decoding.rows) == len(flash_attention.DECODES)
    assert len(forwards.rows) == len(flash_attention.plain.CASES)
    assert not flash_attention.failures(report)
    report["prefill"][0]["error"]["hopper"] *= 2
    assert flash_attention.failures(report)[0].startswith("hopper, 16 x 1024: error")
    shown = CliRunner().invoke(app, ["bench", "flash_attention", "--report", str(path), "--markdown"])
    assert shown.exit_code == 0
    assert "of the read bandwidth" in shown.stdout
    if not GPU:
        assert CliRunner().invoke(app, ["bench", "flash_attention", "--device", "cuda"]).exit_code != 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_bench_measures() -> None:
    report = flash_attention.bench([(1, 512, 512), (1, 1024, 256)], [(2, 2048)])
    assert report["passed"], flash_attention.failures(report)
    assert all(min(times) > 0 for found in report["prefill"] for times in found["microseconds"].values())
    assert report["decode"][0]["reading"] > 0
