"""The same code on a GPU: tokens, noise and page bookkeeping as on the CPU."""

import copy

import pytest
import torch
from architectures import build

from hf_llmopt import Engine
from hf_llmopt.engine.sampling import draw, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KW = {"max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": None}
NAMES = [
    "llama",
    "qwen3",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "mistral",
    "gpt_oss",
    "llama4_text",
    "mixtral",
    "deepseek_v3",
]


@pytest.fixture(autouse=True)
def _full_precision():
    """float32 products in float32: TF32 would hide what is compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


GRAPHS = {"strict": True, "graphs": True, "kv_cache": {"page_size": 4}}


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (3, 13))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_equality(name: str, sampling: dict) -> None:
    model = build(name).cuda()
    inputs = batch()
    torch.manual_seed(1)
    stock = model.generate(**inputs, **sampling, **KW)
    state = torch.cuda.get_rng_state()
    torch.manual_seed(1)
    ours = model.generate(**inputs, **sampling, llmopt={"strict": True, "batching": {"max_batch_tokens": 9}}, **KW)
    assert model.llmopt.stats.served_by == "llmopt"
    assert torch.equal(ours, stock)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert model.llmopt.engine.store.pages_used == 0


@pytest.mark.parametrize("name", NAMES)
def test_found_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found on the device, and in host memory after the pool had to give it up."""
    # A tiny model may compute a page faster than it is loaded, and then nothing is kept in host memory.
    monkeypatch.setattr("hf_llmopt.prompt_cache.tree.host_seconds", lambda store: 0.0)
    model = build(name).cuda()
    config = {"kv_cache": {"page_size": 4, "max_tokens": 64}, "prompt_cache": {"host_bytes": 10**8}, "strict": True}
    shared = torch.randint(3, 90, (1, 21), device="cuda")
    found = []
    for turn in range(4):
        own = torch.randint(3, 90, (1, 6), device="cuda")
        for prompt in (torch.cat([shared, own], dim=1), own.repeat(1, 4)):
            arguments = {"attention_mask": torch.ones_like(prompt), **KW}
            ours = model.generate(prompt, **arguments, llmopt=config)
            assert torch.equal(ours, model.generate(prompt, **arguments)), turn
            found.append(model.llmopt.stats.cached_tokens)
    assert found[0] == 0
    assert min(found[2::2]) >= 16
    assert model.llmopt.engine.store.pages_used == 0


@pytest.mark.parametrize("shape", [(1, 50), (4, 5000), (8, 151936)])
def test_noise_equals_multinomial(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, device="cuda")
    torch.manual_seed(2)
    theirs = [torch.multinomial(scores.softmax(-1), 1)[:, 0] for _ in range(3)]
    state = torch.cuda.get_rng_state()
    torch.manual_seed(2)
    ours = [sample(scores, draw(scores)) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_engine_requests() -> None:
    model = build("llama").cuda()
    prompts = [torch.randint(3, 90, (n,), device="cuda") for n in (3, 20, 9, 14)]
    with Engine(model, {"kv_cache": {"page_size": 4, "max_tokens": 80}}) as engine:
        handles = [engine.submit(ids, **KW) for ids in prompts]
        for ids, handle in zip(prompts, handles, strict=True):
            assert handle.result(60) == model.generate(ids[None], **KW)[0, len(ids) :].tolist()
        assert engine.loop.store.pages_used == 0


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_graphs(name: str, sampling: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts that outgrow a graph; the second call replays what the first has recorded."""
    monkeypatch.setattr("hf_llmopt.engine.fixed.SHORTEST", 16)
    model = build(name, pad_token_id=None).cuda()
    if hasattr(model.config, "num_local_experts") or name == "deepseek_v3":
        model.set_experts_implementation("batched_mm")  # the default one waits for the device, in float32
    inputs = batch()
    for steps in (10, 15):
        torch.manual_seed(1)
        stock = model.generate(**inputs, **sampling, **KW)
        state = torch.cuda.get_rng_state()
        torch.manual_seed(1)
        ours = model.generate(**inputs, **sampling, llmopt=GRAPHS, **KW)
        stats = model.llmopt.stats
        assert (stats.served_by, stats.no_graphs) == ("llmopt", None)
        assert stats.graph_steps >= steps
        assert torch.equal(ours, stock)
        assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "mixtral"])
def test_graphs_of_prompts(name: str) -> None:
    """Prompts of one kind, with padding of several lengths behind them."""
    model = build(name, pad_token_id=None).cuda()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("batched_mm")
    ids = torch.randint(3, 90, (1, 128), generator=torch.Generator().manual_seed(0)).cuda()
    arguments = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    steps = []
    for length in (128, 127, 128, 100, 65, 128, 70, 97, 128):
        stock = model.generate(ids[:, -length:], **arguments).logits[0]
        ours = model.generate(ids[:, -length:], **arguments, llmopt=GRAPHS).logits[0]
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
        assert model.llmopt.stats.no_graphs is None
        steps.append(model.llmopt.stats.graph_steps)
    assert steps == [0] * 5 + [1] * 4
    assert "triton-extend" in model.llmopt.stats.attention


@pytest.mark.parametrize("window", [None, 100])
def test_graphs_of_prompts_on_tensor_cores(window: int | None) -> None:
    """Of bfloat16, and of a prompt whose parts see one another."""
    name, options = ("llama", {}) if window is None else ("mistral", {"sliding_window": window})
    model = build(name, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, **options)
    exact, model = copy.deepcopy(model).cuda(), model.bfloat16().cuda()
    ids = torch.randint(3, 90, (1, 700), generator=torch.Generator().manual_seed(0)).cuda()
    arguments = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    llmopt = {"strict": True, "graphs": True, "batching": {"max_batch_tokens": 400}}
    for length in (700, 690, 700, 680, 660, 700):
        truth = exact.generate(ids[:, -length:], **arguments).logits[0]
        stock = model.generate(ids[:, -length:], **arguments).logits[0]
        ours = model.generate(ids[:, -length:], **arguments, llmopt=llmopt).logits[0]
        assert float((ours - truth).norm()) < 1.5 * float((stock - truth).norm())
    assert model.llmopt.stats.graph_steps == 2
    if torch.cuda.get_device_capability() == (9, 0):
        assert "hopper-extend" in model.llmopt.stats.attention


@pytest.mark.parametrize("dtype", ["int8", "fp8", "int4"])
def test_graphs_over_quantized_pages(dtype: str) -> None:
    model = build("llama").cuda()
    config = {**GRAPHS, "kv_cache": {"page_size": 4, "dtype": dtype}}
    expected = model.generate(**batch(), **KW, llmopt={**config, "graphs": False, "attention": "triton"})
    for steps in (12, 15):
        assert torch.equal(model.generate(**batch(), **KW, llmopt=config), expected)
        assert (model.llmopt.stats.graph_steps >= steps, model.llmopt.stats.no_graphs) == (True, None)


def test_graphs_of_requests_that_come_and_go() -> None:
    model = build("llama").cuda()
    prompts = [torch.randint(3, 90, (n,), device="cuda") for n in (3, 20, 9, 14, 7)]
    with Engine(model, {**GRAPHS, "kv_cache": {"page_size": 4, "max_tokens": 120}}) as engine:
        handles = [engine.submit(ids, **KW) for ids in prompts]
        for ids, handle in zip(prompts, handles, strict=True):
            assert handle.result(60) == model.generate(ids[None], **KW)[0, len(ids) :].tolist()
        assert engine.loop.runner.no_graphs is None
        assert engine.loop.runner.replays > 5


class Stubborn(torch.nn.Module):
    """Waits for the device: as PyTorch sees it, or behind its back."""

    def __init__(self, inner: torch.nn.Module, hidden: bool) -> None:
        super().__init__()
        self.inner, self.hidden = inner, hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden:
            torch.cuda.synchronize()
        else:
            assert float(x.abs().max()) > 0
        return self.inner(x)


@pytest.mark.parametrize("hidden", [False, True])
def test_graphs_that_cannot_be_recorded(hidden: bool) -> None:
    """The call goes on, and the device's generator still draws."""
    model = build("llama").cuda()
    model.model.norm = Stubborn(model.model.norm, hidden)
    sampling = {"do_sample": True, "top_k": 20}
    torch.manual_seed(1)
    stock = model.generate(**batch(), **sampling, **KW)
    torch.manual_seed(1)
    ours = model.generate(**batch(), **sampling, **KW, llmopt=GRAPHS)
    assert model.llmopt.stats.graph_steps == 0
    assert (model.llmopt.stats.no_graphs or "").startswith("recording a pass raised")
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3"])
def test_offloaded_pages(name: str, dtype: str) -> None:
    """Prompts in pieces, several rows, a context that outgrows the memory that copies lie in."""
    if (name, dtype) == ("deepseek_v3", "int8"):
        pytest.skip("latent attention keeps the model's own numbers")
    model = build(name).cuda()
    pages = {"page_size": 4, "dtype": dtype}
    options = {"strict": True, "batching": {"max_batch_tokens": 9}}
    call = {**batch(), **KW, "max_new_tokens": 80}
    offloaded = model.generate(**call, llmopt={**options, "kv_cache": {**pages, "offload": True}})
    store = model.llmopt.engine.store
    homes = {keys.device.type for keys, layer in zip(store.keys, store.layers, strict=True) if layer.kind == "full"}
    assert homes == {"cpu"}
    # int8: the same pages on the device, without joined layers, which round products otherwise
    expected = {"graphs": False, "kv_cache": pages} if dtype == "int8" else False
    assert torch.equal(offloaded, model.generate(**call, llmopt=expected))


@pytest.mark.parametrize("swaps", [True, False])
def test_offloaded_requests_that_lose_their_pages(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: swaps)
    model = build("llama").cuda()
    prompts = [torch.randint(3, 90, (10,), device="cuda") for _ in range(4)]
    arguments = {**KW, "max_new_tokens": 30}
    kv_cache = {"page_size": 4, "max_tokens": 80, "offload": True}
    with Engine(model, {"strict": True, "kv_cache": kv_cache}) as engine:
        handles = [engine.submit(ids, **arguments) for ids in prompts]
        for ids, handle in zip(prompts, handles, strict=True):
            expected = model.generate(ids[None], **arguments, llmopt=False)
            assert handle.result(60) == expected[0, len(ids) :].tolist()
        assert sum(handle.stats.preemptions for handle in handles) > 0


def test_pinned_memory() -> None:
    """As many bytes as were asked for, known to the driver as pinned, and given back."""
    from hf_llmopt.kv_cache.transfer import pinned_zeros

    tensor = pinned_zeros((3, 5000), torch.bfloat16, torch.device("cuda"))
    assert tensor.is_pinned()
    assert not tensor.any()
    there = tensor.to("cuda", non_blocking=True) + 1
    tensor.copy_(there, non_blocking=True)
    del tensor  # waits
    assert (there == 1).all()


def test_the_bench_of_offloaded_pages() -> None:
    from hf_llmopt.bench import offload

    report = offload.bench(repeats=1, quick=True)
    assert report["passed"], offload.failures(report)
    taken = report["contexts"][0]["device_bytes"]
    assert taken[offload.LOSSY] > 0
    (table,) = offload.tables(report)
    assert all(len(row) == len(table.columns) for row in table.rows)
