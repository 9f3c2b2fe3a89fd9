"""Models that keep recurrent states beside keys: prompts are computed whole, and rows of states go on from there."""

import threading
from copy import deepcopy
from functools import cache

import pytest
import torch
from architectures import STATEFUL, build
from compare import SMALL_PAGES, assert_equal, assert_falls_through, counted_updates, prompts, served, stock
from transformers import DynamicCache

from hf_llmopt import Engine, LLMOptConfig, optimize
from hf_llmopt.errors import InvalidRequest, NotServed, RequestFailed, UnsupportedModel

NEW = 8
KW = {"max_new_tokens": NEW, "eos_token_id": 9999, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
CASES = {"one row": prompts(9), "left padded": prompts(4, 11, 7)}


@cache
def tiny(name: str):
    return build(name)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STATEFUL)
def test_equal(name, case, sampling):
    model, arguments = tiny(name), {**CASES[case], **KW, **LOGITS, **sampling}
    assert_equal(model, arguments, llmopt=SMALL_PAGES, own_caches=False)
    assert model.llmopt.stats.steps == NEW  # the first of them is the model's own


@pytest.mark.parametrize("name", STATEFUL)
def test_keys_of_new_tokens_go_to_pages_only(name):
    """The prompt's go through a cache of transformers' own, once a layer; how many tokens follow does not matter."""
    model = tiny(name)
    counts = []
    for new in (2, 12):
        with counted_updates() as updates:
            model.generate(**CASES["left padded"], **{**KW, "max_new_tokens": new}, llmopt=SMALL_PAGES)
        assert model.llmopt.stats.served_by == "llmopt"
        counts.append(len(updates))
    assert counts[1] <= sum(spec.stores for spec in model.llmopt.engine.store.layers)


def test_rows_that_end_leave_the_others_states_alone():
    """Two of three rows end early, at different steps: the states of the third move to another place."""
    model, case = tiny("qwen3_next"), CASES["left padded"]
    new = stock(model, **case, **KW)[:, 11:]
    ends = {**KW, "eos_token_id": [int(new[0, 2]), int(new[2, 4])], "max_new_tokens": 12}
    assert_equal(model, {**case, **ends}, llmopt=SMALL_PAGES, own_caches=False)
    assert_equal(model, {**case, **ends, **SAMPLED}, llmopt=SMALL_PAGES, own_caches=False)


def test_return_sequences():
    model = tiny("falcon_h1")
    assert_equal(model, {**prompts(9), **KW, **SAMPLED, "num_return_sequences": 3}, own_caches=False)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_the_returned_cache_is_what_stock_leaves(name):
    """Keys and states: a forward pass of anybody's goes on from it."""
    model, case = tiny(name), prompts(9)
    theirs = stock(model, **case, **KW, return_dict_in_generate=True)
    ours = served(model, llmopt=SMALL_PAGES, own_caches=False, **case, **KW, return_dict_in_generate=True)
    assert type(ours.past_key_values) is DynamicCache
    token = theirs.sequences[:, -1:]
    with torch.no_grad():
        expected, got = (model(token, past_key_values=out.past_key_values).logits for out in (theirs, ours))
    assert torch.allclose(expected, got, atol=1e-4)


def test_requests_come_and_go():
    """Submitted one behind the other, of different lengths: each has the tokens it has alone."""
    model = tiny("qwen3_next")
    given = [prompts(length, seed=length)["input_ids"] for length in (9, 4, 13, 6)]
    lengths = [3, 12, 6, 9]
    expected = [
        stock(model, input_ids=ids, attention_mask=torch.ones_like(ids), **{**KW, "max_new_tokens": new})[
            0, ids.shape[1] :
        ]
        for ids, new in zip(given, lengths, strict=True)
    ]
    with Engine(model, llmopt=LLMOptConfig(batching={"max_requests": 3})) as engine:
        handles = []
        for ids, new in zip(given, lengths, strict=True):
            handles.append(engine.submit(ids, **{**KW, "max_new_tokens": new}))
        assert [handle.result() for handle in handles] == [tokens.tolist() for tokens in expected]
        with pytest.raises(InvalidRequest, match="computes this prompt whole"):
            engine.submit(given[0], **KW, prompt_logprobs=1).result()


@pytest.mark.parametrize(
    "config", [{"kv_cache": {"page_size": 4, "max_tokens": 44}}, {"batching": {"max_requests": 2}}]
)
def test_who_finds_no_room_waits(config):
    """For pages that others hold, or for a place: nobody fails who would fit later."""
    model, most = tiny("lfm2"), []
    cases = [prompts(length, seed=length) for length in (5, 20, 9, 3)]
    expected = [stock(model, **case, **KW)[0, -NEW:].tolist() for case in cases]
    with Engine(model, llmopt=config) as engine:
        engine.loop.on_step = lambda plan, began: most.append(len(engine.loop.scheduler.running))
        with engine.loop.lock:  # so that all of them come at once
            handles = [engine.submit(**case, **KW) for case in cases]
        assert [handle.result(60) for handle in handles] == expected
    assert max(most) == 2


def test_a_failed_pass_fails_all_it_ran():
    """Some states may have been written to, so that nobody can go on; the next call can."""
    model, steps = build("qwen3_next"), []

    def fails(_, inputs):
        if inputs[0].shape[:2] == (3, 1):  # a step of three rows
            steps.append(1)
            if len(steps) == 4:
                raise RuntimeError("broken")

    assert_equal(model, {**CASES["one row"], **KW}, own_caches=False)
    hook = model.model.layers[-1].register_forward_pre_hook(fails)
    try:
        with pytest.raises(RequestFailed, match="broken"):
            model.generate(**CASES["left padded"], **KW, llmopt="kv_cache")
    finally:
        hook.remove()
    assert_equal(model, {**CASES["left padded"], **KW}, own_caches=False)


def test_threads():
    """Two calls at once share passes, and keep their states apart."""
    model, results = tiny("lfm2"), {}
    cases = {seed: prompts(7, 10, seed=seed) for seed in (1, 2)}
    expected = {seed: stock(model, **case, **KW).tolist() for seed, case in cases.items()}

    def run(seed):
        results[seed] = model.generate(**cases[seed], **KW, llmopt=SMALL_PAGES).tolist()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == expected


def test_nothing_is_found_or_guessed():
    """A state holds all of a text or nothing: no part of it is shared, and none is taken back."""
    model, case = tiny("qwen3_next"), prompts(20)
    for _ in range(2):
        assert_equal(model, {**case, **KW}, llmopt=["prompt_cache", "speculative"], own_caches=False)
    stats = model.llmopt.stats
    assert (stats.cached_tokens, stats.drafted_tokens) == (0, 0)
    assert "cannot take back" in stats.undrafted
    with pytest.raises(NotServed, match="no part of a prompt"):
        optimize(model).llmopt.cache_prompt([5, 6, 7])
    optimize(model, False)


def test_what_is_not_served():
    model = tiny("qwen3_next")
    assert_falls_through(model, {**prompts(4, 9, 7, pad="right"), **KW}, "pad on the left")
    with pytest.raises(UnsupportedModel, match="eviction"):
        model.generate(**prompts(9), **KW, llmopt={"kv_cache": {"eviction": "sink"}})
    assert_falls_through(
        model,
        lambda: {**prompts(9), **KW, "past_key_values": DynamicCache(config=model.config)},
        "recurrent states",
    )
    first = stock(model, **prompts(9), **KW, return_dict_in_generate=True)
    ids, cache = first.sequences, first.past_key_values
    assert_falls_through(
        model, lambda: {"input_ids": ids, **KW, "past_key_values": deepcopy(cache)}, "recurrent states"
    )


def test_the_next_pass_may_begin_before_the_tokens_are_known():
    """As on a GPU: a pass in vain writes to the states of rows that have ended, and to no others."""
    model, case = tiny("qwen3_next"), CASES["left padded"]
    new = stock(model, **case, **KW)[:, 11:]
    ends = {**KW, "eos_token_id": [int(new[0, 2]), int(new[2, 4])], "max_new_tokens": 12}
    config = LLMOptConfig(kv_cache={"page_size": 4}, batching={"overlap": True})
    assert_equal(model, {**case, **ends}, llmopt=config, own_caches=False)
    assert_equal(model, {**case, **ends, **SAMPLED}, llmopt=config, own_caches=False)
    ids = prompts(9)["input_ids"]
    expected = stock(model, input_ids=ids, attention_mask=torch.ones_like(ids), **KW)[0, 9:].tolist()
    with Engine(model, llmopt=config) as engine:
        handles = [engine.submit(ids, **{**KW, "max_new_tokens": tokens}) for tokens in (3, NEW)]
        assert [handle.result() for handle in handles] == [expected[:3], expected]
