"""Every C kernel against its plain-torch twin: random shapes, formats, page orders, and each instruction set level."""

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.kernels import cpu, reference
from hf_llmopt.kernels.arguments import (
    PAGE_FORMATS,
    TILED,
    Grid,
    Layer,
    Norm,
    PageFormat,
    Product,
    Seen,
    Shape,
    Stage,
    Turns,
)

COMPILER = shutil.which("cc") or shutil.which("gcc")
# With a compiler these tests must run: an optional extension that fails to build would go unnoticed.
pytestmark = [
    pytest.mark.skipif(not cpu.available() and not COMPILER, reason=str(cpu.why_not())),
    pytest.mark.usefixtures("two_threads"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = cpu.levels() or ("none",)
# Units in the last place that a different order of additions may cost, relative to the largest value.
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    scale: torch.Tensor | None = None,
    factor: float = 1,
) -> None:
    """Ours may err as much as the twin does in the same format, and by the format's rounding of `scale`."""
    scale = (exact if scale is None else scale).abs().max().clamp_min(1e-6)
    error = (ours.double() - exact).abs().max() / scale
    twin = (theirs.double() - exact).abs().max() / scale
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert error <= 1.5 * twin + factor * BOUND[ours.dtype], (float(error), float(twin))


def bits(tokens: int) -> torch.Tensor:
    """Which of the last 32 tokens each token sees, as in `Seen.tree`: itself, and others or all of them."""
    return torch.where(torch.rand(tokens) < 0.7, torch.randint(-(2**31), 2**31, (tokens,)) | 1, -1).int()


def test_built_wherever_there_is_a_compiler() -> None:
    assert cpu.available(), f"{COMPILER} is on the PATH, but {cpu.why_not()}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", [(1, 2, 4), (1, 5, 40, 75)], ids=["short", "long"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_attention(spans: tuple[int, ...], dtype: torch.dtype, level: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 7, 8, 12]))
    key_dim, value_dim = (data.draw(st.sampled_from([8, 24, 64, 80, 128])) for _ in range(2))
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    softcap = data.draw(st.sampled_from([None, 20.0]))
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    longest = 1500 if max(spans) < 9 else 250
    contexts = sorted(data.draw(st.lists(st.sampled_from([1, 3, 16, 17, 200, longest]), min_size=1, max_size=3)))
    pages = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(pages)).int() + 1
    table = torch.zeros(len(contexts), max(pages), dtype=torch.int32)
    items = []
    lengths = sorted(min(context, data.draw(st.sampled_from(spans))) for context in contexts)
    for row, (context, count) in enumerate(zip(contexts, pages, strict=True)):
        table[row, :count] = order[:count]
        order = order[count:]
        window = data.draw(st.sampled_from([context, 5, 100]))
        for end in range(context - lengths[row] + 1, context + 1):
            items.append((row, max(0, end - window), end))
    items = torch.tensor(items, dtype=torch.int32)
    slots = (sum(pages) + 1) * page_size
    # As transformers hands it over: [1, heads, tokens, width], tokens and heads exchanged in memory.
    query = torch.randn(kv_heads * group, len(items), key_dim).to(dtype).transpose(0, 1)
    keys, values = (torch.full((slots, kv_heads, dim), torch.nan, dtype=dtype) for dim in (key_dim, value_dim))
    for row in range(len(contexts)):  # what nobody sees is another request's, whatever that is
        own = items[items[:, 0] == row]
        tokens = torch.arange(int(own[0, 1]), int(own[-1, 2]))
        where = table[row][tokens // page_size].long() * page_size + tokens % page_size
        for to in (keys, values):
            to[where] = torch.randn(len(tokens), *to.shape[1:]).to(dtype)
    longest = max(end - first for _, first, end in items.tolist())
    form, coded = PAGE_FORMATS.get(data.draw(st.sampled_from(["dense", *PAGE_FORMATS]))), None
    if form is not None:
        keys, values = reference.pack_rows(keys, form, form.rotates), reference.pack_rows(values, form)
        coded = Shape(kv_heads, key_dim, value_dim)
    spans = data.draw(st.sampled_from([TILED, 1000]))  # long ones tile by tile, or query by query too
    tree = bits(len(items)) if data.draw(st.booleans()) else None
    seen = Seen(keys, values, table, items, page_size, longest, key_dim**-0.5, softcap, sinks, spans, form, coded, tree)
    with cpu.using(level):
        ours = cpu.attention(query, seen)
    wide = seen._replace(sinks=None if sinks is None else sinks.double())
    if form is None:
        wide = wide._replace(keys=keys.double(), values=values.double())
    close(ours, reference.paged_attention(query, seen), reference.paged_attention(query.double(), wide).double())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_linear(dtype: torch.dtype, level: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, outputs, inputs = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 200))
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if data.draw(st.booleans()) else None
    residual = torch.randn(rows, outputs).to(dtype) if data.draw(st.booleans()) else None
    with cpu.using(level):
        ours = cpu.linear(x, weight, bias, residual)
        alone = [
            cpu.linear(x[row : row + 1], weight, bias, None if residual is None else residual[row : row + 1])
            for row in range(rows)
        ]
    exact = reference.linear(*(None if t is None else t.double() for t in (x, weight, bias, residual)))
    # Sums that cancel are as inexact as their terms are large.
    close(ours, reference.linear(x, weight, bias, residual), exact, x.double().abs() @ weight.double().abs().T + 4)
    assert torch.equal(ours, torch.cat(alone)), "a row must not depend on its neighbours"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (3, 50, 37), (16, 300, 129), (2, 16, 4)])
def test_conv1d(dtype: torch.dtype, level: str, rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, inputs), (inputs, outputs), (outputs,)))
    with cpu.using(level):
        ours = cpu.conv1d(x, weight, bias)
        alone = [cpu.conv1d(x[row : row + 1], weight, bias) for row in range(rows)]
        plain = cpu.conv1d(x, weight)
    scale = x.double().abs() @ weight.double().abs() + 4
    exact = reference.conv1d(x.double(), weight.double(), bias.double())
    close(ours, reference.conv1d(x, weight, bias), exact, scale)
    close(plain, reference.conv1d(x, weight), exact - bias.double(), scale)
    assert torch.equal(ours, torch.cat(alone)), "a row must not depend on its neighbours"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("centre", [False, True])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_norm(dtype: torch.dtype, level: str, variant: int, centre: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 200))
    x = (torch.randn(rows, width) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(width).to(dtype) if data.draw(st.booleans()) else None for _ in range(2))
    norm = Norm(weight, bias if centre else None, width, 1e-5, centre, variant)
    with cpu.using(level):
        ours = cpu.norm(x, norm)
    wide = x.double() - (x.double().mean(-1, keepdim=True) if centre else 0)
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    if weight is not None:
        exact = exact * (weight.double() + (variant == 1))
    if norm.bias is not None:
        exact = exact + norm.bias.double()
    close(ours, reference.norm(x, norm), exact)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("joined", [True, False])
def test_gated(dtype: torch.dtype, level: str, kind: str, joined: bool) -> None:
    both = (torch.randn(3, 2 * 77) * 4).to(dtype)
    both[0, :4] = torch.tensor([100.0, -100.0, 30.0, -30.0]).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    if not joined:
        gate, up = gate.contiguous(), up.contiguous()
    with cpu.using(level):
        ours, alone = cpu.gated(gate, up, kind), cpu.gated(gate, None, kind)
    close(ours, reference.gated(gate, up, kind), reference.gated(gate.double(), up.double(), kind))
    close(alone, reference.gated(gate, None, kind), reference.gated(gate.double(), None, kind))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_layers(dtype: torch.dtype, level: str, data: st.DataObject) -> None:
    """Every structure that a layer may have, two of them one after the other, over pages in any order."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    tokens, hidden, inner = draw(st.sampled_from([1, 3, 17])), draw(st.sampled_from([48, 70])), draw(st.integers(5, 90))
    kv_heads, key_dim, value_dim = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([24, 64])),
        draw(st.sampled_from([8, 64])),
    )
    joined, quantized = draw(st.booleans()), draw(st.booleans())
    heads = kv_heads * (1 if joined else draw(st.sampled_from([1, 3])))
    rotated = draw(st.sampled_from([0, 8, key_dim]))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def norm(width: int) -> Norm | None:
        if draw(st.booleans()):
            return None
        centre = draw(st.booleans())
        return Norm(random(width), random(width) if centre else None, width, 1e-5, centre, draw(st.integers(0, 2)))

    def product(outputs: int, inputs: int, factor: float = 1.0) -> Product:
        bias = random(outputs) if draw(st.booleans()) else None
        if quantized and draw(st.booleans()):
            codes, scales = torch.randint(16, (outputs, inputs), dtype=torch.uint8), torch.rand(outputs, 2) * 0.05
            index = (torch.arange(inputs) * 2 // inputs)[torch.randperm(inputs)].int()
            return Product(Grid(codes, scales, None, 4, index), bias, factor)
        return Product((torch.randn(outputs, inputs) * inputs**-0.5).to(dtype), bias, factor)

    def stage() -> Stage:
        over = draw(st.sampled_from(["heads", "all"])) if not joined else "heads"
        width = (key_dim, key_dim) if over == "heads" else (heads * key_dim, kv_heads * key_dim)
        query_norm, key_norm = norm(width[0]), norm(width[1])
        if over == "all" and (query_norm is None or key_norm is None):
            query_norm = key_norm = None
        parallel = draw(st.integers(0, 2))
        before_mlp = norm(hidden)
        if parallel == 2 or (parallel == 1 and before_mlp is None):
            parallel, before_mlp = 2, None
        first: tuple[Product, Product | None, Product | None] = (
            (product(heads * (2 * key_dim + value_dim), hidden), None, None)
            if joined
            else (product(heads * key_dim, hidden, 0.5), *(product(kv_heads * d, hidden) for d in (key_dim, value_dim)))
        )
        up = product(inner, hidden) if draw(st.booleans()) else None
        layer = Layer(
            (norm(hidden), query_norm, key_norm, norm(hidden), before_mlp, norm(hidden)),
            (*first, product(hidden, heads * value_dim, 0.5), product(inner, hidden), up, product(hidden, inner, 0.5)),
            draw(st.sampled_from(["silu", "gelu_tanh", "gelu", "relu", "relu2"])),
            parallel,
        )
        contexts = [draw(st.sampled_from([1, 5, 70, 300])) for _ in range(tokens)]
        pages = [-(-context // 4) for context in contexts]
        order = torch.randperm(sum(pages)).int() + 1
        table = torch.zeros(tokens, max(pages), dtype=torch.int32)
        for row, count in enumerate(pages):
            table[row, :count], order = order[:count], order[count:]
        items = torch.tensor([[row, 0, context] for row, context in enumerate(contexts)], dtype=torch.int32)
        slots = torch.tensor([table[row, (c - 1) // 4] * 4 + (c - 1) % 4 for row, c in enumerate(contexts)])
        room = (sum(pages) + 1) * 4
        keys, values = random(room, kv_heads, key_dim), random(room, kv_heads, value_dim)
        seen = Seen(keys, values, table, items, 4, max(contexts), key_dim**-0.5, draw(st.sampled_from([None, 20.0])))
        seen = seen._replace(tree=bits(tokens) if draw(st.booleans()) else None)
        angles = torch.randn(tokens, rotated)
        kept = draw(st.sampled_from([dtype, torch.float32]))
        turns = (angles.cos().to(kept), angles.sin().to(kept)) if rotated else (None, None)
        return Stage(layer, seen, Turns(*turns, slots.long(), draw(st.integers(0, 2))), heads)

    def copied(stage: Stage, to: torch.dtype) -> Stage:
        def cast(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return item.to(to, copy=True) if item.is_floating_point() else item
            if isinstance(item, tuple):
                if isinstance(item, Grid):
                    return item
                values = [cast(value) for value in item]
                return type(item)(*values) if hasattr(item, "_fields") else tuple(values)
            return item

        return cast(stage)  # type: ignore[no-any-return]

    def laid(stage: Stage) -> Stage:
        products = [
            p if p is None or not isinstance(p.weight, Grid) else p._replace(weight=cpu.BlockedWeight.pack(p.weight))
            for p in stage.layer.products
        ]
        return stage._replace(layer=stage.layer._replace(products=tuple(products)))

    stages, x = [stage(), stage()], random(tokens, hidden)
    twins, exact = ([copied(stage, to) for stage in stages] for to in (dtype, torch.float64))
    with cpu.using(level):
        ours = cpu.layers(x, [laid(stage) for stage in stages])
    theirs, truth = x, x.double()
    for twin, wide in zip(twins, exact, strict=True):
        theirs, truth = reference.layer(theirs, twin), reference.layer(truth, wide)
    close(ours, theirs, truth, factor=3)
    for stage, twin, wide in zip(stages, twins, exact, strict=True):
        close(stage.seen.keys, twin.seen.keys, wide.seen.keys, factor=3)
        close(stage.seen.values, twin.seen.values, wide.seen.values, factor=3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 1000, 5000])
def test_argmax(dtype: torch.dtype, level: str, width: int) -> None:
    x = torch.randn(6, width + 3).to(dtype)[:, :width]
    x[1, width // 2] = x[2, -1] = float("nan")
    x[3] = -float("inf")
    x[4] = 1.0  # ties: the first counts
    with cpu.using(level):
        assert cpu.argmax(x).tolist() == reference.argmax(x).tolist()
    assert reference.argmax(x)[:5].tolist()[1:] == [-1, -1, 0, 0]


@pytest.mark.parametrize("level", LEVELS)
def test_attention_does_not_depend_on_neighbours(level: str) -> None:
    query, keys = torch.randn(6, 14, 64), torch.randn(700 * 16, 2, 64)
    table = (torch.randperm(660).int() + 1).view(6, 110)
    items = torch.tensor([[row, 0, 5 + 340 * row] for row in range(6)], dtype=torch.int32)
    with cpu.using(level):
        seen = Seen(keys, keys, table, items, 16, 5 + 340 * 5, 0.125)
        together = cpu.attention(query, seen)
        for row in range(6):
            own = seen._replace(items=items[row : row + 1], longest=5 + 340 * row)
            alone = cpu.attention(query[row : row + 1], own)
            assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_flash_does_not_depend_on_neighbours(level: str, dtype: torch.dtype) -> None:
    query, keys = torch.randn(150, 6, 64, dtype=dtype), torch.randn(30 * 16, 2, 64, dtype=dtype)
    table = (torch.randperm(29).int() + 1)[None]
    items = torch.tensor([[0, max(0, end - 100), end] for end in range(201, 351)], dtype=torch.int32)
    with cpu.using(level):
        seen = Seen(keys, keys, table, items, 16, 100, 0.125, 30.0)
        together = cpu.attention(query, seen)
        apart = [
            cpu.attention(query[part], seen._replace(items=items[part]))
            for part in (slice(0, 5), slice(5, 37), slice(37, 150))
        ]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("form", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_rows(dtype: torch.dtype, level: str, form: PageFormat) -> None:
    for width in (2, 10, 64, 80, 512):
        x = torch.randn(3, 40, width).to(dtype).transpose(0, 1)  # as a model hands keys over
        x[3], x[4], x[5], x[6] = 0, 1e-3 * x[4], 100 * x[5], 7.0
        with cpu.using(level):
            packed, turned = cpu.pack_rows(x, form), cpu.pack_rows(x, form, True)
        assert torch.equal(packed, reference.pack_rows(x, form))
        # A turned number may lie so close to the middle of a step that its last bit decides.
        assert (turned != reference.pack_rows(x, form, True)).float().mean() < 1e-3
        assert packed.shape == (40, 1, form.row_bytes(3, width))
        error = (reference.unpack_rows(packed, form, 3, width, torch.float32) - x.float()).abs().amax(-1)
        wide, most = x.float(), x.float().abs().amax(-1)
        # Half a step: of float8 up to 1/16 of the number; scales, and with 4 bits the lowest number, have 8 bits.
        step = (wide.amax(-1) - wide.amin(-1) + most / 64) / 15 if form.bits == 4 else most / 127
        assert (error <= (8 if form.name == "fp8" else 0.54) * step).all()


@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_long_and_short_spans_agree_on_extremes(level: str, dtype: torch.dtype, scaling: float) -> None:
    """NaN and infinity reach the rows that see them, and numbers near the end of the format are ordinary ones."""
    table = torch.arange(3, dtype=torch.int32)[None]
    items = torch.tensor([[0, 0, end] for end in range(1, 41)], dtype=torch.int32)
    query, keys, values = (torch.randn(rows, 1, 16) for rows in (40, 48, 48))
    bad = query.clone()
    bad[7, 0, 3], bad[9, 0, 2] = torch.nan, torch.inf
    low, slope = torch.zeros(40, 1, 16), torch.zeros(48, 1, 16)
    low[:, 0, 0], slope[:, 0, 0] = -1e33, torch.arange(1.0, 49)
    with cpu.using(level):
        for q, k in ((bad, keys), (low, slope)):
            numbers = [part.to(dtype) for part in (k, values)]
            seen = [Seen(*numbers, table, items, 16, 40, scaling, tiled=tiled) for tiled in (5, 1000)]
            long, short = (cpu.attention(q.to(dtype), each) for each in seen)
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(long, short, rtol=bound, atol=bound, equal_nan=True)
            assert long.isnan().any() == (q is bad)
            assert not long[:7].isnan().any()


def test_malformed_calls_are_refused() -> None:
    from hf_llmopt.kernels.cpu import _C

    wide = torch.zeros(1, 1, cpu.MAX_DIM + 1)
    index = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="malformed"):
        cpu.attention(wide, Seen(wide, wide, index, torch.tensor([[0, 0, 1]], dtype=torch.int32), 1, 1, 1.0))
    with pytest.raises(ValueError, match="malformed"):
        _C.linear(0, 0, 1, 0)
    with pytest.raises(ValueError, match="malformed"):
        _C.layers(0, 0, 1, 0, 0, 0, 1, 8, 1 << 60)
    with pytest.raises(TypeError):
        _C.linear("x")
