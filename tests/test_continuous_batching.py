"""What a submitted request may ask for, and what happens to it among others."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList, TextStreamer

from hf_llmopt import Engine, errors
from hf_llmopt.engine import EngineLoop
from hf_llmopt.engine.request import UNKNOWN
from hf_llmopt.engine.runner import Runner
from hf_llmopt.kernels import cpu
from hf_llmopt.kv_cache import Clock, Download

KW = {"pad_token_id": 0, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
TINY_POOL = {"page_size": 4, "max_tokens": 60}


def stock(model, ids: list[int], seed: int = 0, **arguments) -> list[int]:
    torch.manual_seed(seed)
    return model.generate(torch.tensor([ids]), **{**KW, **arguments})[0, len(ids) :].tolist()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_pages(loop: EngineLoop) -> None:
    """Every page is free or held by a table of a request that runs, as often as its references say."""
    for index, pool in enumerate(loop.scheduler.pools):
        held: dict[int, int] = {}
        for request in loop.scheduler.running:
            for page in request.tables[index].pages:
                if page:
                    held[page] = held.get(page, 0) + 1
        assert {page: pool.refs(page) for page in held} == held
        assert pool.used == len(held)
        assert pool.free + pool.used == pool.num_pages


# -- equality under traffic -------------------------------------------------------------------------------------------


PLANS = st.lists(
    st.tuples(
        st.integers(1, 20),  # tokens of the prompt
        st.integers(1, 10),  # new tokens
        st.booleans(),  # sampled
        st.sampled_from(["stays", "stays", "stays", "cancelled", "cancelled later", "expires"]),
        st.integers(-1, 1),
        st.sampled_from("ab"),
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plans=PLANS,
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    tokens=st.integers(1, 16),
    places=st.integers(1, 5),
    swap_bytes=st.sampled_from([0, 2**30]),
    overlap=st.booleans(),
)
def test_batched_is_single(
    model, name: str, plans, policy: str, tokens: int, places: int, swap_bytes: int, overlap: bool
) -> None:
    """Whoever else comes, goes, or takes its pages: a request gives the tokens that stock gives it alone."""
    served = model(name)
    batching = {"policy": policy, "max_batch_tokens": tokens, "max_requests": places, "swap_bytes": swap_bytes}
    batching["overlap"] = overlap
    config = {"kv_cache": TINY_POOL, "batching": batching}
    with pytest.MonkeyPatch.context() as patch, Engine(served, config) as engine:
        settle, steps = EngineLoop._settle, []

        def checking(self, spans) -> None:
            settle(self, spans)
            check_pages(self)
            steps.append(len(spans))

        patch.setattr(EngineLoop, "_settle", checking)
        submitted = []
        for index, (length, new, sampled, fate, priority, tenant) in enumerate(plans):
            arguments = {"max_new_tokens": new, **(SAMPLED if sampled else {"do_sample": False})}
            deadline = 0.0 if fate == "expires" else None
            wishes = {"seed": index, "priority": priority, "tenant": tenant, "deadline": deadline}
            handle = engine.submit(prompt(length, index), **KW, **arguments, **wishes)
            if fate == "cancelled":
                handle.cancel()
            submitted.append((handle, prompt(length, index), index, arguments, fate))
        for handle, *_, fate in submitted:
            if fate == "cancelled later":
                handle.cancel()
        for handle, ids, seed, arguments, fate in submitted:
            if fate == "stays":
                assert handle.result(60) == stock(served, ids, seed, **arguments)
                assert handle.stats.served_by == "llmopt"
                assert handle.stats.attention
                continue
            try:
                assert handle.result(60) == stock(served, ids, seed, **arguments)
            except (errors.RequestCancelled, errors.DeadlineExceeded):
                assert fate != "stays"
        assert engine.loop.store.pages_used == 0
        assert engine.loop.mover.swapped_bytes == 0
        assert not engine.loop.groups
        assert not engine.waiting


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text", "deepseek_v2"])
@pytest.mark.parametrize("swaps", [True, False])
def test_preempted_by_either_way(model, name: str, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that were saved and written back are the keys that would be computed again."""
    served = model(name)
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: swaps)
    prompts = [prompt(10, seed) for seed in range(4)]
    with Engine(served, {"kv_cache": {"page_size": 4, "max_tokens": 80}}) as engine:
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, max_new_tokens=30, **KW) for ids in prompts]
        assert [handle.result(60) for handle in handles] == [stock(served, ids, max_new_tokens=30) for ids in prompts]
        assert sum(handle.stats.preemptions for handle in handles) > 0
        assert sum(handle.stats.swaps for handle in handles) == swaps * sum(h.stats.preemptions for h in handles)
        assert engine.loop.mover.swapped_bytes == 0


def test_the_cheaper_way_is_taken() -> None:
    from hf_llmopt.engine.mover import Costs

    costs = Costs()
    costs.computed(10, 1.0)
    assert costs.favour_copy(10, 1000), "what was never measured is tried"
    costs.copied(1000, 0.1)
    assert costs.favour_copy(10, 1000)
    assert not costs.favour_copy(1, 1000)
    costs.computed(1000, 1.0)
    assert not costs.favour_copy(10, 1000)


def test_host_memory_for_swaps_is_bounded(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: True)
    prompts = [prompt(10, seed) for seed in range(4)]
    config = {"kv_cache": {"page_size": 4, "max_tokens": 80}, "batching": {"swap_bytes": 100}}
    with Engine(model("llama"), config) as engine:
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, max_new_tokens=30, **KW) for ids in prompts]
        for handle in handles:
            handle.result(60)
        assert sum(handle.stats.preemptions for handle in handles) > 0
        assert not any(handle.stats.swaps for handle in handles)


# -- what a request may ask for ---------------------------------------------------------------------------------------


class Keeps(LogitsProcessor):
    """Somebody's own: adds to the scores of even ids, and notes what it was shown."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores + (torch.arange(scores.shape[1]) % 2 == 0)


CASES = [
    {},
    SAMPLED,
    {"do_sample": True, "top_k": 0, "top_p": 0.7},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 0, "min_p": 0.1},
    {"do_sample": True, "temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.6},
    {"sequence_bias": {(7,): 3.0, (9,): -5.0}},
    {"sequence_bias": {(7, 8): 9.0, (9,): -5.0}, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, **SAMPLED},
    {"typical_p": 0.8, **SAMPLED},
    {"min_new_tokens": 4, "eos_token_id": list(range(3, 60))},
    {"eos_token_id": list(range(3, 40))},
    {"bad_words_ids": [[5], [7, 9]], "repetition_penalty": 1.1, **SAMPLED},
]


def test_rows_of_all_kinds_in_one_batch(model) -> None:
    """Each with its own arguments, all in the same steps: everybody gets stock's tokens."""
    served = model("llama")
    prompts = [prompt(3 + 5 * index % 17, index) for index in range(len(CASES))]
    expected = [stock(served, prompts[index], index, max_new_tokens=12, **case) for index, case in enumerate(CASES)]
    with Engine(served) as engine:
        handles = [
            engine.submit(ids, seed=index, max_new_tokens=12, **{**KW, **case})
            for index, (ids, case) in enumerate(zip(prompts, CASES, strict=True))
        ]
        assert [handle.result(60) for handle in handles] == expected


@pytest.mark.parametrize("case", CASES[1:6], ids=str)
def test_a_seed_gives_the_same_tokens_in_any_company(model, case) -> None:
    served = model("qwen3")
    with Engine(served) as engine:
        alone = engine.submit(prompt(9), seed=5, max_new_tokens=20, **KW, **case).result(60)
        company = [
            engine.submit(prompt(4 + index, index), max_new_tokens=20, **{**KW, **other})
            for index, other in enumerate(CASES)
        ]
        assert engine.submit(prompt(9), seed=5, max_new_tokens=20, **KW, **case).result(60) == alone
        for handle in company:
            handle.cancel()


def test_only_rows_with_processors_of_their_own_call_them(model, monkeypatch: pytest.MonkeyPatch) -> None:
    served, keeps, calls = model("llama"), Keeps(), []
    from hf_llmopt.generation import choice as module

    called = module._call_processors
    monkeypatch.setattr(module, "_call_processors", lambda row, own: (calls.append(row), called(row, own))[1])
    ids = prompt(6)
    with Engine(served) as engine:
        others = [engine.submit(prompt(5, i), max_new_tokens=8, seed=i, **KW, **SAMPLED) for i in range(5)]
        ours = engine.submit(ids, max_new_tokens=8, logits_processor=[keeps], **KW)
        assert ours.result(60) == stock(served, ids, max_new_tokens=8, logits_processor=[Keeps()])
        for handle in others:
            handle.result(60)
    assert len(calls) == 8
    assert len(set(calls)) == 1
    assert keeps.seen[3] == [ids + ours.result()[:3]], "the true history, without padding"


def test_sequences_of_one_request(model) -> None:
    """Sequence i is what seed + i gives, and the prompt is computed once."""
    served, ids = model("llama"), prompt(33)
    with Engine(served, {"kv_cache": {"page_size": 4}}) as engine:
        handle = engine.submit(ids, num_return_sequences=4, seed=7, max_new_tokens=9, **KW, **SAMPLED)
        results = [choice.result(60) for choice in handle.choices]
        assert handle.done
        assert handle.error is None
        for ask in ("result", "sequence"):
            with pytest.raises(errors.InvalidRequest, match=r"has 4 sequences .*handle\.choices"):
                getattr(handle, ask)()
        for ask in ("stats", "logprobs", "prompt_logprobs", "pad"):
            with pytest.raises(errors.InvalidRequest, match="4 sequences"):
                getattr(handle, ask)
        with pytest.raises(errors.InvalidRequest, match="4 sequences"):
            list(handle)
        with pytest.raises(errors.InvalidRequest, match="4 sequences"):
            handle.__await__().send(None)
        assert results == [stock(served, ids, 7 + index, max_new_tokens=9, **SAMPLED) for index in range(4)]
        assert [choice.stats.cached_tokens for choice in handle.choices] == [0, 32, 32, 32]
        assert engine.loop.store.pages_used == 0


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "mistral"])
def test_sequences_of_models_with_windows(model, name: str) -> None:
    served, ids = model(name), prompt(21)
    batching = {"max_batch_tokens": 6, "max_requests": 2}
    with Engine(served, {"kv_cache": {"page_size": 4}, "batching": batching}) as engine:
        handle = engine.submit(ids, num_return_sequences=4, seed=7, max_new_tokens=15, **KW, **SAMPLED)
        results = [choice.result(60) for choice in handle.choices]
        assert results == [stock(served, ids, 7 + index, max_new_tokens=15, **SAMPLED) for index in range(4)]


def test_a_cancelled_first_sequence_takes_nobody_with_it(model) -> None:
    served, ids = model("llama"), prompt(40)
    with Engine(served, {"batching": {"max_batch_tokens": 4}}) as engine:
        handle = engine.submit(ids, num_return_sequences=3, seed=1, max_new_tokens=5, **KW, **SAMPLED)
        handle.choices[0].cancel()
        results = [choice.result(60) for choice in handle.choices[1:]]
        assert results == [stock(served, ids, 1 + index, max_new_tokens=5, **SAMPLED) for index in (1, 2)]
        assert isinstance(handle.error, errors.RequestCancelled)


def test_cancelling_a_request_ends_all_of_its_sequences(model) -> None:
    with Engine(model("llama"), "continuous_batching") as engine:
        handle = engine.submit(prompt(40), num_return_sequences=3, max_new_tokens=500, **KW, **SAMPLED)
        handle.cancel()
        assert handle.done
        assert all(isinstance(choice.error, errors.RequestCancelled) for choice in handle.choices)


def test_figures_say_whether_they_are_final(model) -> None:
    """Of a running request they are those so far, of a cancelled one those until then."""
    with Engine(model("llama"), "continuous_batching") as engine:
        handle = engine.submit(prompt(20), max_new_tokens=400, **KW)
        tokens = iter(handle)
        for _ in range(3):
            next(tokens)
        running = replace(handle.stats)
        assert running.unfinished
        assert running.generated_tokens >= 3
        assert running.seconds > running.time_to_first_token > 0
        assert running.attention
        assert str(running).startswith("served by llmopt, unfinished: ")
        handle.cancel()
        cancelled = replace(handle.stats)
        assert cancelled.unfinished
        assert running.seconds < cancelled.seconds
        assert handle.stats == cancelled
        whole = engine.submit(prompt(20), max_new_tokens=3, **KW)
        whole.result(60)
        assert not whole.stats.unfinished
        assert "unfinished" not in str(whole.stats)


@pytest.mark.parametrize("rows", [1, 2])
def test_figures_of_a_failed_call(model, rows: int) -> None:
    served, calls = model("llama"), []

    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        if len(calls) == 3:
            raise ValueError("enough")
        return scores

    ids = torch.tensor([prompt(9)] * rows)
    with pytest.raises(errors.CallbackFailed):
        served.generate(ids, max_new_tokens=9, logits_processor=[breaks], llmopt=True, **KW)
    stats = served.llmopt.stats
    assert stats.unfinished
    assert stats.generated_tokens == 2 * rows
    assert stats.seconds > 0


def test_logprobs(model) -> None:
    """Of new tokens and of the prompt, against a plain forward pass over everything."""
    served, ids = model("llama"), prompt(30)
    with Engine(served, {"kv_cache": {"page_size": 4}, "batching": {"max_batch_tokens": 7}}) as engine:
        other = engine.submit(prompt(12, 3), max_new_tokens=20, **KW)
        handle = engine.submit(ids, max_new_tokens=6, logprobs=3, prompt_logprobs=2, repetition_penalty=1.8, **KW)
        tokens = handle.result(60)
        other.result(60)
    everything = ids + tokens
    truth = served(torch.tensor([everything])).logits[0].detach().float().log_softmax(-1)
    reported = handle.prompt_logprobs + handle.logprobs
    assert [entry.token for entry in reported] == everything[1:]
    for place, entry in enumerate(reported):
        count = 2 if place < len(ids) - 1 else 3
        best = truth[place].topk(count)
        assert entry.logprob == pytest.approx(float(truth[place, entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_of_a_preempted_prompt_come_once(model) -> None:
    served = model("llama")
    prompts = [prompt(17, seed) for seed in range(3)]
    config = {"kv_cache": {"page_size": 4, "max_tokens": 48}, "batching": {"max_batch_tokens": 5, "swap_bytes": 0}}
    with Engine(served, config) as engine:
        handles = [engine.submit(ids, max_new_tokens=14, logprobs=0, prompt_logprobs=0, **KW) for ids in prompts]
        for ids, handle in zip(prompts, handles, strict=True):
            tokens = handle.result(60)
            entries = handle.prompt_logprobs + handle.logprobs
            assert [entry.token for entry in entries] == [*ids[1:], *tokens]
            assert all(entry.top == () for entry in entries)


def test_penalties_and_bias(model) -> None:
    """As the API that they come from defines them, from the logits of plain forward passes."""
    served, ids = model("llama"), prompt(9)
    bias = {5: 4.0, 11: -100.0}
    expected: list[int] = []
    for _ in range(12):
        scores = served(torch.tensor([ids + expected])).logits[0, -1].detach().float()
        for token, value in bias.items():
            scores[token] += value
        for token in set(expected):
            scores[token] -= 0.7 * expected.count(token) + 0.4
        expected.append(int(scores.argmax()))
    with Engine(served) as engine:
        other = engine.submit(ids, max_new_tokens=12, **KW)
        ours = engine.submit(ids, max_new_tokens=12, logit_bias=bias, frequency_penalty=0.7, presence_penalty=0.4, **KW)
        assert ours.result(60) == expected
        assert other.result(60) == stock(served, ids, max_new_tokens=12) != expected


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"priority": 101}, "at most 100"),
        ({"priority": 1.5}, "an int"),
        ({"seed": "x"}, "an int or None"),
        ({"tenant": 3}, "a string"),
        ({"deadline": -1}, "at least 0"),
        ({"logprobs": True}, "an int or None"),
        ({"logit_bias": {4096: 1.0}}, "ids are below 112"),
        ({"presence_penalty": "much"}, "a number"),
        ({"num_return_sequences": 2, "do_sample": True, "logits_processor": [Keeps()]}, "Keeps"),
    ],
    ids=str,
)
def test_wishes_that_cannot_be_met(model, wish, says: str) -> None:
    with Engine(model("llama")) as engine, pytest.raises(errors.InvalidRequest, match=says):
        engine.submit([5, 6, 7], max_new_tokens=4, **KW, **wish)


def test_deadline(model) -> None:
    with Engine(model("llama")) as engine:
        late = engine.submit(prompt(5), max_new_tokens=10**6, deadline=0.3, **KW)
        soon = engine.submit(prompt(5), max_new_tokens=4, deadline=60, **KW)
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s passed after \d+ new tokens"):
            late.result(60)
        assert time.monotonic() - began < 5
        assert len(soon.result(60)) == 4
        with pytest.raises(TimeoutError):  # what Python code that waits expects
            list(late)
        assert engine.loop.store.pages_used == 0


def test_a_full_line_refuses(model) -> None:
    with Engine(model("llama"), {"batching": {"max_requests": 1, "max_waiting": 3}}) as engine:
        running = engine.submit(prompt(4), max_new_tokens=10**6, **KW)
        next(iter(running))  # it has left the line
        waiting = [engine.submit(prompt(4), max_new_tokens=2, **KW) for _ in range(3)]
        with pytest.raises(errors.EngineFull, match=r"3 requests wait.*max_waiting=3"):
            engine.submit(prompt(4), max_new_tokens=2, **KW)
        running.cancel()
        assert [len(handle.result(60)) for handle in waiting] == [2, 2, 2]
        assert len(engine.submit(prompt(4), max_new_tokens=2, **KW).result(60)) == 2


# -- asyncio ----------------------------------------------------------------------------------------------------------


def test_many_async_readers_need_no_threads(model) -> None:
    served = model("llama")
    prompts = [prompt(4 + index % 7, index) for index in range(60)]

    async def read(handle) -> list[int]:
        return [token async for token in handle]

    async def main(engine: Engine) -> tuple[list[list[int]], list[list[int]], int]:
        handles = [engine.submit(ids, max_new_tokens=8, **KW) for ids in prompts]
        readers = asyncio.gather(*map(read, handles))
        await asyncio.sleep(0)
        threads = threading.active_count()
        read_tokens = await readers
        return read_tokens, [await handle for handle in handles], threads

    with Engine(served) as engine:
        before = threading.active_count()
        tokens, results, threads = asyncio.run(main(engine))
    assert tokens == results == [stock(served, ids, max_new_tokens=8) for ids in prompts]
    assert threads <= before + 1, "the engine's"


def test_async_errors_and_cancelled_tasks(model) -> None:
    async def main(engine: Engine) -> None:
        handle = engine.submit(prompt(5), max_new_tokens=10**6, **KW)

        async def read() -> None:
            async for _ in handle:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not handle.done, "who stops reading does not stop the request"
        waiting = asyncio.ensure_future(read())
        await asyncio.sleep(0.05)
        handle.cancel()
        with pytest.raises(errors.RequestCancelled):
            await waiting
        with pytest.raises(errors.RequestCancelled):
            await handle

    with Engine(model("llama")) as engine:
        asyncio.run(main(engine))


def test_submit_does_not_wait_for_a_step(model) -> None:
    """An event loop must not stand still for a forward pass: submit takes no lock that is held for one."""
    with Engine(model("llama")) as engine:
        engine.submit(prompt(4), max_new_tokens=1, **KW).result(60)
        done = []
        with engine.loop.lock:  # as during a step
            thread = threading.Thread(
                target=lambda: done.append(engine.submit(prompt(4), max_new_tokens=2, **KW)), daemon=True
            )
            thread.start()
            thread.join(20)
            assert done
        assert len(done[0].result(60)) == 2


# -- the faults of transformers' own continuous batching --------------------------------------------------------------


def test_an_over_long_prompt_harms_nobody(model) -> None:
    served = model("llama")
    with Engine(served, {"kv_cache": {"page_size": 16, "max_tokens": 128}}) as engine:
        before = engine.submit(prompt(20), max_new_tokens=30, **KW)
        with pytest.raises(errors.OutOfPages, match="What fits"):
            engine.submit(prompt(200), max_new_tokens=8, **KW)
        after = engine.submit(prompt(20, 1), max_new_tokens=8, **KW)
        assert before.result(60) == stock(served, prompt(20), max_new_tokens=30)
        assert after.result(60) == stock(served, prompt(20, 1), max_new_tokens=8)


def test_no_stale_keys_after_a_weight_update() -> None:
    served, ids = build("llama"), prompt(40)
    with Engine(served, {"kv_cache": {"page_size": 4}}) as engine:
        first = engine.submit(ids, max_new_tokens=8, **KW).result(60)
        with torch.no_grad():
            for parameter in served.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        second = engine.submit(ids, max_new_tokens=8, **KW).result(60)
        assert second == stock(served, ids, max_new_tokens=8)
        assert second != first
    with Engine(served, {"kv_cache": {"page_size": 4}}) as engine:  # another session on the same pages
        assert engine.submit(ids, max_new_tokens=8, **KW).result(60) == second


@pytest.mark.parametrize("overlap", [False, True])
def test_cancel_between_the_pass_and_the_choice(model, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request goes while its token is being chosen, a page of it just filled."""
    served = model("llama")
    from hf_llmopt.batching import turns as module

    choose, cancelled = module.choose, []

    def cancelling(rows, logits):
        if len(rows) == 2 and not cancelled:
            cancelled.append(True)
            handles[0].cancel()
        return choose(rows, logits)

    monkeypatch.setattr(module, "choose", cancelling)
    with Engine(served, {"kv_cache": {"page_size": 4}, "batching": {"overlap": overlap}}) as engine:
        with engine.loop.lock:
            handles = [engine.submit(prompt(8, seed), max_new_tokens=30, **KW) for seed in range(2)]
        with pytest.raises(errors.RequestCancelled):
            handles[0].result(60)
        assert handles[1].result(60) == stock(served, prompt(8, 1), max_new_tokens=30)
        assert cancelled
        assert engine.loop.store.pages_used == 0


def test_a_streamer_serves_one_request_at_a_time(model) -> None:
    streamer = TextStreamer(SimpleNamespace(decode=lambda tokens: ""))
    with Engine(model("llama")) as engine, engine.loop.lock:
        engine.submit(prompt(8), max_new_tokens=3, streamer=streamer, **KW)
        with pytest.raises(errors.InvalidRequest, match="another live request"):
            engine.submit(prompt(8), max_new_tokens=3, streamer=streamer, **KW)


def test_masked_rows_and_rows_that_end_early() -> None:
    """generate(llmopt="continuous_batching") is generate: masks count, rows may differ in length, dicts return."""
    served = build("llama")
    ids = torch.tensor([[0, 0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    plain = served.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, eos_token_id=None)
    for eos in (None, int(plain[0, -6])):
        arguments = dict(attention_mask=mask, max_new_tokens=12, pad_token_id=0, eos_token_id=eos)
        arguments |= dict(return_dict_in_generate=True, output_scores=True)
        expected = served.generate(ids, **arguments)
        ours = served.generate(ids, llmopt="continuous_batching", **arguments)
        assert served.llmopt.stats.served_by == "llmopt"
        assert torch.equal(ours.sequences, expected.sequences)
        assert len(ours.scores) == len(expected.scores)


# -- overlap: a step is launched before the tokens of the last one are read --------------------------------------------


OVERLAP = {"kv_cache": {"page_size": 4}, "batching": {"overlap": True}}
WAYS = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalized": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "stop": {"min_new_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_overlap_reads_tokens_late_and_gives_the_same(model, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass but the first is launched with a token that the host has not read."""
    served, unread, passes = model("llama"), 0, []
    run, read, init = Runner.run, Download.read, Download.__init__

    def counting_init(self, tensor) -> None:
        nonlocal unread
        unread += 1
        init(self, tensor)

    def counting_read(self) -> list[int]:
        nonlocal unread
        unread -= 1
        return read(self)

    def counting_run(self, spans, note):
        passes.append(unread)
        assert all((request.tokens[-1] == UNKNOWN) == (request.pending is not None) for request, _ in spans)
        return run(self, spans, note)

    expected = stock(served, prompt(9), seed=3, max_new_tokens=14, **WAYS[way])
    with Engine(served, OVERLAP) as engine:
        monkeypatch.setattr(Download, "__init__", counting_init)
        monkeypatch.setattr(Download, "read", counting_read)
        monkeypatch.setattr(Runner, "run", counting_run)
        handle = engine.submit(prompt(9), max_new_tokens=14, seed=3, logprobs=2, **WAYS[way], **KW)
        assert handle.result(60) == expected
        assert [entry.token for entry in handle.logprobs] == expected
        assert handle.stats.steps == len(expected) == len(passes)
    assert passes == [0] + [1] * (len(expected) - 1)
    assert unread == 0


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text"])
def test_overlap_notices_an_end_late_and_leaves_no_trace(model, name: str) -> None:
    served, ids = model(name), prompt(10)
    eos = stock(served, ids, max_new_tokens=12)[6]
    arguments = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": eos}
    expected = stock(served, ids, **arguments)
    assert len(expected) < 30
    with Engine(served, {**OVERLAP, "prompt_cache": True}) as engine:
        neighbour = engine.submit(prompt(12, 1), max_new_tokens=40, **KW)
        for found in (0, 9, 9):
            handle = engine.submit(ids, **arguments)
            assert handle.result(60) == expected
            assert handle.stats.generated_tokens == len(expected)
            assert handle.stats.cached_tokens == found
        chat = ids + expected + prompt(3, 2)
        follow = engine.submit(chat, max_new_tokens=5, **KW)
        assert follow.result(60) == stock(served, chat, max_new_tokens=5)
        assert follow.stats.cached_tokens == len(ids) + len(expected) - 1  # the last token's key was nobody's wish
        assert neighbour.result(60) == stock(served, prompt(12, 1), max_new_tokens=40)
        assert engine.loop.store.pages_used == 0


def test_the_step_behind_an_end_counts_for_nothing(model) -> None:
    served, ids = model("llama"), prompt(10)
    eos = stock(served, ids, max_new_tokens=12)[6]
    arguments = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": eos}
    steps, pages = [], []
    for overlap in (False, True):
        with Engine(served, {"kv_cache": {"page_size": 4}, "batching": {"overlap": overlap}}) as engine:
            handle = engine.submit(ids, **arguments)
            assert len(ids) + len(handle.result(60)) - 1 == 16  # EOS, whose key nobody needs, would begin a page
            steps.append(handle.stats.steps)
            pages.append(handle.stats.pages)
    assert steps == [7, 7]
    assert pages == [4, 4]


def test_a_forward_that_raises_behind_an_end(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has ended by then, only nobody has read its last token; one that goes on fails."""
    served, ids = build("llama"), prompt(10)
    eos = stock(served, ids, max_new_tokens=12)[6]
    arguments = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": eos}
    expected, run, raised = stock(served, ids, **arguments), Runner.run, []

    def breaking(self, spans, note):
        if any(len(request.tokens) == len(ids) + len(expected) for request, _ in spans):
            raised.append(True)
            raise RuntimeError("the device fell over")
        return run(self, spans, note)

    with Engine(served, OVERLAP) as engine:
        monkeypatch.setattr(Runner, "run", breaking)
        assert engine.submit(ids, **arguments).result(60) == expected
        assert raised
        goes_on = engine.submit(ids, max_new_tokens=30, **KW)
        with pytest.raises(errors.RequestFailed, match="fell over"):
            goes_on.result(60)
        assert engine.loop.store.pages_used == 0
        assert engine.submit(prompt(3), max_new_tokens=5, **KW).result(60) == stock(served, prompt(3), max_new_tokens=5)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_cancelled_request_has_a_log_probability_per_token(model, overlap: bool, monkeypatch) -> None:
    from hf_llmopt.batching import turns as module

    choose, calls = module.choose, []

    def cancelling(rows, logits):
        chosen = choose(rows, logits)
        calls.append(True)
        if len(calls) == 4:
            handle.cancel()
        return chosen

    monkeypatch.setattr(module, "choose", cancelling)
    with Engine(model("llama"), {"batching": {"overlap": overlap}}) as engine:
        with engine.loop.lock:
            handle = engine.submit(prompt(8), max_new_tokens=30, logprobs=1, **KW)
        with pytest.raises(errors.RequestCancelled):
            handle.result(60)
        tokens = handle._row.tokens
        assert [entry.token for entry in handle.logprobs] == tokens
        assert len(tokens) == 3


def test_overlap_and_nan(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose scores are NaN takes part in one step more; it fails alone, and its pages are nobody's trouble."""
    served = build("llama")
    run, calls = Runner.run, []

    def breaking(self, spans, note):
        results, clocks = run(self, spans, note)
        calls.append(len(results))
        if len(calls) == 5:
            results[0][1].fill_(float("nan"))
        return results, clocks

    with Engine(served, OVERLAP) as engine:
        monkeypatch.setattr(Runner, "run", breaking)
        with engine.loop.lock:
            handles = [engine.submit(prompt(8, seed), max_new_tokens=20, **KW) for seed in range(3)]
        outcomes = []
        for handle in handles:
            try:
                outcomes.append(handle.result(60))
            except errors.InvalidLogits:
                outcomes.append(None)
        assert outcomes.count(None) == 1
        for seed, found in enumerate(outcomes):
            assert found in (None, stock(served, prompt(8, seed), max_new_tokens=20))
        assert engine.loop.store.pages_used == 0
        assert engine.submit(prompt(8), max_new_tokens=20, **KW).result(60) == stock(
            served, prompt(8), max_new_tokens=20
        )


@pytest.mark.parametrize("overlap", [False, True])
def test_clocks_that_are_read_late(model, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may end a pass after its request lost its pages."""
    served, seconds, asked = model("llama"), Clock.seconds, {}

    def late(self) -> float | None:
        asked[self] = asked.get(self, 0) + 1
        return None if asked[self] < 3 else seconds(self)

    with Engine(served, {"kv_cache": TINY_POOL, "batching": {"overlap": overlap, "swap_bytes": 0}}) as engine:
        monkeypatch.setattr(Clock, "seconds", late)
        with engine.loop.lock:
            handles = [engine.submit(prompt(8, seed), max_new_tokens=30, **KW) for seed in range(4)]
        for seed, handle in enumerate(handles):
            assert handle.result(60) == stock(served, prompt(8, seed), max_new_tokens=30)
        assert any(handle.stats.preemptions for handle in handles)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_last_token_needs_no_page(model, overlap: bool) -> None:
    """A request whose unread token is EOS is not failed because there is no page for a token behind it."""
    served, ids = build("llama"), prompt(8)
    eos = stock(served, ids, max_new_tokens=20)[4]
    arguments = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": eos}
    config = {"kv_cache": TINY_POOL, "prompt_cache": True, "batching": {"overlap": overlap}}
    with Engine(served, config) as engine:
        held = served.llmopt.cache_prompt(prompt(48, 5), llmopt=config)  # 12 of 15 pages
        assert engine.submit(ids, **arguments).result(60) == stock(served, ids, **arguments)
        held.unpin()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resting_in_a_forked_child() -> None:
    code = (
        "import os, sys, torch; from hf_llmopt.kernels import cpu; torch.ones(999, 999) @ torch.ones(999, 999)\n"
        "child = os.fork()\ncpu.rest()\nif child: sys.exit(os.waitpid(child, 0)[1])\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 0


def test_an_exit_in_a_criterion_ends_its_request_alone(model) -> None:
    class Exits(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise SystemExit(3)

    served = model("llama")
    with Engine(served) as engine:
        with engine.loop.lock:
            bad = engine.submit(prompt(8), max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Exits()]), **KW)
            good = engine.submit(prompt(8, 1), max_new_tokens=9, **KW)
        with pytest.raises(errors.LLMOptError):
            bad.result(60)
        assert good.result(60) == stock(served, prompt(8, 1), max_new_tokens=9)
        assert engine.submit(prompt(8), max_new_tokens=9, **KW).result(60) == stock(served, prompt(8), max_new_tokens=9)


def test_an_engine_that_is_dropped_ends_its_requests(model) -> None:
    engine = Engine(model("llama"))
    loop, handle = engine.loop, engine.submit(prompt(8), max_new_tokens=200, **KW)
    next(iter(handle))
    del engine
    gc.collect()
    with pytest.raises(errors.EngineClosed, match="dropped"):
        handle.result(60)
    assert loop.store.pages_used == 0


def test_overlap_beside_generate_calls(model) -> None:
    """Other threads step the engine too, before its own thread has read the last tokens."""
    served = model("qwen3")
    expected = [stock(served, prompt(7, seed), max_new_tokens=25) for seed in range(4)]
    with Engine(served, OVERLAP) as engine:
        handles = [engine.submit(prompt(7, seed), max_new_tokens=25, **KW) for seed in range(4)]
        ids = torch.tensor([prompt(7, 0)])
        for _ in range(6):
            output = served.generate(ids, max_new_tokens=25, llmopt=OVERLAP, **KW)
            assert output[0, 7:].tolist() == expected[0]
        assert [handle.result(60) for handle in handles] == expected


def test_overlap_stops_at_the_last_position() -> None:
    served = build("gpt2", max_position_embeddings=32)
    found = []
    for overlap in (False, True):
        with Engine(served, {"batching": {"overlap": overlap}}) as engine:
            handle, tokens = engine.submit(prompt(20), max_new_tokens=30, **KW), []
            with pytest.raises(errors.PromptTooLong, match="32 positions"):
                tokens.extend(handle)
            assert engine.loop.store.pages_used == 0
        found.append(tokens)
    assert found[0] == found[1]
    assert len(found[0]) >= 12


THREADS = """
import time
from pathlib import Path

import torch
from architectures import build

from hf_llmopt import Engine
from hf_llmopt.kernels import cpu


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def generate(engine):
    engine.submit(list(range(3, 90)), max_new_tokens=3, eos_token_id=None, pad_token_id=0).result(60)
    deadline = time.monotonic() + 20
    while threads() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threads() == before + 1, (threads(), before)  # the engine's own


torch.set_num_threads(2)
with Engine(build("llama")) as engine:
    cpu.rest()
    before = threads()
    generate(engine)
    torch.ones(999, 999) @ torch.ones(999, 999)  # now this thread has one more
    assert threads() == before + 2, (threads(), before)
    generate(engine)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists() or not cpu.available(), reason="needs Linux and the C kernels")
def test_threads_that_wait_keep_no_openmp_threads() -> None:
    """They would slow down those of all others."""
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- long lives, and failures that stay where they are -----------------------------------------------------------------


def test_a_bias_for_tokens_that_do_not_exist_fails_alone(model) -> None:
    served = model("llama")
    with Engine(served) as engine:
        good = [engine.submit(prompt(6, i), max_new_tokens=12, sequence_bias={(5,): 2.0}, **KW) for i in range(2)]
        bad = engine.submit(prompt(6), max_new_tokens=12, sequence_bias={(112 + 7,): 50.0}, **KW)
        with pytest.raises(errors.TokenOutOfRange, match="0 to 111"):
            bad.result(60)
        for index, handle in enumerate(good):
            expected = stock(served, prompt(6, index), max_new_tokens=12, sequence_bias={(5,): 2.0})
            assert handle.result(60) == expected


def test_a_row_with_nan_in_a_sampled_batch_fails_alone(model) -> None:
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * float("nan")

    served = model("llama")
    with Engine(served) as engine:
        good = [engine.submit(prompt(6, i), seed=i, max_new_tokens=12, **KW, **SAMPLED) for i in range(3)]
        bad = engine.submit(prompt(6), max_new_tokens=12, logits_processor=[Breaks()], **KW, **SAMPLED)
        with pytest.raises(errors.InvalidLogits, match="NaN"):
            bad.result(60)
        for index, handle in enumerate(good):
            assert handle.result(60) == stock(served, prompt(6, index), index, max_new_tokens=12, **SAMPLED)


def test_a_dropped_engine_owns_its_loop_no_more() -> None:
    served = build("llama")
    engine = Engine(served)
    loop, thread = engine.loop, None
    engine.submit(prompt(4), max_new_tokens=2, **KW).result(60)
    thread = engine._thread
    del engine
    thread.join(10)
    gc.collect()
    assert loop.owners == 0


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_requests() -> None:
    import psutil

    served = build("llama", num_hidden_layers=1)
    process, sizes = psutil.Process(), []
    with Engine(served, {"batching": {"policy": "fair"}}) as engine:
        for batch in range(50):
            handles = [
                engine.submit([3 + i % 80, 7, 9], max_new_tokens=2, tenant=str(batch * 2000 + i), **KW)
                for i in range(2000)
            ]
            for handle in handles:
                handle.result(300)
            del handles, handle
            gc.collect()
            sizes.append(process.memory_info().rss)
        assert engine.loop.store.pages_used == 0
        assert not engine.loop.groups
    assert max(sizes[25:]) < 1.05 * max(sizes[5:25]), [size // 2**20 for size in sizes]
