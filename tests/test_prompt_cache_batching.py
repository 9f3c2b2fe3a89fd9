"""The prompt cache under continuous batching: requests that come, go and give way find one another's pages."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import pipeline

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig, PromptCacheConfig, demo, errors

KW = {"pad_token_id": 0, "eos_token_id": None}
BOTH = "prompt_cache,continuous_batching"


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cold(served):
    """The same model without what other tests left in its caches."""
    hf_llmopt.optimize(served, False).llmopt.release()
    return served


def stock(model, ids: list[int], **arguments) -> list[int]:
    return model.generate(torch.tensor([ids]), **{**KW, **arguments})[0, len(ids) :].tolist()


def config(max_tokens: int | None, **batching) -> dict:
    return {"kv_cache": {"page_size": 4, "max_tokens": max_tokens}, "prompt_cache": True, "batching": batching}


PLANS = st.lists(
    st.tuples(
        st.integers(0, 20),  # shared tokens
        st.integers(1, 6),  # tokens of its own
        st.integers(1, 10),  # new tokens
        st.sampled_from(["stays", "stays", "stays", "cancelled"]),
        st.integers(-1, 1),  # priority
        st.sampled_from("ab"),  # tenant and salt
    ),
    min_size=2,
    max_size=8,
)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plans=PLANS,
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    tokens=st.integers(1, 16),
    places=st.integers(1, 5),
    swaps=st.booleans(),
    host_bytes=st.sampled_from([0, 2**20]),
)
def test_found_and_preempted_is_single(
    model, name: str, plans, policy: str, tokens: int, places: int, swaps: bool, host_bytes: int
) -> None:
    """Over pools that hold hardly one of them: tokens stay stock's, every page and saved byte returns."""
    served = model(name)
    asked = config(48, policy=policy, max_batch_tokens=tokens, max_requests=places)
    asked["prompt_cache"] = {"host_bytes": host_bytes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: swaps)
        patch.setattr("hf_llmopt.prompt_cache.tree.compute_seconds", lambda *_: 1.0)  # so that the tier is used
        with Engine(served, asked) as engine:
            submitted = []
            for index, (shared, own, new, fate, priority, tenant) in enumerate(plans):
                ids = text(shared, 99) + text(own, index)
                wishes = {"priority": priority, "tenant": tenant, "salt": tenant}
                handle = engine.submit(ids, max_new_tokens=new, **KW, **wishes)
                if fate == "cancelled":
                    handle.cancel()
                else:
                    submitted.append((handle, ids, new))
            for handle, ids, new in submitted:
                assert handle.result(60) == stock(served, ids, max_new_tokens=new)
                assert handle.stats.cached_tokens < len(ids)
            assert engine.loop.store.pages_used == 0
            assert engine.loop.mover.swapped_bytes == 0
            for pool in engine.loop.scheduler.pools:
                assert pool.num_pages == pool.blank + len(pool.kept)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text", "deepseek_v2"])
@pytest.mark.parametrize("swaps", [True, False])
def test_preempted_requests_keep_their_keys(model, name: str, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found pages are saved, written back elsewhere, or found again; and what came of it can be found."""
    served = cold(model(name))
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: swaps)
    prompts = [text(13, 99) + text(5, seed) for seed in range(4)]
    with Engine(served, config(80)) as engine:
        engine.submit(text(13, 99), max_new_tokens=1, **KW).result(60)
        with engine.loop.lock:  # who came later might find less: pages of the ones before it make room
            handles = [engine.submit(ids, max_new_tokens=30, **KW) for ids in prompts]
        results = [handle.result(60) for handle in handles]
        assert results == [stock(served, ids, max_new_tokens=30) for ids in prompts]
        assert [handle.stats.cached_tokens for handle in handles] == [13] * 4
        preemptions = [handle.stats.preemptions for handle in handles]
        assert sum(preemptions) > 0
        assert [handle.stats.swaps for handle in handles] == [swaps * count for count in preemptions]
        assert engine.loop.mover.swapped_bytes == engine.loop.store.pages_used == 0
        last = prompts[-1] + results[-1]
        again = engine.submit(last, max_new_tokens=4, **KW)
        assert again.result(60) == stock(served, last, max_new_tokens=4)
        assert again.stats.cached_tokens == len(last) - 1


def test_shared_pages_count_once_for_who_may_start(model) -> None:
    """Three requests of 13 pages over 20: together they fit because 11 of those are the same."""
    served, shared = cold(model("llama")), text(44, 99)
    most = 0

    def watch(plan, began) -> None:
        nonlocal most
        most = max(most, len(engine.loop.scheduler.running))

    with Engine(served, config(80)) as engine:
        engine.submit(shared, max_new_tokens=1, **KW).result(60)
        engine.loop.on_step = watch
        with engine.loop.lock:  # no step until all are there
            handles = [engine.submit(shared + text(2, seed), max_new_tokens=6, **KW) for seed in range(3)]
        for seed, handle in enumerate(handles):
            assert handle.result(60) == stock(served, shared + text(2, seed), max_new_tokens=6)
            assert handle.stats.cached_tokens == 44
            assert not handle.stats.preemptions
    assert most == 3


def test_urgent_requests_find_too(model) -> None:
    """Who takes places and pages from others takes what was found into account, and gives back what it cannot use."""
    served, shared = cold(model("llama")), text(40, 99)
    with Engine(served, config(80, policy="priority", max_requests=2)) as engine:
        engine.submit(shared, max_new_tokens=1, **KW).result(60)
        with engine.loop.lock:  # they come together
            patient = [engine.submit(shared + text(3, seed), max_new_tokens=24, **KW) for seed in range(2)]
        for handle in patient:
            next(iter(handle))
        urgent = engine.submit(shared + text(3, 7), max_new_tokens=4, priority=1, **KW)
        assert urgent.result(60) == stock(served, shared + text(3, 7), max_new_tokens=4)
        assert urgent.stats.cached_tokens == 40
        for seed, handle in enumerate(patient):
            assert handle.result(60) == stock(served, shared + text(3, seed), max_new_tokens=24)
        assert sum(handle.stats.preemptions for handle in patient) > 0
        assert not urgent.stats.preemptions


def test_salts_separate_tenants(model) -> None:
    served, ids = cold(model("llama")), text(20)
    asked = {**config(None, policy="fair"), "prompt_cache": {"salt": "everybody"}}
    with Engine(served, asked) as engine:
        found = []
        for salt in ("a", "b", None, "a", "b", None):
            handle = engine.submit(ids, tenant=salt or "", salt=salt, max_new_tokens=4, **KW)
            assert handle.result(60) == stock(served, ids, max_new_tokens=4)
            found.append(handle.stats.cached_tokens)
        assert found == [0, 0, 0, 19, 19, 19]
        with pytest.raises(errors.InvalidRequest, match="salt is a string or None"):
            engine.submit(ids, salt=7, max_new_tokens=4, **KW)
    with Engine(served, "continuous_batching") as engine, pytest.raises(errors.InvalidOption, match="no prompt cache"):
        engine.submit(ids, salt="a", max_new_tokens=4, **KW)


def test_pools_grow_before_kept_pages_are_given_up(model) -> None:
    """Where memory is left, the pages that answers need are made, not taken from past prompts."""
    served = cold(model("llama"))
    with Engine(served, config(None)) as engine:
        for turn in range(2):
            for seed in range(8):
                handle = engine.submit(text(20, seed), max_new_tokens=30, **KW)
                handle.result(60)
                assert handle.stats.cached_tokens == turn * 19
        assert not served.llmopt.prompt_cache.evictions


def test_found_tokens_are_not_charged(model) -> None:
    """The policy "fair" counts what was computed for a tenant, not what it found."""
    with Engine(cold(model("llama")), config(None, policy="fair")) as engine:
        handles = []
        for _ in range(2):
            handles.append(engine.submit(text(40), tenant="a", max_new_tokens=2, **KW))
            handles[-1].result(60)
            before = engine.loop.scheduler.line._counters["a"]
        assert handles[1].stats.cached_tokens == 39
        assert before == (40 + 1) + (1 + 1)


def test_prompt_logprobs_with_a_warm_cache(model) -> None:
    """They need the logits of the whole prompt: nothing is found for such a request, but others find what it leaves."""
    served, ids = cold(model("llama")), text(30)
    truth = served(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
    with Engine(served, config(64, max_batch_tokens=7)) as engine:
        for _ in range(2):
            handle = engine.submit(ids, max_new_tokens=3, prompt_logprobs=2, **KW)
            assert handle.result(60) == stock(served, ids, max_new_tokens=3)
            assert handle.stats.cached_tokens == 0
            assert [entry.token for entry in handle.prompt_logprobs] == ids[1:]
            for place, entry in enumerate(handle.prompt_logprobs):
                assert entry.logprob == pytest.approx(float(truth[place, entry.token]), abs=1e-4)
            plain = engine.submit(ids, max_new_tokens=3, logprobs=1, **KW)
            plain.result(60)
            assert plain.stats.cached_tokens == 29
            assert plain.logprobs[0].logprob == pytest.approx(float(truth[-1].max()), abs=1e-4)


def test_sequences_of_a_found_prompt(model) -> None:
    served, ids = cold(model("llama")), text(33)
    with Engine(served, config(None)) as engine:
        found = []
        for _ in range(2):
            handle = engine.submit(ids, num_return_sequences=3, seed=7, max_new_tokens=9, do_sample=True, **KW)
            for index, choice in enumerate(handle.choices):
                torch.manual_seed(7 + index)
                assert choice.result(60) == stock(served, ids, max_new_tokens=9, do_sample=True)
            found.append([choice.stats.cached_tokens for choice in handle.choices])
        assert found == [[0, 32, 32], [32, 32, 32]]


@pytest.mark.parametrize("length", [5, 7, 10, 16, 17])
@pytest.mark.parametrize("overlap", [False, True])
def test_sequences_of_a_prompt_that_is_found_inside_a_page(model, length: int, overlap: bool) -> None:
    """The first sequence's page is a copy, which the others are copied from in the same step."""
    served, ids = cold(model("llama")), text(length)
    arguments = {"max_new_tokens": 12, "do_sample": True}
    with Engine(served, {"prompt_cache": True, "batching": {"overlap": overlap}}) as engine:
        engine.submit(ids, max_new_tokens=6, do_sample=False, **KW).result(60)
        handle = engine.submit(ids, seed=5, num_return_sequences=4, **arguments, **KW)
        for index, choice in enumerate(handle.choices):
            torch.manual_seed(5 + index)
            assert choice.result(60) == stock(served, ids, **arguments)
            assert choice.stats.cached_tokens == length - 1


def test_both_names_in_one_keyword() -> None:
    for value in (BOTH, ["prompt_cache", "continuous_batching"]):
        parsed = LLMOptConfig.parse(value)
        assert parsed.prompt_cache == PromptCacheConfig()
        assert parsed.batching.continuous
    assert LLMOptConfig.parse("continuous_batching").prompt_cache is None
    model, tokenizer = demo.load()
    shared = "import os, sys, re, json\n\n" * 4
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    complete = pipeline("text-generation", model=model, tokenizer=tokenizer, llmopt=BOTH)
    prompts, arguments = [shared + name for name in ("def", "class")], {"max_new_tokens": 6, "do_sample": False}
    found = []
    for turn in range(2):
        assert complete(prompts, salt="a", **arguments) == plain(prompts, llmopt=False, **arguments)
        figures = complete.engine.loop.prompts.figures()
        assert figures.requests == 2 * (turn + 1)
        found.append(figures.cached_tokens)
    assert found[1] - found[0] == sum(len(tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts)
    complete.close()
