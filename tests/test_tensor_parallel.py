"""A model that is sharded over two processes by transformers' `tp_plan` gives stock's tokens, each rank its own heads.

All ranks of a module's models are started once: a process takes seconds to import torch.
"""

import os

import pytest
import torch
import torch.distributed as dist
from architectures import build
from sharded import MASK, NEW, PROMPTS, RANKS, SAMPLED, generate, load, run
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_llmopt
from hf_llmopt import Engine, KVCacheConfig, LLMOptConfig, PromptCacheConfig
from hf_llmopt.bench import equality, kv_cache, workloads
from hf_llmopt.bench.report import table
from hf_llmopt.errors import LLMOptError
from hf_llmopt.fusion import launched
from hf_llmopt.generation import Wishes

QUICK, MORE = ("llama", "qwen3"), ("gemma2", "gemma3_text", "mixtral", "olmo2", "qwen2")
SERVED = "llama"  # which the quick test also serves with an engine
GATHERED = ("olmo2",)  # the plan gathers what queries, keys and values are: every rank attends for all heads
REFUSED = {
    "eviction": KVCacheConfig(eviction="sink"),
    "path": PromptCacheConfig("somewhere"),
    "ttl": PromptCacheConfig(ttl=1.0),
    "layer_skip": {"speculative": {"method": "layer_skip", "exit_layer": 1}},
}


def _job(rank: int, folders: dict[str, str], more: bool) -> dict:
    """Everything that is compared, by architecture."""
    found: dict = {name: _one(rank, folder, more, more or name == SERVED) for name, folder in folders.items()}
    shape = workloads.build("0.5b", miniature=True, ranks=RANKS)
    return {**found, "bench": kv_cache.bench(shape, kv_cache.QUICK[:1], repeats=1), "ties": _ties(shape)}


def _ties(model: PreTrainedModel) -> tuple:
    """Logits of a copy in float32, those that it should give, and what is said of another token in bfloat16."""
    with torch.no_grad():
        logits = model(PROMPTS).logits
        model.bfloat16()
        copied = equality.in_float32(model)
        model.model.norm.weight.zero_()  # the copy has its own
        found = copied(PROMPTS).logits
    model.model.norm.weight.data.fill_(1.0)
    tokens = generate(model)
    other = tokens.clone()
    other[0, -1] += 1
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK}
    return logits, found, equality.compare(model, inputs, tokens, other)


def _one(rank: int, folder: str, more: bool, serves: bool) -> dict:
    model = load(folder)
    found: dict = {"stock": generate(model), "stock sampled": generate(model, **SAMPLED)}
    ours = {
        "cold": {"llmopt": True},
        "cached": {"llmopt": True},
        "sampled": {"llmopt": True, **SAMPLED},
        "no prompt cache": {"llmopt": "kv_cache"},
    }
    if more:
        ours |= {
            "suffix": {"llmopt": "speculative"},
            "draft model": {"llmopt": {"speculative": {"draft_model": folder}, "prompt_cache": True}},
            "int8 pages": {"llmopt": {"kv_cache": "int8"}},
        }
    for name, kwargs in ours.items():
        found[name] = generate(model, **kwargs), model.llmopt.stats
    found["alone"] = generate(model, slice(0, 1)), generate(model, slice(0, 1), llmopt=True)
    found["own heads"] = [spec.kv_heads for spec in model.llmopt.engine.store.layers]
    found["shapes"] = [keys.shape[1] for keys in model.llmopt.engine.store.keys]
    if serves:
        found["served"] = _served(model) if rank == 0 else _follow(model)
    if rank == 1:  # the other rank has to hear of it
        weights = [weight for weight in model.model.layers[0].parameters() if isinstance(weight, DTensor)]
        with torch.no_grad():
            weights[-1].to_local()[:, 0].add_(0.5)
    found["changed"] = generate(model), generate(model, llmopt=True), model.llmopt.stats
    return found


def _ask(engine: Engine) -> list[list[int]]:
    """Tokens of requests that share steps."""
    handles = [
        engine.submit(PROMPTS[1], max_new_tokens=NEW, do_sample=False),
        engine.submit([31, 32, 33], max_new_tokens=20, do_sample=True, seed=3),
        engine.submit([31, 32, 34], max_new_tokens=6, do_sample=True, seed=5, num_return_sequences=2),
    ]
    return [choice.result() for handle in handles for choice in handle.choices]


def _error(handle) -> LLMOptError:
    with pytest.raises(LLMOptError) as failed:
        handle.result()
    return failed.value


def _served(model) -> dict:
    """What an engine does for those who ask on rank 0."""
    long = {"max_new_tokens": 120, "min_new_tokens": 120, "do_sample": False}
    with Engine(model) as engine:
        found: dict = {"tokens": _ask(engine)}
        cancelled = engine.submit([41, 42], **long)
        next(iter(cancelled))
        cancelled.cancel()
        late = engine.submit([51, 52], **long, deadline=0.05)
        found["unseeded"] = engine.submit([61], max_new_tokens=8, min_new_tokens=8, do_sample=True).result()
        found["again"] = _ask(engine)
        found["errors"] = [type(_error(handle)).__name__ for handle in (cancelled, late)]
        for name, call in {
            "unpicklable": lambda: engine.submit([1], logits_processor=[lambda ids, scores: scores]),
            "pipeline": lambda: engine.submit_call(lambda: model.generate(PROMPTS), Wishes()),
            "follow": engine.follow,
        }.items():
            with pytest.raises(LLMOptError) as refused:
                call()
            found[name] = str(refused.value)
        running = engine.submit([41, 43], **long)
        next(iter(running))
    found["closed"] = type(_error(running)).__name__
    found["held"] = sum(pool.used for pool in engine.loop.scheduler.pools)
    return found


def _follow(model) -> dict:
    with Engine(model) as engine:
        with pytest.raises(LLMOptError) as refused:
            engine.submit([1])
        engine.follow()
    return {"refused": str(refused.value), "held": sum(pool.used for pool in engine.loop.scheduler.pools)}


def _replayed(rank: int, folder: str) -> dict:
    """As on GPUs: layers are launched, and passes replayed. One rank finds something against that in the end."""
    from test_graphs import emulate

    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        patch.setattr(launched, "LAUNCHES", {"cpu"})
        # The emulation cannot see through the sharded tensors of embeddings and head.
        layers = {name: kind for name, kind in LlamaConfig.base_model_tp_plan.items() if "layers" in name}
        patch.setattr(LlamaConfig, "base_model_tp_plan", {**layers, "embed_tokens": "replicate"})
        patch.setattr(LlamaForCausalLM, "_tp_plan", {})
        model = load(folder)
        asked = LLMOptConfig(graphs=True, kv_cache=KVCacheConfig(page_size=4), strict=True)
        found: dict = {"stock": generate(model)}
        for name in ("first", "again"):
            found[name] = generate(model, llmopt=asked), model.llmopt.stats
        with Engine(model, asked) as engine:
            found["served"] = _ask(engine) if rank == 0 else engine.follow()
        if rank == 1:
            model.model.norm.register_forward_hook(lambda module, args, output: None)
        found["hooked"] = generate(model, llmopt=asked), model.llmopt.stats
        graphs = model.llmopt.engine.runner.graphs
        graphs.why_not = None
        dist.destroy_process_group(dist.new_group())
        found["another group ended"] = graphs.why_not
        dist.barrier()
        dist.destroy_process_group()  # NCCL's would wait for the graphs for ever
        found["ended"] = graphs.why_not
    return found


def _refusals(rank: int, folder: str) -> dict[str, str]:
    model, found = load(folder), {}
    calls = {name: lambda given=given: generate(model, llmopt=given) for name, given in REFUSED.items()}
    calls["int8"] = lambda: load(folder, llmopt="int8")
    calls["int8 in place"] = lambda: hf_llmopt.optimize(model, llmopt="int8")
    for name, call in calls.items():
        try:
            call()
        except LLMOptError as error:
            found[name] = str(error)
    return found


def _compare(names: tuple[str, ...], folder, more: bool) -> tuple[dict, list[dict]]:
    models, folders = {name: build(name) for name in names}, {}
    for name, model in models.items():
        folders[name] = str(folder / name)
        model.save_pretrained(folders[name])
    return models, run(_job, folder / "ranks", folders, more)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return _compare(QUICK, tmp_path_factory.mktemp("quick"), more=False)


def _check(name: str, models: dict, ranks: list[dict]) -> None:
    whole = models[name]
    for found in (rank[name] for rank in ranks):
        assert len(set(found["stock"][:, PROMPTS.shape[1] :].flatten().tolist())) > 2, name
        assert torch.equal(found["stock"], generate(whole))
        assert torch.equal(found["stock sampled"], generate(whole, **SAMPLED))
        assert not torch.equal(found["stock"], found["stock sampled"])
        exact = {"cold", "cached", "no prompt cache", "suffix", "draft model"} & set(found)
        for kind in exact:
            tokens, stats = found[kind]
            assert stats.served_by == "llmopt", (kind, stats.reason)
            assert torch.equal(tokens, found["stock"]), kind
        assert torch.equal(found["sampled"][0], found["stock sampled"])
        assert found["cold"][1].cached_tokens == 0 < found["cached"][1].cached_tokens
        assert torch.equal(*found["alone"])
        heads = whole.config.get_text_config().num_key_value_heads
        assert set(found["own heads"]) == set(found["shapes"]) == {heads if name in GATHERED else heads // RANKS}
        stock, ours, stats = found["changed"]
        assert torch.equal(stock, ours)
        assert not torch.equal(stock, found["stock"])
        assert stats.cached_tokens == 0  # the keys of other weights


def test_the_bench_measures_a_sharded_shape(quick) -> None:
    for found in quick[1]:
        report = found["bench"]
        assert report["passed"], report["workloads"]
        assert "over 2 processes" in table(report).title
        logits, found, outcome = found["ties"]
        assert torch.allclose(found, logits, rtol=0.05, atol=0.05 * float(logits.abs().max()))
        assert outcome.differences[0]["gap"] is not None


def test_an_engine_takes_requests_on_rank_0(quick) -> None:
    models, ranks = quick
    served, followed = (rank[SERVED]["served"] for rank in ranks)
    _check_served(models[SERVED], served, followed)


def _check_served(whole, served: dict, followed: dict) -> None:
    with Engine(whole) as engine:
        assert served["tokens"] == served["again"] == _ask(engine)
    assert served["errors"] == ["RequestCancelled", "DeadlineExceeded"]
    assert served["closed"] == "EngineClosed"
    assert len(served["unseeded"]) == 8
    assert "pickled" in served["unpicklable"]
    assert "rank 0" in served["pipeline"]
    assert "rank 0" in served["follow"]
    assert "engine.follow()" in followed["refused"]
    assert served["held"] == followed["held"] == 0


@pytest.mark.parametrize("name", QUICK)
def test_tokens_are_those_of_stock_and_of_one_process(quick, name) -> None:
    _check(name, *quick)


@pytest.mark.slow
def test_layers_are_launched_and_passes_replayed(tmp_path) -> None:
    pytest.importorskip("triton")
    whole = build("llama", num_hidden_layers=2)
    whole.save_pretrained(tmp_path / "model")
    ranks = run(_replayed, tmp_path / "ranks", str(tmp_path / "model"))
    expected = generate(whole)
    for rank, found in enumerate(ranks):
        assert torch.equal(found["stock"], expected)
        for name in ("first", "again", "hooked"):
            tokens, stats = found[name]
            assert torch.equal(tokens, expected), name
            assert stats.fused == ("2 x decoder layer",)
        assert 0 < found["first"][1].graph_steps < found["again"][1].graph_steps
        assert found["another group ended"] is None
        assert found["ended"] == "its process group has ended"
        stats = found["hooked"][1]
        assert stats.graph_steps == 0
        assert ("has a hook" if rank else "another process") in stats.no_graphs
    with Engine(whole) as engine:
        assert ranks[0]["served"] == _ask(engine)


@pytest.mark.slow
def test_more_architectures(tmp_path) -> None:
    models, ranks = _compare((*QUICK, *MORE), tmp_path, more=True)
    for name in models:
        _check(name, models, ranks)
        first, second = (rank[name] for rank in ranks)
        _check_served(models[name], first["served"], second["served"])
        assert first["draft model"][1].accepted_tokens > 0
        assert torch.equal(first["int8 pages"][0], second["int8 pages"][0])
        assert first["int8 pages"][0].shape == (2, PROMPTS.shape[1] + NEW)


def _left(rank: int, folder: str, report: str) -> None:
    """Rank 1 dies while rank 0 serves."""
    model = load(folder)
    engine = Engine(model)
    if rank == 1:
        with torch.no_grad():
            for _ in range(4):
                engine._turn()
        os._exit(0)
    running = engine.submit([41, 42], max_new_tokens=200, min_new_tokens=200, do_sample=False)
    found = {"running": type(_error(running)).__name__}
    engine.close()
    with pytest.raises(LLMOptError) as refused:
        engine.submit([41, 42])
    found["later"] = type(refused.value).__name__
    torch.save(found, report)
    os._exit(0)


@pytest.mark.slow
def test_a_rank_dies(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path / "llama")
    run(_left, tmp_path / "ranks", str(tmp_path / "llama"), str(tmp_path / "report.pt"))
    assert torch.load(tmp_path / "report.pt") == {"running": "RequestFailed", "later": "EngineClosed"}


@pytest.mark.slow
def test_what_ranks_would_do_differently_is_refused(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path / "llama")
    for found in run(_refusals, tmp_path / "ranks", str(tmp_path / "llama")):
        assert set(found) == {*REFUSED, "int8", "int8 in place"}
        assert all("2 processes" in found[name] for name in REFUSED)
        assert "one process" in found["int8"]
        assert "one process" in found["int8 in place"]
