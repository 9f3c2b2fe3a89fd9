"""The engine under random traffic, tiny budgets and failures."""

import gc
import threading

import pytest
import torch
from architectures import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

import hf_llmopt
from hf_llmopt import Engine, errors
from hf_llmopt.kernels import cpu

pytestmark = pytest.mark.usefixtures("two_threads")
KW = {"pad_token_id": 0, "eos_token_id": None}


def stock(model, ids: list[int], count: int) -> list[int]:
    return model.generate(torch.tensor([ids]), max_new_tokens=count, **KW)[0, len(ids) :].tolist()


def pages(engine: Engine) -> int:
    return engine.loop.store.pages_used


class Raises(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.after:
            raise ZeroDivisionError("user code")
        return scores


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_leaves_every_page_free(model, name: str, data: st.DataObject) -> None:
    """Submit, cancel and fail at random over a pool that holds about two requests: tokens stay stock's, pages
    return."""
    served = model(name)
    config = {
        "kv_cache": {"page_size": 4, "max_tokens": 60},
        "batching": {"max_batch_tokens": data.draw(st.integers(1, 16)), "max_requests": data.draw(st.integers(1, 5))},
    }
    plans = data.draw(
        st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from("wwwcf")), min_size=1, max_size=8)
    )
    with Engine(served, config) as engine:
        submitted = []
        for index, (prompt, count, fate) in enumerate(plans):
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(3, 90, (prompt,), generator=generator).tolist()
            processors = [Raises(prompt + count // 2)] if fate == "f" else []
            handle = engine.submit(ids, max_new_tokens=count, logits_processor=processors, **KW)
            if fate == "c":
                handle.cancel()
                fate = "w" if handle.error is None else "c"  # it may have ended before
            submitted.append((handle, ids, count, fate))
        for handle, ids, count, fate in submitted:
            if fate == "f":
                with pytest.raises(errors.CallbackFailed, match="user code"):
                    handle.result(60)
            elif fate == "c":
                with pytest.raises(errors.RequestCancelled):
                    handle.result(60)
            else:
                assert handle.result(60) == stock(served, ids, count)
                assert handle.stats.served_by == "llmopt"
        assert pages(engine) == 0
        for pool in engine.loop.scheduler.pools:
            assert pool.free == pool.num_pages


def test_preempted_requests_give_the_same_tokens(model) -> None:
    """Three requests of 40 tokens over 80 tokens of pages: somebody must be computed twice."""
    served = model("qwen3")
    prompts = [torch.randint(3, 90, (10,)).tolist() for _ in range(3)]
    with Engine(served, {"kv_cache": {"page_size": 4, "max_tokens": 80}}) as engine:
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, max_new_tokens=30, **KW) for ids in prompts]
        assert [handle.result(60) for handle in handles] == [stock(served, ids, 30) for ids in prompts]
        assert sum(handle.stats.preemptions for handle in handles) > 0
        assert pages(engine) == 0


def test_generate_beside_a_full_engine(model) -> None:
    """A generate call takes the pages of preemptible requests, and both end with stock's tokens."""
    served = model("llama")
    config = {"kv_cache": {"page_size": 4, "max_tokens": 96}}
    prompts = [torch.randint(3, 90, (12,)).tolist() for _ in range(4)]
    batch = torch.randint(3, 90, (2, 12))
    with Engine(served, config) as engine:
        handles = [engine.submit(ids, max_new_tokens=30, **KW) for ids in prompts]
        ours = served.generate(batch, max_new_tokens=30, llmopt=config, **KW)
        assert torch.equal(ours, served.generate(batch, max_new_tokens=30, **KW))
        assert [handle.result(60) for handle in handles] == [stock(served, ids, 30) for ids in prompts]


def test_memory_is_flat_over_many_requests(model) -> None:
    served = model("llama")
    with Engine(served) as engine:
        objects = []
        for _ in range(4):
            handles = [engine.submit([3 + i % 80, 7, 9], max_new_tokens=2, **KW) for i in range(100)]
            for handle in handles:
                handle.result(120)
            del handles, handle
            gc.collect()
            objects.append(sum(1 for item in gc.get_objects() if "hf_llmopt" in str(type(item))))
        assert pages(engine) == 0
        assert objects[-1] <= objects[0] + 5
        # One page a request, and no more requests at a time than may hold pages.
        assert engine.loop.scheduler.pools[0].num_pages <= 2 * engine.config.batching.max_requests
    assert not any(thread.name == "hf_llmopt-engine" for thread in threading.enumerate())


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "llama4_text"])
def test_pages_in_use_are_bounded(model, name: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than ceil(tokens / page_size) pages a request and group, plus one for a window."""
    served = model(name)
    from hf_llmopt.engine import EngineLoop

    settle = EngineLoop._settle
    checked = []

    def checking(self, spans) -> None:
        settle(self, spans)
        for request, _ in spans:
            for group, table in zip(self.store.groups, request.tables, strict=True):
                tokens = request.computed if group.kind == "full" else min(request.computed, group.window)
                assert table.held <= -(-tokens // page_size) + (group.kind != "full")
                checked.append(group.kind)

    monkeypatch.setattr(EngineLoop, "_settle", checking)
    config = {"kv_cache": {"page_size": page_size}, "batching": {"max_batch_tokens": 7}}
    ids = torch.randint(3, 90, (1, 30))
    ours = served.generate(ids, max_new_tokens=20, llmopt=config, **KW)
    assert torch.equal(ours, served.generate(ids, max_new_tokens=20, **KW))
    assert checked


def test_a_request_with_nan_harms_nobody(model) -> None:
    served = model("llama")
    good = torch.randint(3, 90, (9,)).tolist()
    broken = torch.full((1, 9, 64), float("nan"))
    config = {"kv_cache": {"page_size": 4, "max_tokens": 64}}
    with Engine(served, config) as engine:
        first = engine.submit(good, max_new_tokens=20, **KW)
        bad = engine.submit(torch.zeros(1, 0, dtype=torch.long), inputs_embeds=broken, max_new_tokens=5, **KW)
        second = engine.submit(good[::-1], max_new_tokens=20, **KW)
        with pytest.raises(errors.InvalidLogits, match="NaN"):
            bad.result(60)
        third = engine.submit(good, max_new_tokens=20, **KW)
        assert first.result(60) == third.result(60) == stock(served, good, 20)
        assert second.result(60) == stock(served, good[::-1], 20)
        assert pages(engine) == 0


def test_a_failing_forward_fails_its_requests_only(model, monkeypatch: pytest.MonkeyPatch) -> None:
    served = model("llama")
    ids = torch.randint(3, 90, (1, 6))
    expected = served.generate(ids, max_new_tokens=4, **KW)
    assert torch.equal(served.generate(ids, max_new_tokens=4, llmopt=True, **KW), expected)

    def explode(*args, **kwargs):
        raise RuntimeError("device fell over")

    with monkeypatch.context() as patch:
        patch.setattr(served.model.layers[1].mlp, "forward", explode)
        with pytest.raises(errors.RequestFailed, match="device fell over"):
            served.generate(ids, max_new_tokens=4, llmopt=True, **KW)
    assert torch.equal(served.generate(ids, max_new_tokens=4, llmopt=True, **KW), expected)
    assert served.llmopt.engine.store.pages_used == 0


def test_close_ends_what_runs(model) -> None:
    engine = Engine(model("llama"))
    handle = engine.submit([5, 6, 7], max_new_tokens=200, **KW)
    engine.close()
    with pytest.raises(errors.EngineClosed):
        handle.result(10)
    with pytest.raises(errors.EngineClosed):
        engine.submit([5], max_new_tokens=1, **KW)
    engine.close()
    assert pages(engine) == 0


def test_what_can_never_fit_is_refused_at_once(model) -> None:
    served = model("llama")
    config = {"kv_cache": {"page_size": 4, "max_tokens": 20}}
    with Engine(served, config) as engine, pytest.raises(errors.OutOfPages, match="What fits: 1 row"):
        engine.submit([5] * 10, max_new_tokens=20, **KW)
    with pytest.raises(errors.OutOfPages, match=r"3 row\(s\) need"):
        served.generate(torch.full((3, 8), 5), max_new_tokens=8, llmopt=config, **KW)


def test_a_deleted_model_is_named(model) -> None:
    import copy

    own = copy.deepcopy(model("llama"))
    engine = Engine(own)
    loop = engine.loop
    engine.model = None
    del own
    gc.collect()
    with pytest.raises(ReferenceError, match="was deleted"):
        _ = loop.runner.model


def test_uninstalled_engine_says_so(model) -> None:
    engine = Engine(model("llama"))
    hf_llmopt.uninstall()
    try:
        with pytest.raises(errors.InvalidOption, match=r"install\(\)"):
            engine.submit([5], max_new_tokens=1, **KW)
    finally:
        hf_llmopt.install()


def test_a_large_max_length_sets_little_aside() -> None:
    """Pages follow the tokens that come, not the number that could."""
    served = build("llama")  # whose pool no other test has grown
    ids = torch.randint(3, 90, (2, 6))
    ours = served.generate(ids, max_new_tokens=10**9, max_time=0.05, llmopt=True, **KW)
    pool = served.llmopt.engine.scheduler.pools[0]
    assert ours.shape[1] > 6
    assert pool.num_pages * 16 < 2 * (1024 + 16) * 2


def test_pools_grow_while_a_request_runs(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.engine.budget.AHEAD", 8)
    served = model("gemma3_text")
    ids = torch.randint(3, 90, (3, 6))
    ours = served.generate(ids, max_new_tokens=60, llmopt={"kv_cache": {"page_size": 4}}, **KW)
    assert torch.equal(ours, served.generate(ids, max_new_tokens=60, **KW))


def test_memory_that_runs_out_fails_the_newest_call(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget in memory a call may outgrow it: it fails with what fits, and the next one is served."""
    from hf_llmopt.kv_cache import PagedStore

    monkeypatch.setattr("hf_llmopt.engine.budget.AHEAD", 8)
    monkeypatch.setattr(PagedStore, "limits", lambda self: [8 for _ in self.groups])
    served = model("llama")
    ids = torch.randint(3, 90, (2, 6))
    config = {"kv_cache": {"page_size": 4, "memory_fraction": 0.5}}
    with pytest.raises(errors.OutOfPages, match=r"memory_fraction=0.5.*What fits"):
        served.generate(ids, max_new_tokens=40, llmopt=config, **KW)
    assert served.llmopt.engine.store.pages_used == 0
    ours = served.generate(ids, max_new_tokens=8, llmopt=config, **KW)
    assert torch.equal(ours, served.generate(ids, max_new_tokens=8, **KW))


@pytest.mark.skipif("avx512" not in cpu.levels(), reason="needs longer vectors to be told from shorter ones")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_long_spans_are_torchs_where_vectors_are_short(level: str) -> None:
    """Prompts, prompts behind cached ones and decodes in one step, with a window too."""
    for name in ("llama", "gemma3_text"):
        served = build(name)
        prompts = [torch.randint(3, 100, (length,)).tolist() for length in (3, 60, 120)]
        expected = [stock(served, ids, 8) for ids in prompts]
        with cpu.using(level), Engine(served, {"batching": {"max_batch_tokens": 96}}) as engine:
            handles = [engine.submit(ids, max_new_tokens=8, **KW) for ids in prompts]
            assert [handle.result() for handle in handles] == expected
            paths = set().union(*(handle.stats.attention for handle in handles))
        assert ("flash" in paths) == (level == "avx512")
        assert "cpu" in paths
