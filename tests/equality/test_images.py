"""Prompts with images: the model's own pass computes them, and every token behind them is decoded over pages."""

from functools import cache
from time import sleep

import pytest
import torch
from compare import SMALL_PAGES, assert_equal, assert_falls_through, stock
from tiny_models import IMAGES, build, with_images
from transformers import DynamicCache

from hf_llmopt import Engine, LLMOptConfig
from hf_llmopt.errors import InvalidRequest

NEW = 8
KW = {"max_new_tokens": NEW, "eos_token_id": 9999, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
GREEDY = {"do_sample": False}

# Positions on three axes; windows, and images that see their own later tokens; images in several tiles; positions that
# count padded columns.
MODELS = ["llava", "qwen2_5_vl", "gemma3", "llava_next", "exaone4_5"]


@cache
def tiny(name: str):
    model = build(name, IMAGES)
    return model, with_images(model)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_equal(name, sampling):
    """Rows of different lengths, padded on the left; logits within rounding."""
    model, inputs = tiny(name)
    if "image" not in model.input_modalities:
        pytest.skip("this transformers does not say that the model reads images")
    ours = assert_equal(model, {**inputs, **KW, **LOGITS, **sampling}, llmopt=SMALL_PAGES, own_caches=False)
    assert model.llmopt.stats.steps == NEW  # the first of them is the model's own
    assert len(ours.logits) == NEW


def test_the_image_counts():
    """Another image gives other tokens: nothing of the first one is found again."""
    model, inputs = tiny("qwen2_5_vl")
    first = assert_equal(model, {**inputs, **KW, **GREEDY}, own_caches=False)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 3}
    second = assert_equal(model, {**other, **KW, **GREEDY}, own_caches=False)
    assert not torch.equal(first, second)
    assert model.llmopt.stats.cached_tokens == 0


def test_return_sequences():
    model, inputs = tiny("llava")
    assert_equal(model, {**inputs, **KW, **SAMPLED, "num_return_sequences": 2}, own_caches=False)


def test_the_returned_cache_goes_on():
    """More text behind an image's answer: as if all of it had been one prompt."""
    model, inputs = tiny("qwen2_5_vl")

    def continued(llmopt):
        torch.manual_seed(0)
        first = model.generate(**inputs, **KW, **GREEDY, return_dict_in_generate=True, llmopt=llmopt)
        more = torch.arange(30, 33).repeat(3, 1)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 3, dtype=torch.long)], dim=1)
        return model.generate(
            ids, attention_mask=mask, past_key_values=first.past_key_values, **KW, **GREEDY, llmopt=llmopt
        )

    theirs, ours = continued(False), continued(SMALL_PAGES)
    assert ours.tolist() == theirs.tolist()
    assert model.llmopt.stats.served_by == "llmopt"
    assert model.llmopt.stats.cached_tokens > 0


@pytest.mark.usefixtures("cheap_guesses")
def test_guesses_need_the_ids_alone():
    """Suffixes of an image's answer are guessed from its ids; a draft model would have to see the image."""
    model, inputs = tiny("llava")
    more = {**KW, "max_new_tokens": 24}
    config = LLMOptConfig(kv_cache={"page_size": 4}, speculative="suffix")
    assert_equal(model, {**inputs, **more, **GREEDY}, llmopt=config, own_caches=False)
    assert model.llmopt.stats.undrafted is None
    assert model.llmopt.stats.drafted_tokens > 0


def test_a_draft_model_would_have_to_see_the_image():
    model, inputs = tiny("llava")
    config = LLMOptConfig(speculative={"method": "draft_model", "draft_model": build("llama")})
    assert_equal(model, {**inputs, **KW, **GREEDY}, llmopt=config, own_caches=False)
    assert "images" in model.llmopt.stats.undrafted
    assert model.llmopt.stats.drafted_tokens == 0


def test_submitted():
    """Beside a request of text; requests with images keep their pages until they end."""
    model, inputs = tiny("qwen2_5_vl")
    one = {name: value[:1] for name, value in inputs.items() if name != "pixel_values"}
    one["pixel_values"] = inputs["pixel_values"][: len(inputs["pixel_values"]) // 3]
    text = {"input_ids": torch.arange(5, 12)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    expected = [stock(model, **given, **KW, **GREEDY) for given in (one, text)]
    with Engine(model) as engine:
        handles = [engine.submit(**given, **KW, **GREEDY) for given in (one, text)]
        for handle, given, whole in zip(handles, (one, text), expected, strict=True):
            assert handle.result() == whole[0, given["input_ids"].shape[1] :].tolist()
    model, inputs = tiny("llava")
    one = {name: value[:1] for name, value in inputs.items()}
    with Engine(model) as engine, pytest.raises(InvalidRequest, match="cannot share a prompt with images"):
        engine.submit(**one, **KW, **SAMPLED, num_return_sequences=2)


def test_an_image_waits_for_the_pages_of_texts():
    """Texts would give them up, but not at once, and a prompt with an image fills its own where it starts."""
    model, inputs = tiny("llava")
    image = {name: value[:1] for name, value in inputs.items()}
    text = {"input_ids": torch.arange(5, 38)[None], "attention_mask": torch.ones(1, 33).long(), **KW, **GREEDY}
    text["max_new_tokens"] = 19
    expected = stock(model, **text)[0, 33:].tolist(), stock(model, **image, **KW, **GREEDY)[0, -NEW:].tolist()
    with Engine(model, llmopt={"kv_cache": {"page_size": 4, "max_tokens": 52}}) as engine:
        first = engine.submit(**text)
        while not first.stats.generated_tokens:
            sleep(0.001)
        with engine.loop.lock:  # the text stays where it is
            second = engine.submit(**image, **KW, **GREEDY)
        assert (first.result(60), second.result(60)) == expected


@pytest.mark.parametrize("brings", ["an image", "keys"])
def test_a_call_takes_the_pages_it_fills_at_once_from_texts(brings):
    """A pass of the model's own, or the caller's cache, leaves keys for which texts give their pages up."""
    model, inputs = tiny("llava")
    given = {name: value[:1] for name, value in inputs.items()}
    if brings == "keys":
        given = {"input_ids": torch.arange(7, 31)[None], "attention_mask": torch.ones(1, 24).long()}
    text = {"input_ids": torch.arange(5, 38)[None], "attention_mask": torch.ones(1, 33).long(), **KW, **GREEDY}
    text["max_new_tokens"] = 19
    expected = stock(model, **text)[0, 33:].tolist(), stock(model, **given, **KW, **GREEDY)
    if brings == "keys":
        given["past_key_values"] = DynamicCache(config=model.config)
        with torch.no_grad():
            model(given["input_ids"][:, :-2], past_key_values=given["past_key_values"])
    config = {"kv_cache": {"page_size": 4, "max_tokens": 52}}
    with Engine(model, llmopt=config) as engine:
        handle = engine.submit(**text)
        while not handle.stats.generated_tokens:
            sleep(0.001)
        with engine.loop.lock:  # the text stays where it is until the call waits
            ours = model.generate(**given, **KW, **GREEDY, llmopt=config)
        assert torch.equal(ours, expected[1])
        assert model.llmopt.stats.served_by == "llmopt"
        assert handle.result(60) == expected[0]
        assert handle.stats.preemptions == 1
        assert engine.loop.store.pages_used == 0


def test_an_image_takes_a_place():
    model, inputs = tiny("llava")
    image = {name: value[:1] for name, value in inputs.items()}
    text = {"input_ids": torch.arange(5, 38)[None], "attention_mask": torch.ones(1, 33).long()}
    together = []
    with Engine(model, llmopt={"batching": {"max_requests": 1}}) as engine:
        engine.loop.on_step = lambda plan, began: together.append(len(engine.loop.scheduler.running))
        handles = [engine.submit(**given, **KW, **GREEDY) for given in (image, text, image)]
        assert all(len(handle.result(60)) == NEW for handle in handles)
    assert max(together) == 1


def test_what_is_not_served():
    model, inputs = tiny("llava")
    mask = inputs["attention_mask"].clone()
    mask[:, -1] = 0
    assert_falls_through(model, {**inputs, "attention_mask": mask, **KW, **GREEDY}, "pad on the left")
    assert_falls_through(
        model,
        lambda: {**inputs, **KW, **GREEDY, "past_key_values": DynamicCache(config=model.config)},
        "images come with past_key_values",
    )
    with pytest.raises(InvalidRequest, match="how a prompt attends"):
        model.generate(**inputs, **KW, llmopt={"kv_cache": {"eviction": "snapkv", "keep_ratio": 0.5}})
