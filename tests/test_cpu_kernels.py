"""Every C kernel against its plain-torch twin: random shapes, formats, page orders, and each instruction set level."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.kernels import cpu, reference

COMPILER = shutil.which("cc") or shutil.which("gcc")
# With a compiler these tests must run: an optional extension that fails to build would go unnoticed.
pytestmark = pytest.mark.skipif(not cpu.available() and not COMPILER, reason=str(cpu.why_not()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = cpu.levels() or ("none",)
# Units in the last place that a different order of additions may cost, relative to the largest value.
BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def close(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Ours may err as much as the twin does in the same format, and by the format's rounding of `scale`."""
    scale = (exact if scale is None else scale).abs().max().clamp_min(1e-6)
    error = (ours.double() - exact).abs().max() / scale
    twin = (theirs.double() - exact).abs().max() / scale
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert error <= 1.5 * twin + BOUND[ours.dtype], (float(error), float(twin))


def test_built_wherever_there_is_a_compiler() -> None:
    assert cpu.available(), f"{COMPILER} is on the PATH, but {cpu.why_not()}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_attention(dtype: torch.dtype, level: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 7, 8, 12]))
    key_dim, value_dim = (data.draw(st.sampled_from([8, 24, 64, 80, 128])) for _ in range(2))
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    softcap = data.draw(st.sampled_from([None, 20.0]))
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    contexts = data.draw(st.lists(st.sampled_from([1, 3, 16, 17, 200, 1500]), min_size=1, max_size=4))
    pages = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(pages)).int() + 1
    table = torch.zeros(len(contexts), max(pages), dtype=torch.int32)
    items = []
    for row, (context, count) in enumerate(zip(contexts, pages, strict=True)):
        table[row, :count] = order[:count]
        order = order[count:]
        window = data.draw(st.sampled_from([context, 5, 100]))
        for end in range(max(1, context - data.draw(st.integers(0, 3))), context + 1):
            items.append((row, max(0, end - window), end))
    items = torch.tensor(items, dtype=torch.int32)
    slots = (sum(pages) + 1) * page_size
    # As transformers hands it over: [1, heads, tokens, width], tokens and heads exchanged in memory.
    query = torch.randn(kv_heads * group, len(items), key_dim).to(dtype).transpose(0, 1)
    keys, values = (torch.randn(slots, kv_heads, dim).to(dtype) for dim in (key_dim, value_dim))
    arguments = (table, items, page_size, key_dim**-0.5, softcap, sinks)
    with cpu.using(level):
        ours = cpu.attention(query, keys, values, *arguments)
    exact_sinks = None if sinks is None else sinks.double()
    exact = reference.paged_attention(query.double(), keys.double(), values.double(), *arguments[:-1], exact_sinks)
    close(ours, reference.paged_attention(query, keys, values, *arguments), exact.double())


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
@pytest.mark.parametrize("variant", [0, 1, 2, "layer"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_norms(dtype: torch.dtype, level: str, variant: int | str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 200))
    x = (torch.randn(rows, width) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(width).to(dtype) if data.draw(st.booleans()) else None for _ in range(2))
    with cpu.using(level):
        if variant == "layer":
            ours, theirs = cpu.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5)
            wide = [None if t is None else t.double() for t in (weight, bias)]
            exact = reference.layer_norm(x.double(), *wide, 1e-5)
        else:
            ours, theirs = (module.rms_norm(x, weight, 1e-6, variant) for module in (cpu, reference))
            mean = x.double().pow(2).mean(-1, keepdim=True)
            exact = x.double() * torch.rsqrt(mean + 1e-6)
            if weight is not None:
                exact = exact * (weight.double() + (variant == 1))
    close(ours, theirs, exact)


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
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [0, 20, 64, 80])
def test_rotary(dtype: torch.dtype, level: str, interleaved: bool, rotated: int) -> None:
    def tensors() -> list[torch.Tensor]:
        torch.manual_seed(3)
        shapes = [(5, 6, 80), (5, 2, 80), (5, 2, 24), (40, 2, 80), (40, 2, 24)]
        return [torch.randn(shape).to(dtype) for shape in shapes]

    angles = torch.randn(5, rotated)
    turns = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else (None, None)
    slots = torch.tensor([7, 0, 39, 20, 21])
    ours, theirs = tensors(), tensors()
    with cpu.using(level):
        cpu.rotary(*ours[:3], *turns, slots, *ours[3:], interleaved)
    reference.rotary(*theirs[:3], *turns, slots, *theirs[3:], interleaved)
    for mine, twin in zip(ours, theirs, strict=True):
        # The same roundings: equal but for a fused multiply-add in float32.
        assert torch.allclose(mine.float(), twin.float(), atol=2e-6 if dtype == torch.float32 else 0, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_attention_does_not_depend_on_neighbours(level: str) -> None:
    query, keys = torch.randn(6, 14, 64), torch.randn(700 * 16, 2, 64)
    table = (torch.randperm(660).int() + 1).view(6, 110)
    items = torch.tensor([[row, 0, 5 + 340 * row] for row in range(6)], dtype=torch.int32)
    with cpu.using(level):
        together = cpu.attention(query, keys, keys, table, items, 16, 0.125)
        for row in range(6):
            alone = cpu.attention(query[row : row + 1], keys, keys, table, items[row : row + 1], 16, 0.125)
            assert torch.equal(together[row : row + 1], alone)


def test_malformed_calls_are_refused() -> None:
    from hf_llmopt.kernels.cpu import _C

    with pytest.raises(ValueError, match="malformed"):
        _C.linear(0, 0, 1, 0)
    with pytest.raises(TypeError):
        _C.linear("x")
