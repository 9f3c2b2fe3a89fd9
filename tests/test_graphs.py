"""Replayed passes, recorded by an emulation: it runs the same operators and kernels again, in the same memory, and no
Python of the model."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import build, ragged
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hf_llmopt import Engine, LLMOptConfig
from hf_llmopt.attention import FixedInputs
from hf_llmopt.bench import kv_cache
from hf_llmopt.bench.report import table
from hf_llmopt.bench.workloads import Workload
from hf_llmopt.engine import capture, fixed, graphs
from hf_llmopt.errors import InvalidOption
from hf_llmopt.kernels import cpu

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the graphs themselves, in test_cuda.py")
KW: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
SAMPLED = {"do_sample": True, "top_k": 20}


class Tape(capture.NoWaiting):
    """Writes down every operator and kernel with the tensors it read and gave."""

    now: "Tape | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view of what is there

        def again() -> None:
            given = func(*args, **(kwargs or {}))
            if any(alias is not None for alias in aliases):
                return  # written in place
            both = (part if isinstance(part, (tuple, list)) else [part] for part in (result, given))
            for old, new in zip(*both, strict=True):
                if "empty" in func._schema.name:
                    old.fill_(float("nan") if old.is_floating_point() else 0)  # nobody but a recorded entry fills it
                elif isinstance(old, Tensor):
                    old.copy_(new)

        self.entries.append(again)
        return result


class Emulation:
    """Stands for CUDA's capture."""

    tape = Tape

    def __init__(self, device: torch.device) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: capture.Run) -> capture.Run:
        tape = self.tape()
        Tape.now = tape
        try:
            with tape:
                found = run()
        finally:
            Tape.now = None
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            for entry in tape.entries:
                entry()
            return found

        return replay


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes be recorded on the CPU."""

    def recorded(launch: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            if Tape.now is not None:
                Tape.now.entries.append(lambda: launch(*args, **kwargs))
            with _disable_current_modes():
                launch(*args, **kwargs)

        return run

    monkeypatch.setattr(InterpretedFunction, "run", recorded(InterpretedFunction.run))
    monkeypatch.setattr(dist, "all_reduce", recorded(dist.all_reduce))
    monkeypatch.setitem(capture.CAPTURES, "cpu", Emulation)
    monkeypatch.setattr(fixed, "SHORTEST", 8)


def one_layer(**options: Any) -> Any:
    """The interpreter takes milliseconds for each head of each layer of each row."""
    return build("llama", num_hidden_layers=1, num_key_value_heads=1, **options)


def config(**options: Any) -> dict[str, Any]:
    return {"strict": True, "graphs": True, "kv_cache": {"page_size": 4}, **options}


def capture_of(model: Any) -> Emulation:
    return model.llmopt.engine.runner.graphs._capture


def check(model: Any, inputs: dict[str, Tensor], llmopt: dict[str, Any], steps: int, **arguments: Any) -> None:
    """Stock's tokens, and how many of their steps came from graphs."""
    arguments = {**KW, **arguments}
    torch.manual_seed(1)
    stock = model.generate(**inputs, **arguments)
    torch.manual_seed(1)
    ours = model.generate(**inputs, **arguments, llmopt=llmopt)
    assert torch.equal(ours, stock)
    stats = model.llmopt.stats
    assert (stats.served_by, stats.no_graphs) == ("llmopt", None)
    assert stats.graph_steps == steps
    assert not steps or "triton-decode" in stats.attention


def test_tokens() -> None:
    """Contexts of 14 to 18 tokens: a graph for up to 16 and one for up to 32, three rows padded to four.

    Each kind of pass runs once eagerly, once to be recorded, once beside the eager pass, and from then on alone.
    """
    model = one_layer()
    check(model, ragged(), config(), 1)
    capture = capture_of(model)
    assert (capture.captured, capture.replayed) == (2, 1)
    check(model, ragged(), config(), 5, **SAMPLED)
    assert capture_of(model) is capture
    assert (capture.captured, capture.replayed) == (2, 6)


def test_windows() -> None:
    """A sliding group whose first pages were given back, beside a full one."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    check(build("gemma3_text", num_key_value_heads=1, **layers), ragged(), config(), 1)


def test_drafts() -> None:
    """Rows whose guesses are not equally many get as many, so that their spans are of one length."""
    model, llmopt = one_layer(), config(speculative={"num_tokens": 3})
    ids = torch.randint(3, 90, (2, 1, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.repeat(1, 3, 1).view(2, 15), "attention_mask": torch.ones(2, 15, dtype=torch.long)}
    inputs["input_ids"][1, 5:] = torch.arange(20, 30)  # nothing in it repeats itself
    arguments = {**KW, **SAMPLED, "max_new_tokens": 16, "llmopt": llmopt}
    torch.manual_seed(1)
    expected = model.generate(**inputs, **{**arguments, "llmopt": None})
    replayed = 0
    for _ in range(3):
        torch.manual_seed(1)
        assert torch.equal(model.generate(**inputs, **arguments), expected)
        stats = model.llmopt.stats
        assert stats.drafted_tokens
        assert stats.no_graphs is None
        replayed += stats.graph_steps
    assert replayed > 4
    lengths = {key.length for key in model.llmopt.engine.runner.graphs._graphs}
    assert lengths <= {1, 4, 2, 3}
    assert 4 in lengths


def test_masked_last_token() -> None:
    """Padding on the right: a query that does not see its own key comes first, and is another kind of pass."""
    inputs = ragged()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    check(one_layer(), inputs, config(), 1)


def test_rows_that_share_pages() -> None:
    model = one_layer()
    inputs = {name: tensor[:1] for name, tensor in ragged().items()}
    check(model, inputs, config(), 1, num_return_sequences=2, **SAMPLED)
    check(model, inputs, config(), 5, num_return_sequences=2, **SAMPLED)


def test_pieces_of_a_prompt() -> None:
    """Spans of several tokens, whose logits nobody wants."""
    model = one_layer()
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 90, (1, 29)), "attention_mask": torch.ones(1, 29, dtype=torch.long)}
    llmopt = config(batching={"max_batch_tokens": 3})
    check(model, inputs, llmopt, 3, max_new_tokens=2)  # up to 15, 24 and 27 tokens
    check(model, inputs, llmopt, 7, max_new_tokens=2)  # but for the first, up to 6, and what is left, 2 tokens


def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 17 to 24 tokens are of one kind, recorded when it is met again."""
    monkeypatch.setattr(fixed, "COARSE", 8)
    monkeypatch.setattr(fixed, "COARSE_CONTEXT", 64)
    monkeypatch.setattr(graphs, "OFTEN", 1)


def prompt_of(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding behind them, and with none; behind windows, with sinks."""
    coarse(monkeypatch)
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = one_layer() if name == "llama" else build(name, **layers)

    def logits(length: int, **more: Any) -> Tensor:  # alone: the cache in an output holds pages
        arguments = {**KW, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**prompt_of(length), **arguments, **more).logits[0]

    replayed = []
    for length in (24, 17, 21, 24, 19):
        assert torch.allclose(logits(length, llmopt=config()), logits(length), atol=1e-5)
        stats = model.llmopt.stats
        assert (stats.served_by, stats.no_graphs) == ("llmopt", None)
        replayed.append(stats.graph_steps)
    assert replayed == [0, 0, 1, 1, 1]
    assert "triton-extend" in stats.attention


def test_parts_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one attends to the first one's pages; its decoding has a graph of its own."""
    coarse(monkeypatch)
    model, llmopt = one_layer(), config(batching={"max_batch_tokens": 24})
    check(model, prompt_of(43), llmopt, 3)  # decoding
    check(model, prompt_of(42), llmopt, 7)
    assert {key.length for key in model.llmopt.engine.runner.graphs._graphs} == {1, 24}


def test_prompts_over_quantized_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse(monkeypatch)
    monkeypatch.setattr(cpu, "available", lambda: False)
    model, llmopt = one_layer(), config(kv_cache={"dtype": "int8", "page_size": 4})
    calls = [{**prompt_of(length), **KW, "max_new_tokens": 1} for length in (24, 17, 22)]
    expected = [model.generate(**call, llmopt={**llmopt, "graphs": False}) for call in calls]
    for call, tokens, steps in zip(calls, expected, (0, 0, 1), strict=True):
        assert torch.equal(model.generate(**call, llmopt=llmopt), tokens)
        assert model.llmopt.stats.graph_steps == steps


def test_tiles_behind_one_another() -> None:
    """Every token once, whatever is padding; the last tile first, and the first one again where one is left over."""
    store = SimpleNamespace(group_of=[0], groups=[SimpleNamespace(kind="full")], page_size=4)
    for own, size in itertools.product((17, 20, 23, 24), (2, 8, 16)):
        tiles, items = torch.tensor([[0, own, 30]], dtype=torch.int32), torch.zeros(24, 3)
        step = FixedInputs(store, 1, 24, 64, [], [(items, items)], [tiles], [True], None, None)
        found = step.tiles(0, torch.device("cpu"), range(1), size).tolist()
        assert found[-1] == [0, size, 30]
        assert len(found) == -(-24 // size) + 1
        covered = [start + place for start, count, _ in {tuple(tile) for tile in found} for place in range(count)]
        assert sorted(covered) == list(range(24))
        assert all(
            (end == 30) == (start < own) and start + count in {own, 24} | {start + size} for start, count, end in found
        )
        assert all(start + count <= own for start, count, end in found if end == 30)


def test_logits_that_wait_for_other_rows() -> None:
    """Two rows take turns with one graph: the first one's logits are read after the second one's replay."""
    inputs = {name: tensor[[0, 2], :4] for name, tensor in ragged().items()}
    model = one_layer()
    model.generate(**inputs, **KW, llmopt=config(batching={"max_batch_tokens": 1}))
    check(model, inputs, config(batching={"max_batch_tokens": 1}), 16)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_pages(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lossy, so compared with the same pages read by torch; C's packing of rows cannot be recorded."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    model, llmopt = one_layer(), config(kv_cache={"dtype": dtype, "page_size": 4})
    expected = model.generate(**ragged(), **KW, llmopt={**llmopt, "graphs": False})
    assert model.llmopt.stats.graph_steps == 0
    for steps in (1, 5):
        assert torch.equal(model.generate(**ragged(), **KW, llmopt=llmopt), expected)
        assert (model.llmopt.stats.graph_steps, model.llmopt.stats.no_graphs) == (steps, None)


@pytest.mark.parametrize("method", ["sink", "expected"])
def test_eviction(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that lose pages between replays, or many of them at the prompt's end."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    model, prompt = one_layer(), torch.randint(3, 90, (1, 130), generator=torch.Generator().manual_seed(3))
    llmopt = config(kv_cache={"page_size": 4, "eviction": method, "keep_tokens": 64})
    arguments = {**KW, "max_new_tokens": 10}
    expected = model.generate(prompt, **arguments, llmopt={**llmopt, "graphs": False})
    assert not torch.equal(model.generate(prompt, **arguments), expected), "what is evicted makes no difference here"
    assert torch.equal(model.generate(prompt, **arguments, llmopt=llmopt), expected)
    stats = model.llmopt.stats
    assert stats.graph_steps >= 6
    assert stats.no_graphs is None
    assert stats.evicted_tokens >= 66


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_come_and_go(overlap: bool) -> None:
    """With `overlap` a pass is launched before the host knows its ids."""
    model = one_layer()
    torch.manual_seed(4)
    prompts = [torch.randint(3, 90, (n,)) for n in (3, 12, 7, 9)]
    counts = [7, 3, 5, 4]
    llmopt = config(kv_cache={"page_size": 4, "max_tokens": 128}, batching={"overlap": overlap, "max_requests": 2})
    with Engine(model, llmopt) as engine:
        arguments = {**KW, "max_new_tokens": None}
        for _ in range(2):  # which passes meet depends on when requests come: one is replayed from its third time on
            handles = [
                engine.submit(ids, **{**arguments, "max_new_tokens": count})
                for ids, count in zip(prompts, counts, strict=True)
            ]
            for ids, count, handle in zip(prompts, counts, handles, strict=True):
                expected = model.generate(ids[None], **{**arguments, "max_new_tokens": count})[0, len(ids) :].tolist()
                assert handle.result(60) == expected
        runner = engine.loop.runner
        assert runner.no_graphs is None
        assert runner.replays >= 3
        assert engine.loop.store.pages_used == 0


class Asking(torch.nn.Module):
    """A module that asks the device for a number."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.abs().max()) > 0
        return self.inner(x)


class Either(torch.nn.Module):
    """One module for a few tokens, another one for many."""

    def __init__(self, few: torch.nn.Module, many: torch.nn.Module) -> None:
        super().__init__()
        self.few, self.many = few, many

    def forward(self, x: Tensor) -> Tensor:
        return (self.few if x.shape[1] <= fixed.LONGEST else self.many)(x)


@pytest.mark.parametrize("kind", ["a module", "its rotary embedding"])
def test_a_model_that_waits_for_the_device(kind: str) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}
    model = one_layer(**({} if kind == "a module" else dynamic))
    if kind == "a module":
        model.model.norm = Asking(model.model.norm)
    stock = model.generate(**ragged(), **KW)
    assert torch.equal(model.generate(**ragged(), **KW, llmopt=config()), stock)
    stats = model.llmopt.stats
    assert stats.graph_steps == 0
    assert stats.no_graphs is not None
    assert "aten::_local_scalar_dense waits for the device" in stats.no_graphs
    assert "no CUDA graphs: recording" in str(stats)


def test_a_model_that_waits_with_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts run eagerly, and nothing else does."""
    coarse(monkeypatch)
    model = one_layer()
    norm, asking = model.model.norm, Asking(model.model.norm)
    model.model.norm = Either(norm, asking)
    for steps in (3, 5, 5):
        check(model, prompt_of(20 + steps), config(), steps)
    assert {key.length for key in model.llmopt.engine.runner.graphs._graphs} == {1}


def test_the_kind_whose_turn_is_longest_ago_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    model = one_layer()
    for length in (16, 6, 14, 6, 16):  # contexts of up to 32, 8, 16, 8 and 32 tokens
        model.generate(**prompt_of(length), **{**KW, "max_new_tokens": 2}, llmopt=config())
    assert [key.context for key in model.llmopt.engine.runner.graphs._graphs] == [8, 32]


def test_a_replay_that_gives_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step gives in its place are the eager pass's logits, over keys that were written again."""

    class Stale(Emulation):
        def __call__(self, run: capture.Run) -> capture.Run:
            first = run().clone()
            return lambda: first

    monkeypatch.setitem(capture.CAPTURES, "cpu", Stale)
    model = one_layer()
    stock = model.generate(**ragged(), **KW)
    assert torch.equal(model.generate(**ragged(), **KW, llmopt=config()), stock)
    stats = model.llmopt.stats
    assert stats.graph_steps == 0
    assert (stats.no_graphs or "").startswith("a replay gave other logits than the eager pass")


def test_a_replay_that_writes_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager pass it is compared with has written them already: they are taken away before."""

    class Forgetful(Tape):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func._schema.name == "aten::index_copy_":
                self.entries.pop()
            return result

    monkeypatch.setattr(Emulation, "tape", Forgetful)
    model = one_layer()
    stock = model.generate(**ragged(), **KW)
    assert torch.equal(model.generate(**ragged(), **KW, llmopt=config()), stock)
    assert (model.llmopt.stats.no_graphs or "").startswith("a replay gave other logits")


def test_what_drops_graphs() -> None:
    model = one_layer()
    inputs = {name: tensor[:1] for name, tensor in ragged().items()}
    check(model, inputs, config(), 1, max_new_tokens=4)
    captured = capture_of(model).captured
    check(model, inputs, config(), 3, max_new_tokens=4)
    assert capture_of(model).captured == captured
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # written
    check(model, inputs, config(), 1, max_new_tokens=4)
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()  # exchanged
    check(model, inputs, config(), 1, max_new_tokens=4)
    assert capture_of(model).captured == captured + 2
    longer = {name: tensor.repeat(1, 3) for name, tensor in inputs.items()}
    model.generate(**longer, **KW, llmopt=config())  # more pages than there were: all of them moved
    check(model, inputs, config(), 1, max_new_tokens=4)
    hook = model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    stock = model.generate(**inputs, **KW)
    assert torch.equal(model.generate(**inputs, **KW, llmopt=config()), stock)
    assert (model.llmopt.stats.graph_steps, model.llmopt.stats.no_graphs) == (
        0,
        "a LlamaRMSNorm has a hook or a forward of its own",
    )
    hook.remove()
    check(model, inputs, config(), 1, max_new_tokens=4)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
    ],
)
def test_operators_that_wait(operator: Callable[[Tensor], object]) -> None:
    with capture.NoWaiting():
        x = torch.arange(4.0)
        assert (x[torch.tensor([0, 2])] + x.repeat_interleave(2)[:2]).shape == (2,)
        with pytest.raises(capture.WaitsForDevice):
            operator(x)


def test_where_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    with pytest.raises(InvalidOption, match=r"reads pages by the Triton kernels, got AttentionConfig\('sdpa'\)"):
        model.generate(**ragged(), **KW, llmopt=config(attention="sdpa"))
    monkeypatch.delitem(capture.CAPTURES, "cpu")
    with pytest.raises(InvalidOption, match=r"the model is on cpu\. Move it to a GPU, or leave graphs out"):
        model.generate(**ragged(), **KW, llmopt=config())
    model.generate(**ragged(), **KW, llmopt=config(graphs="auto"))
    assert model.llmopt.stats.served_by == "llmopt"
    for wrong in ("on", 1, None):
        with pytest.raises(InvalidOption, match="graphs is 'auto', False or True, got"):
            LLMOptConfig(graphs=wrong)


def test_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workload once more; one that replayed nothing says nothing about speed."""
    monkeypatch.setattr(kv_cache, "REPLAYED", {"llmopt": config()})
    workload = Workload("batch-1", rows=1, new_tokens=4, shortest=8, longest=9)
    model = one_layer()
    report = kv_cache.bench(model, [workload], repeats=1, graphs=True)
    eager, replayed = report["workloads"]
    assert (eager["name"], replayed["name"], report["passed"]) == ("batch-1", "batch-1, graphs", True)
    assert (eager["ways"]["llmopt"]["graph_steps"], replayed["ways"]["llmopt"]["graph_steps"]) == (0, 3)
    assert [ratio["over"] for ratio in replayed["ratios"]] == ["stock"]
    report["floor_ms_per_step"] = 4.8
    assert "reading all weights takes 4.80 ms" in table(report).caption
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    report = kv_cache.bench(model, [workload], repeats=1, graphs=True)
    hook.remove()
    assert report["workloads"][1]["reasons"] == [
        "no step came from a graph: a LlamaRMSNorm has a hook or a forward of its own"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "mixtral", "deepseek_v3"]
)
def test_architectures(name: str, sampling: dict[str, Any]) -> None:
    model = build(name, pad_token_id=None)  # GPT-2 looks for padding on the host
    check(model, ragged(), config(), 7, max_new_tokens=12, **sampling)
    check(model, ragged(), config(), 11, max_new_tokens=12, **sampling)
