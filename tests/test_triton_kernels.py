"""The Triton kernels against their plain-torch twins: on a GPU where there is one, else in Triton's interpreter."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.bench import quantized_kernels
from hf_llmopt.kernels import reference
from hf_llmopt.kernels.arguments import Grid

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

from hf_llmopt.kernels.triton import fp8, tuning, weight, wide  # noqa: E402
from hf_llmopt.kernels.triton.tuning import Way  # noqa: E402
from hf_llmopt.kernels.triton.weight import TritonWeight  # noqa: E402

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
# Relative to the norm of the product. The interpreter cuts bfloat16 where a GPU rounds.
BOUND = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3 if GPU else 1e-2}
FORMATS = {"int2": 2, "int4": 4, "int8": 8, "float8": 8}
# Outputs, inputs, inputs of a group, whether there are zeros, whether groups are scattered.
LAYOUTS = [
    (40, 256, 128, False, False),  # whole tiles
    (33, 192, 64, True, True),
    (17, 96, 32, False, False),
    (20, 200, 200, True, False),  # no power of two divides a row
    (16, 160, 16, True, True),
    (16, 256, 64, True, True),  # whole tiles with groups in them
    (16, 128, 128, True, False),  # one group
]


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(kind: str, layout: tuple[int, int, int, bool, bool], scales: torch.dtype = torch.float16) -> Grid:
    outputs, inputs, group, zeros, scattered = layout
    bits, groups = FORMATS[kind], inputs // group
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    if kind == "float8":
        codes, zeros = torch.randn(outputs, inputs).to(torch.float8_e4m3fn), False
    shift = torch.randint(0, min(2**bits + 1, 256), (outputs, groups), dtype=torch.uint8) if zeros else None
    index = (torch.arange(inputs) // group)[torch.randperm(inputs)].int() if scattered and groups > 1 else None
    grid = Grid(codes, (torch.rand(outputs, groups) + 0.1).to(scales), shift, bits, index)
    return Grid(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in grid))


def same(ours: Grid, theirs: Grid) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(
        torch.equal(a.float(), b.float()) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in pairs
    )


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def computed(way: Way, x: torch.Tensor, packed: TritonWeight, bias: torch.Tensor | None) -> torch.Tensor:
    order = packed.tensors.get("order")
    return weight.compute(way, x if order is None else x[:, order], packed.packed(), bias)


# Ways by number of rows: every kernel, split and unsplit, and tiles that reach beyond the rows.
WAYS = {
    1: [Way("deep", (1, 16, 2, 2, 2)), Way("dequantize")],
    5: [Way("deep", (8, 32, 4, 3, 4)), Way("tiles", (16, 32, 2, 3, 4))],
    20: [
        Way("deep", (16, 16, 2, 2, 2)),
        Way("tiles", (16, 64, 1, 2, 4)),
        Way("wide", (16, 64, 1, 2, 4, 0)),
        Way("wide", (32, 64, 2, 2, 4, 1)),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_product(dtype: torch.dtype, kind: str, layout: tuple) -> None:
    if not GPU and dtype != torch.float32 and (kind == "int2" or layout not in LAYOUTS[:2]):
        pytest.skip("the interpreter takes its time, and float32 takes the same path")
    grid = make(kind, layout)
    packed = TritonWeight.pack(grid)
    bias = torch.randn(layout[0], device=DEVICE).to(dtype)
    for rows, ways in WAYS.items():
        x = torch.randn(rows, layout[1], device=DEVICE).to(dtype)
        exact = reference.quantized_linear(x.double().float(), grid, bias.float())
        for way in ways:
            before = way.configuration[-1:] == (1,) or layout[2] > 64  # scaled, as where groups share a tile
            if way.name == "wide" and not (before and wide.serves(x, packed.packed())):
                continue
            ours = computed(way, x, packed, bias)
            assert ours.dtype == dtype
            assert error(ours, exact) < BOUND[dtype], (way, rows)
            if GPU:  # the interpreter computes one thing after the other
                assert torch.equal(ours, computed(way, x, packed, bias)), "the same product gives the same bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * GPU, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized_exactly(kind: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        grid = make(kind, layout)
        assert torch.equal(TritonWeight.pack(grid).dequantize(dtype), reference.dequantize(grid, dtype)), layout


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_unpacks_what_was_packed(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kind = data.draw(st.sampled_from([*FORMATS, "int3", "int5"]))
    FORMATS.update({"int3": 3, "int5": 5})
    group = data.draw(st.sampled_from([16, 32, 64, 128]))
    groups = data.draw(st.integers(1, 5))
    flags = (data.draw(st.booleans()), data.draw(st.booleans()))
    scales = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    grid = make(kind, (data.draw(st.integers(1, 40)), group * groups, group, *flags), scales)
    packed = TritonWeight.pack(grid)
    for name in ("int3", "int5"):
        FORMATS.pop(name)
    unpacked = packed.unpack()
    assert same(unpacked, grid)
    assert unpacked.codes.dtype == grid.codes.dtype
    held = {tensor.data_ptr() for tensor in packed.tensors.values()}
    assert not held & {part.data_ptr() for part in grid if isinstance(part, torch.Tensor)}, (
        "no part of the grid is kept"
    )


def test_layouts_that_no_kernel_reads() -> None:
    assert TritonWeight.pack(make("int4", (8, 96, 24, False, False))) is None
    assert TritonWeight.pack(make("int4", (8, 384, 192, False, False))) is None  # groups cross tiles
    assert TritonWeight.pack(make("int8", (8, 384, 192, False, False))) is not None
    uneven = make("int4", (8, 64, 32, False, False))._replace(index=torch.tensor([0] * 20 + [1] * 44, device=DEVICE))
    assert TritonWeight.pack(uneven) is None
    floats = make("float8", (8, 64, 64, False, False))
    assert TritonWeight.pack(floats._replace(codes=floats.codes.float().to(torch.float8_e5m2))) is None


def test_groups_that_follow_one_another_need_no_order() -> None:
    grid = make("int4", (8, 128, 32, False, False))
    packed = TritonWeight.pack(grid._replace(index=torch.arange(128, device=DEVICE, dtype=torch.int32) // 32))
    assert set(packed.tensors) == {"words", "scales"}


def test_bytes() -> None:
    packed = TritonWeight.pack(make("int4", (256, 1024, 128, True, False)))
    assert sum(tensor.nbytes for tensor in packed.tensors.values()) <= 0.28 * 2 * 256 * 1024


def test_shapes_of_a_product() -> None:
    packed = TritonWeight.pack(make("int4", (24, 128, 64, False, True)))
    x = torch.randn(2, 3, 128, device=DEVICE)
    ours = packed.product(x.transpose(0, 1))
    assert error(ours, reference.quantized_linear(x.transpose(0, 1), packed.unpack())) < 2e-6
    assert packed.product(x[:0]).shape == (0, 3, 24)


def test_weights_that_are_decoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "CHUNK", 7 * 128)
    grid = make("int4", (24, 128, 64, True, False))
    bias, x = torch.randn(24, device=DEVICE), torch.randn(3, 128, device=DEVICE)
    ours = computed(Way("dequantize"), x, TritonWeight.pack(grid), bias)
    assert error(ours, reference.quantized_linear(x, grid, bias)) < 2e-6


def test_activations_as_float8() -> None:
    x = torch.randn(5, 300, device=DEVICE) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1e4]], device=DEVICE)
    (codes, scales), (theirs, factors) = fp8.quantize_rows(x), reference.float8_rows(x)
    assert torch.allclose(scales, factors, rtol=1e-6, atol=0)
    if GPU:
        assert (codes.float() != theirs.float()).float().mean() < 1e-3  # a quotient between two codes
    near = codes.float() * scales
    far = (near - x).abs() > (x.abs() + scales / 32) / 16  # half a step of three bits
    assert far.float().mean() <= (0 if GPU else 0.1)  # the interpreter's conversion loses a carry
    assert (codes[3].float() == 0).all()


@pytest.mark.parametrize("bucket", [1, 8, 16, 32, 64, 128, 256, 2048])
def test_every_way_computes(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be chosen; the interpreter takes the first."""
    grid = make("int4", (160, 256, 128, False, False))
    packed = TritonWeight.pack(grid)
    dtype = torch.bfloat16 if GPU else torch.float32
    x = torch.randn(min(bucket, 300 if GPU else 2), 256, device=DEVICE).to(dtype)
    ways = weight.ways_of(bucket, x, packed.packed(), activations=True)
    assert len(ways) > 1
    assert len(set(map(str, ways))) == len(ways)
    for way in ways if GPU else ways[:1]:
        ours = computed(way, x, packed, None)
        assert error(ours, reference.quantized_linear(x.float(), grid)) < BOUND[dtype], way


@pytest.mark.parametrize("form", quantized_kernels.FORMATS)
def test_weights_of_the_benchmark(form: str) -> None:
    grid = quantized_kernels.grid(form, 16, 256, torch.Generator(DEVICE).manual_seed(0))
    packed = TritonWeight.pack(grid)
    assert packed.kind == form
    assert grid.scales.shape == (16, 2 if form == "int4" else 1)


# ------------------------------------------------------------------------------------------------- the fastest way


def test_table_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "device.json"
    first, second = tuning.Table(path), tuning.Table(path)
    first.keep("a", Way("deep", (1, 2)))
    second.keep("b", Way("dequantize"))  # what the other process wrote stays
    assert tuning.Table(path).ways == {"a": "deep 1 2", "b": "dequantize"}
    assert [file.name for file in path.parent.iterdir()] == ["device.json"]


@pytest.mark.parametrize("content", ["", "[1]", "{", None])
def test_damaged_table_costs_a_measurement(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "device.json"
    path.mkdir() if content is None else path.write_text(content)
    table = tuning.Table(path)
    assert table.ways == {}
    table.keep("a", Way("dequantize"))  # where nothing can be written the process still knows
    assert table.ways == {"a": "dequantize"}


def test_the_fastest_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {Way("deep", (1,)): 3.0, Way("tiles", (2,)): 1.0, Way("dequantize"): float("inf")}
    table = tuning.Table(tmp_path / "device.json")
    measured = []
    monkeypatch.setattr(tuning, "table", lambda device: table)
    monkeypatch.setattr(tuning, "milliseconds", lambda call, way: measured.append(way) or times[way])
    capturing = SimpleNamespace(now=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ways, device = list(times), torch.device("cpu")
    for _ in range(2):
        assert tuning.fastest("key", ways, lambda way: None, device) == Way("tiles", (2,))
    assert measured == ways
    capturing.now = True
    assert tuning.fastest("key", ways, lambda way: None, device) == Way("tiles", (2,))
    assert tuning.fastest("other", ways, lambda way: None, device) is None  # nothing is measured in a graph
    capturing.now = False
    table.ways["key"] = "a way of another version"
    assert tuning.fastest("key", ways, lambda way: None, device) == Way("tiles", (2,))
    assert len(measured) == 2 * len(ways)


def test_ways_are_compiled_beside_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, ways, inner = tuning.Table(tmp_path / "device.json"), [Way("deep", (n,)) for n in range(3)], [Way("tiles")]
    compiled, timed, device, together = [], [], torch.device("cpu"), threading.Barrier(len(ways))

    def part(way: Way) -> None:
        compiled.append((way, threading.current_thread() is threading.main_thread(), torch.is_inference_mode_enabled()))

    def call(way: Way) -> None:
        if threading.current_thread() is not threading.main_thread():
            together.wait(10)  # breaks unless all are called at a time
        if way == ways[0]:
            assert tuning.fastest("part", inner, part, device) is None, "nothing is timed beside others"
        if way == ways[1]:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "table", lambda device: table)
    monkeypatch.setattr(tuning, "milliseconds", lambda call, way: timed.append(way) or float(len(timed)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with torch.inference_mode():
        assert tuning.fastest("whole", ways, call, device) == ways[0]
    assert timed == ways
    assert compiled == [(inner[0], False, True)]
    assert table.ways == {"whole": "deep 0"}


# ------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty table, which the test may read."""
    path = tmp_path / "device.json"
    fresh = tuning.Table(path)
    monkeypatch.setattr(tuning, "table", lambda device: fresh)
    return path


class TestDevice:
    pytestmark = gpu

    def test_measured_kept_and_then_known(self, table: Path) -> None:
        grid = make("int4", (256, 512, 128, False, False))
        x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
        packed = TritonWeight.pack(grid)
        ours = packed.product(x)
        assert error(ours, reference.quantized_linear(x.float(), grid)) < BOUND[torch.bfloat16]
        ((key, name),) = json.loads(table.read_text()).items()
        assert "256x512" in key
        assert str(packed.ways[8, torch.bfloat16, True]) == name

    @pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
    @pytest.mark.parametrize("rows", [1, 4, 40, 300])
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_graph(self, kind: str, rows: int, table: Path) -> None:
        """A product waits for nothing once its way is known, and a graph replays it with new inputs."""
        packed = TritonWeight.pack(make(kind, (96, 256, 128 if kind != "float8" else 256, False, True)))
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        packed.product(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed.product(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packed.product(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, packed.product(x))

    def test_graph_before_any_measurement(self, table: Path) -> None:
        grid = make("int4", (96, 256, 128, False, False))
        x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
        TritonWeight.pack(grid).product(x)  # compiles, which no graph allows
        packed = TritonWeight.pack(grid)
        tuning.table(x.device).ways.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packed.product(x)
        graph.replay()
        assert error(out, reference.quantized_linear(x.float(), grid)) < BOUND[torch.bfloat16]
        assert packed.ways == {}

    @pytest.mark.parametrize("rows", [1, 20])
    def test_float8_products(self, rows: int) -> None:
        grid = make("float8", (64, 128, 128, False, False))
        packed = TritonWeight.pack(grid)
        x, bias = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((rows, 128), (64,)))
        if not fp8.serves(x, packed.packed()):
            pytest.skip("the device has no float8 products")
        codes, scales = reference.float8_rows(x)
        exact = reference.quantized_linear(codes.float() * scales, grid, bias.float())
        assert error(fp8.scaled(x, packed.packed(), bias), exact) < BOUND[torch.bfloat16]

    def test_measures_what_was_computed(self, table: Path) -> None:
        for entry in quantized_kernels.measure([(256, 512)], [1, 20]):
            assert entry["way"]
            assert min(entry["microseconds"]["quantized"]) > 0
            assert entry["error"] < (0.05 if entry["way"] == "scaled" else 2 * entry["error_bfloat16"])
        for entry in quantized_kernels.stack([1], layers=1):
            assert entry["low"] <= entry["ratio"] <= entry["high"]

    def test_another_device_than_the_current(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two devices")
        grid = make("int4", (64, 128, 128, False, False))
        there = Grid(*(part.to("cuda:1") if isinstance(part, torch.Tensor) else part for part in grid))
        x = torch.randn(2, 128, device="cuda:1", dtype=torch.bfloat16)
        ours = TritonWeight.pack(there).product(x)
        assert error(ours, reference.quantized_linear(x.float(), there)) < BOUND[torch.bfloat16]
