"""The other ways in: pipeline, Engine, threads, models from disk, on other devices, copied and pickled."""

import asyncio
import copy
import gc
import json
import pickle
import threading
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, build
from compare import (
    SMALL_PAGES,
    assert_equal,
    assert_same,
    check_served,
    counted_updates,
    prompts,
    served,
    stock,
    tokenizer,
)
from transformers import AutoModelForCausalLM, pipeline

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig
from hf_llmopt.errors import NotServed, RequestCancelled

NEW = 8
NEVER = {"eos_token_id": 9999}  # outside the vocabulary
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
RAGGED = {**prompts(4, 11, 7), **NEVER, "max_new_tokens": NEW}
TEXTS = ["the store", "a", "Rain on stone"]


@cache
def tiny(name: str):
    return build(name)


@pytest.fixture(params=["llama", "gemma3_text", "gpt2"])
def model(request):
    return tiny(request.param)


def alone(model, ids, seed=0, **arguments) -> list[int]:
    """Stock's new tokens for one prompt."""
    output = stock(model, seed, input_ids=torch.tensor([ids]), **{**NEVER, "max_new_tokens": NEW, **arguments})
    return output[0, len(ids) :].tolist()


def ragged(count: int) -> list[list[int]]:
    return [prompts(2 + 5 * index % 13, seed=index)["input_ids"][0].tolist() for index in range(count)]


# -- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "batch_size"),
    [
        ({}, 1),
        ({}, 3),
        (SAMPLED, 3),
        ({"num_return_sequences": 2, **SAMPLED}, 1),
        ({"return_full_text": False}, 2),
        ({"return_tensors": True}, 3),
        ({"stop_strings": ["e", "an", "7"], "tokenizer": tokenizer()}, 3),
        ({"guidance_scale": 1.5}, 1),
    ],
    ids=str,
)
def test_pipeline(arguments, batch_size):
    model = build("llama")  # the pipeline sets the model's default
    arguments = {"do_sample": False, **NEVER, "max_new_tokens": NEW, **arguments}
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer())
    torch.manual_seed(0)
    theirs = plain(TEXTS, batch_size=batch_size, **arguments)
    fast = pipeline("text-generation", model=model, tokenizer=tokenizer(), llmopt=True)
    assert type(fast) is type(plain)
    torch.manual_seed(0)
    with counted_updates() as updates:
        ours = fast(TEXTS, batch_size=batch_size, **arguments)
    assert ours == theirs
    check_served(model.llmopt.stats)
    assert not updates or "guidance_scale" in arguments


def test_pipeline_from_disk(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    arguments = {"do_sample": False, "max_new_tokens": NEW}
    theirs = pipeline("text-generation", model=str(tmp_path), device="cpu")(TEXTS[0], **arguments)
    fast = pipeline("text-generation", model=str(tmp_path), device="cpu", llmopt="kv_cache")
    assert fast(TEXTS[0], **arguments) == theirs
    check_served(fast.model.llmopt.stats)


# -- Engine -----------------------------------------------------------------------------------------------------------


def test_submit(model):
    ids = ragged(1)[0]
    theirs = alone(model, ids)
    with counted_updates() as updates, Engine(model, SMALL_PAGES) as engine:
        for form in (ids, torch.tensor(ids), torch.tensor([ids])):
            handle = engine.submit(form, **NEVER, max_new_tokens=NEW)
            assert handle.result(60) == theirs
            check_served(handle.stats)
    assert not updates


@pytest.mark.parametrize("seed", [0, 5, 2**40])
def test_submit_with_a_seed(model, seed):
    """The request's own generator draws what torch's default one, seeded so, would; the default is not touched."""
    ids = ragged(3)[2]
    theirs = alone(model, ids, seed, **SAMPLED)
    state = torch.get_rng_state()
    with Engine(model) as engine:
        handles = [engine.submit(ids, seed=seed, **NEVER, **SAMPLED, max_new_tokens=NEW) for _ in range(2)]
        assert [handle.result(60) for handle in handles] == [theirs, theirs]
        others = {tuple(engine.submit(ids, **SAMPLED, **NEVER, max_new_tokens=NEW).result(60)) for _ in range(4)}
    assert len(others) > 1  # without a seed, another one each time
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config", [True, SMALL_PAGES, {"batching": {"max_batch_tokens": 7, "max_requests": 5}}], ids=str
)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_many_requests_at_once(model, sampling, config):
    """Sixteen ragged requests in one go: each as if it were alone."""
    texts = ragged(16)
    theirs = [alone(model, ids, index, **sampling) for index, ids in enumerate(texts)]
    with counted_updates() as updates, Engine(model, config) as engine:
        handles = [
            engine.submit(ids, seed=index, **NEVER, **sampling, max_new_tokens=NEW) for index, ids in enumerate(texts)
        ]
        ours = [handle.result(60) for handle in handles]
        for handle in handles:
            check_served(handle.stats)
        assert not engine.loop.store.pages_used
    assert ours == theirs
    assert not updates


def test_preempted_requests(model):
    """A budget of 48 tokens for six requests: some give their pages back and are computed again."""
    texts = ragged(6)
    config = {"kv_cache": {"page_size": 4, "max_tokens": 48}}
    theirs = [alone(model, ids, index, **SAMPLED, max_new_tokens=20) for index, ids in enumerate(texts)]
    with Engine(model, config) as engine:
        with engine.loop.lock:  # they come together
            handles = [
                engine.submit(ids, seed=index, **NEVER, **SAMPLED, max_new_tokens=20) for index, ids in enumerate(texts)
            ]
        assert [handle.result(60) for handle in handles] == theirs
        assert sum(handle.stats.preemptions for handle in handles) > 0
        assert not engine.loop.store.pages_used


def test_submit_takes_what_generate_takes():
    model, ids = tiny("llama"), ragged(1)[0]
    text = tokenizer().decode(alone(model, ids))
    cases = [
        {"stop_strings": text[3:5], "tokenizer": tokenizer()},
        {"eos_token_id": alone(model, ids)[3]},
        {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
        {"max_new_tokens": None, "max_length": 12},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 2},
    ]
    with Engine(model) as engine:
        for case in cases:
            arguments = {**NEVER, "max_new_tokens": NEW, **case}
            assert engine.submit(ids, **arguments).result(60) == alone(model, ids, **arguments), case


def test_submit_has_no_stock_to_fall_back_on():
    with Engine(tiny("llama")) as engine, pytest.raises(NotServed, match="beam"):
        engine.submit([5, 6, 7], num_beams=2, max_new_tokens=NEW)


def test_iterate(model):
    ids = ragged(1)[0]
    with Engine(model) as engine:
        handles = [engine.submit(ids, **NEVER, max_new_tokens=NEW) for _ in range(2)]
        assert [list(handle) for handle in handles] == [alone(model, ids)] * 2
        assert all(handle.done for handle in handles)


def test_async_iterate(model):
    texts = ragged(4)

    async def read(handle):
        return [token async for token in handle]

    async def main():
        with Engine(model) as engine:
            handles = [engine.submit(ids, **NEVER, max_new_tokens=NEW) for ids in texts]
            return await asyncio.gather(*map(read, handles))

    assert asyncio.run(main()) == [alone(model, ids) for ids in texts]


def test_cancel(model):
    """The cancelled request ends, the others do not notice, and its pages return."""
    texts = ragged(3)
    with Engine(model, SMALL_PAGES) as engine:
        long = engine.submit(texts[0], **NEVER, max_new_tokens=200)
        others = [engine.submit(ids, **NEVER, max_new_tokens=NEW) for ids in texts[1:]]
        tokens = iter(long)
        seen = [next(tokens) for _ in range(3)]
        long.cancel()
        with pytest.raises(RequestCancelled):
            long.result(60)
        with pytest.raises(RequestCancelled):
            list(tokens)
        long.cancel()  # harmless
        assert seen == alone(model, texts[0], max_new_tokens=3)
        assert [handle.result(60) for handle in others] == [alone(model, ids) for ids in texts[1:]]
        assert not engine.loop.store.pages_used
        assert engine.submit(texts[0], **NEVER, max_new_tokens=NEW).result(60) == alone(model, texts[0])


# -- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Run all at once; raise what any of them raised."""
    results, errors = [None] * len(functions), []
    barrier = threading.Barrier(len(functions))

    def run(index, function):
        try:
            barrier.wait()
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_threads_generate_on_one_model(model):
    inputs = [{**prompts(3 + i, 9, 5 + i, seed=i), **NEVER, "max_new_tokens": NEW} for i in range(6)]
    theirs = [stock(model, **arguments).tolist() for arguments in inputs]
    with counted_updates() as updates:
        ours = in_threads(*(lambda a=a: model.generate(**a, llmopt=SMALL_PAGES).tolist() for a in inputs))
    assert ours == theirs
    assert not updates
    check_served(model.llmopt.stats)


def test_threads_beside_stock_and_plain_forwards(model):
    """While one thread's step has switched the attention, another's plain forward gets what it always got."""
    ids = RAGGED["input_ids"]
    theirs, logits = stock(model, **RAGGED).tolist(), model(ids).logits

    def forwards():
        with torch.no_grad():
            for _ in range(30):
                torch.testing.assert_close(model(ids).logits, logits)

    def generate(llmopt):
        return [model.generate(**RAGGED, llmopt=llmopt).tolist() for _ in range(4)]

    results = in_threads(lambda: generate(True), lambda: generate(False), lambda: generate(True), forwards)
    assert results[:3] == [[theirs] * 4] * 3


def test_threads_beside_an_engine(model):
    texts = ragged(6)
    theirs, together = [alone(model, ids) for ids in texts], stock(model, **RAGGED).tolist()
    with counted_updates() as updates, Engine(model) as engine:
        handles = [engine.submit(ids, **NEVER, max_new_tokens=NEW) for ids in texts]
        assert in_threads(*[lambda: model.generate(**RAGGED, llmopt=True).tolist()] * 3) == [together] * 3
        assert [handle.result(60) for handle in handles] == theirs
        for handle in handles:
            check_served(handle.stats)
    check_served(model.llmopt.stats)
    assert not updates


# -- models -----------------------------------------------------------------------------------------------------------


def test_from_pretrained(tmp_path, model):
    model.save_pretrained(tmp_path)
    theirs = stock(model, **RAGGED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, llmopt={"kv_cache": {"page_size": 4}})
    assert loaded.llmopt.config == SMALL_PAGES
    assert_same(served(loaded, llmopt=None, **RAGGED), theirs)
    loaded.save_pretrained(tmp_path / "again")
    assert "llmopt" not in json.dumps(json.loads((tmp_path / "again/config.json").read_text()))
    loaded, info = type(model).from_pretrained(tmp_path / "again", llmopt="kv_cache", output_loading_info=True)
    assert not info["missing_keys"]
    assert_same(served(loaded, llmopt=None, **RAGGED), theirs)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path), "llmopt")


def test_default_and_exception_to_it(model):
    """generate(llmopt=...) overrules what the model was given, for that call only."""
    model = hf_llmopt.optimize(copy.deepcopy(model), "kv_cache")
    theirs = stock(model, llmopt=False, **RAGGED)
    with counted_updates() as updates:
        assert_same(model.generate(**RAGGED, llmopt=False), theirs)
    assert updates  # this was stock
    assert_same(served(model, llmopt=None, **RAGGED), theirs)
    assert_same(served(model, llmopt=SMALL_PAGES, **RAGGED), theirs)
    assert model.llmopt.config == LLMOptConfig()
    hf_llmopt.optimize(model, False)
    with counted_updates() as updates:
        assert_same(model.generate(**RAGGED), theirs)
    assert updates


def test_guidance_on_an_optimized_model(model):
    """The guiding processor's own forward passes are plain ones."""
    arguments = {**RAGGED, **SAMPLED, "guidance_scale": 1.4}
    theirs = stock(model, **arguments)
    assert_same(served(hf_llmopt.optimize(copy.deepcopy(model)), llmopt=None, own_caches=False, **arguments), theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, copied):
    """A copy has the config, and pages of its own."""
    model = hf_llmopt.optimize(copy.deepcopy(model), SMALL_PAGES)
    theirs = stock(model, llmopt=False, **RAGGED)
    kept = served(model, llmopt=None, **RAGGED, return_dict_in_generate=True)
    twin = copied(model)
    assert twin.llmopt.config == SMALL_PAGES
    assert twin.llmopt.engine is None
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()  # the twin must not notice
    assert_same(served(twin, llmopt=None, **RAGGED), theirs)
    assert twin.llmopt.engine is not model.llmopt.engine
    assert kept.sequences.tolist() == theirs.tolist()


def test_the_engine_does_not_keep_its_model(model):
    model = copy.deepcopy(model)
    served(model, **RAGGED)
    engine = model.llmopt.engine
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="deleted"):
        _ = engine.runner.model


def test_moved_and_cast_weights(model):
    model = copy.deepcopy(model)
    assert_equal(model, RAGGED)
    model.double()
    assert_equal(model, {**RAGGED, "return_dict_in_generate": True, "output_logits": True})
    model.float()
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    assert_equal(model, RAGGED)


PLACES = {
    "one device": {"": "cpu"},
    "auto": "auto",
    "part on disk": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
    },
    "first layers on disk": {
        "model.embed_tokens": "disk",
        "model.rotary_emb": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.norm": "disk",
        "lm_head": "cpu",
    },
}


# transformers 5.17 takes the device of the first weight for the model's: "meta" if that lies on disk.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_device_map(name, place, tmp_path):
    """Layers where accelerate puts them; it wraps their forward, which is no reason to fall through."""
    tiny(name).save_pretrained(tmp_path / "model")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=PLACES[place], offload_folder=tmp_path / "offload", llmopt=True
    )
    if "disk" in place:
        assert hasattr(placed, "_hf_hook")
    for arguments in (RAGGED, {**RAGGED, **SAMPLED, "return_dict_in_generate": True, "output_logits": True}):
        theirs = stock(tiny(name), **arguments)
        assert_same(stock(placed, llmopt=False, **arguments), theirs)
        assert_same(served(placed, llmopt=None, **arguments), theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_through_an_engine(name):
    """Ragged requests that share their steps, greedy and sampled, against stock one by one."""
    own = tiny(name)
    rows = [prompts(length)["input_ids"] for length in (9, 4, 13)]
    with counted_updates() as updates, Engine(own, SMALL_PAGES) as engine:
        handles = [engine.submit(ids, **NEVER, max_new_tokens=NEW) for ids in rows]
        handles.append(engine.submit(rows[0], **NEVER, **SAMPLED, max_new_tokens=NEW, seed=7))
        ours = [handle.result(60) for handle in handles]
        figures = [handle.stats for handle in handles]
    assert not updates
    for stats in figures:
        check_served(stats)
    theirs = [own.generate(ids, **NEVER, max_new_tokens=NEW)[0, ids.shape[1] :].tolist() for ids in rows]
    torch.manual_seed(7)
    theirs.append(own.generate(rows[0], **NEVER, **SAMPLED, max_new_tokens=NEW)[0, rows[0].shape[1] :].tolist())
    assert ours == theirs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_through_the_pipeline(name):
    """Greedy, and sampled, which is the pipeline's own default."""
    own = build(name)
    plain = pipeline("text-generation", model=own, tokenizer=tokenizer())
    arguments = {**NEVER, "max_new_tokens": NEW, "return_tensors": True}

    def both(pipe):
        torch.manual_seed(3)
        return [pipe(TEXTS, batch_size=2, do_sample=sampling, **arguments) for sampling in (False, True)]

    theirs = both(plain)
    fast = pipeline("text-generation", model=own, tokenizer=tokenizer(), llmopt={"strict": True})
    with counted_updates() as updates:
        assert both(fast) == theirs
    assert not updates
    check_served(own.llmopt.stats)
