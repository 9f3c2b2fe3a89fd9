"""Found pages against stock: every architecture, however the pages came about."""

from functools import cache
from itertools import count

import pytest
import torch
from architectures import ARCHITECTURES, build
from compare import PAD, assert_same, check_served, prompts, served, stock, tokenizer
from transformers import pipeline
from transformers.cache_utils import DynamicCache

from hf_llmopt import Engine

NEW = 10
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
NEVER = {"eos_token_id": 9999, "pad_token_id": PAD}
SHARED = 21  # tokens: five pages of 4 and a token

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
_salts = count()


@cache
def tiny(name: str):
    return build(name)


@pytest.fixture
def llmopt():
    """Pages of 4, and a tenant of its own for each test: nobody else's pages are found."""
    return {"kv_cache": {"page_size": 4}, "prompt_cache": {"salt": str(next(_salts))}}


def ids(length: int, seed: int) -> torch.Tensor:
    return prompts(length, seed=seed)["input_ids"]


def same(model, llmopt, found: int, **arguments):
    """Stock's tokens and logits, with `found` prompt tokens that were not computed."""
    if "input_ids" in arguments:  # without a mask generate takes a sampled id that happens to be PAD for padding
        arguments = {"attention_mask": torch.ones_like(arguments["input_ids"]), **arguments}
    arguments = {**NEVER, "max_new_tokens": NEW, **LOGITS, **arguments}
    theirs = stock(model, **arguments)
    ours = served(model, llmopt=llmopt, **arguments)
    assert_same(ours, theirs)
    assert model.llmopt.stats.cached_tokens == found
    return ours


@every_architecture
def test_shared_beginning(name, llmopt):
    """The second prompt finds the first one's tokens, inside a page too; greedy and sampled."""
    model, shared = tiny(name), ids(SHARED, 0)
    same(model, llmopt, 0, input_ids=torch.cat([shared, ids(6, 1)], dim=1))
    same(model, llmopt, SHARED, input_ids=torch.cat([shared, ids(9, 2)], dim=1))
    same(model, llmopt, SHARED, input_ids=torch.cat([shared, ids(4, 3)], dim=1), **SAMPLED)


@every_architecture
def test_never_the_whole_prompt(name, llmopt):
    model, prompt = tiny(name), ids(SHARED, 0)
    same(model, llmopt, 0, input_ids=prompt)
    same(model, llmopt, SHARED - 1, input_ids=prompt)
    same(model, llmopt, SHARED - 1, input_ids=prompt, **SAMPLED)
    same(model, llmopt, 11, input_ids=prompt[:, :12])


@every_architecture
def test_chat_turns(name, llmopt):
    """Generated text is found too: of each turn only the new tokens are computed, and the last sampled one."""
    model = tiny(name)
    history = same(model, llmopt, 0, input_ids=ids(9, 0)).sequences
    for turn in range(1, 4):
        prompt = torch.cat([history, ids(5, turn)], dim=1)
        history = same(model, llmopt, history.shape[1] - 1, input_ids=prompt).sequences


@every_architecture
def test_batches(name, llmopt):
    """Ragged rows, each with its own part of the beginning, beside rows that find nothing."""
    model, shared = tiny(name), ids(SHARED, 0)
    same(model, llmopt, 0, input_ids=torch.cat([shared, ids(3, 1)], dim=1))
    rows = [shared[0, :11], torch.cat([shared[0], ids(5, 2)[0]]), ids(8, 3)[0], shared[0, :14]]
    longest = max(map(len, rows))
    batch = torch.stack([torch.cat([row.new_full((longest - len(row),), PAD), row]) for row in rows])
    # Llama 4 scales queries by padded column: padded rows are not like others.
    found = SHARED if name == "llama4_text" else 10 + SHARED + 0 + 13
    same(model, llmopt, found, input_ids=batch, attention_mask=(batch != PAD).long())


@every_architecture
def test_forks(name, llmopt):
    """Rows with one prompt share its pages, found ones and new ones; then each writes to its own copy."""
    model, shared = tiny(name), ids(SHARED, 0)
    same(model, llmopt, 0, input_ids=shared)
    prompt = torch.cat([shared, ids(5, 1)], dim=1)
    same(model, llmopt, SHARED + 2 * 25, input_ids=prompt, num_return_sequences=3, **SAMPLED)
    same(model, llmopt, 25, input_ids=prompt)


@every_architecture
def test_small_steps_and_tight_pools(name):
    """Chunked prefill behind found pages, in a pool that must evict some of them for it."""
    llmopt = {
        "kv_cache": {"page_size": 4, "max_tokens": 48},
        "prompt_cache": True,
        "batching": {"max_batch_tokens": 5},
    }
    model, shared, found = build(name), ids(SHARED, 0), 0
    for turn in range(6):
        prompt = torch.cat([shared, ids(4 + turn, turn)], dim=1)
        arguments = {"input_ids": prompt, **NEVER, **LOGITS, "max_new_tokens": NEW}
        assert_same(served(model, llmopt=llmopt, **arguments), stock(model, **arguments))
        found += model.llmopt.stats.cached_tokens
    assert found >= 3 * SHARED
    assert model.llmopt.prompt_cache.evictions > 0


@every_architecture
def test_returned_caches_keep_what_is_found(name, llmopt):
    """Going on from a returned cache, cut short or not, must not write to pages that others find."""
    model, prompt = tiny(name), ids(SHARED, 0)
    first = same(model, llmopt, 0, input_ids=prompt)
    past, longer = first.past_key_values, torch.cat([first.sequences, ids(3, 1)], dim=1)
    arguments = {**NEVER, **LOGITS, "max_new_tokens": NEW, "attention_mask": torch.ones_like(longer)}
    assert_same(
        served(model, llmopt=llmopt, input_ids=longer, past_key_values=past, **arguments),
        stock(model, input_ids=longer, **arguments),
    )
    same(model, llmopt, SHARED + NEW - 1, input_ids=torch.cat([first.sequences, ids(7, 5)], dim=1))
    if any(layer.is_sliding for layer in DynamicCache(config=model.config).layers):
        return
    past.crop(-30)
    shorter = torch.cat([first.sequences[:, : past.get_seq_length()], ids(5, 3)], dim=1)
    arguments["attention_mask"] = torch.ones_like(shorter)
    assert_same(
        served(model, llmopt=llmopt, input_ids=shorter, past_key_values=past, **arguments),
        stock(model, input_ids=shorter, **arguments),
    )
    same(model, llmopt, SHARED + NEW, input_ids=torch.cat([first.sequences, ids(7, 4)], dim=1))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "llama4_text"])
def test_engine_requests(name, llmopt):
    model, shared = tiny(name), ids(SHARED, 0)[0].tolist()
    texts = [shared + ids(3 + index, index)[0].tolist() for index in range(8)]
    theirs = [
        stock(model, input_ids=torch.tensor([text]), **NEVER, max_new_tokens=NEW)[0, len(text) :] for text in texts
    ]
    with Engine(model, llmopt) as engine:
        first = engine.submit(texts[0], **NEVER, max_new_tokens=NEW)
        assert first.result(60) == theirs[0].tolist()
        handles = [engine.submit(text, **NEVER, max_new_tokens=NEW) for text in texts[1:]]
        assert [handle.result(60) for handle in handles] == [new.tolist() for new in theirs[1:]]
        for handle in handles:
            check_served(handle.stats)
            assert handle.stats.cached_tokens == SHARED
        assert not engine.loop.store.pages_used


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_pipeline(name):
    model = build(name)
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer())
    texts = ["Rain on stone, and the", "Rain on stone, and no sun"]
    arguments = {"do_sample": False, "max_new_tokens": NEW, **NEVER}
    theirs = [plain(text, **arguments) for text in texts]
    fast = pipeline("text-generation", model=model, tokenizer=tokenizer(), llmopt="prompt_cache")
    assert [fast(text, **arguments) for text in texts] == theirs
    check_served(model.llmopt.stats)
    shared = len(tokenizer()("Rain on stone, and ")["input_ids"])
    assert model.llmopt.stats.cached_tokens == shared


def test_what_is_not_plain_shares_nothing(llmopt):
    """Embeddings, other positions, right padding and given caches: their keys depend on more than tokens."""
    model, prompt = tiny("llama"), ids(SHARED, 0)
    same(model, llmopt, 0, input_ids=prompt)
    same(model, llmopt, 0, input_ids=prompt, position_ids=torch.arange(3, 3 + SHARED)[None])
    padded = torch.cat([prompt, prompt.new_full((1, 2), PAD)], dim=1)
    same(model, llmopt, 0, input_ids=padded, attention_mask=(padded != PAD).long())
    embeds = model.get_input_embeddings()(prompt).detach()
    same(model, llmopt, 0, inputs_embeds=embeds, attention_mask=torch.ones_like(prompt))
    same(model, llmopt, SHARED - 1, input_ids=prompt)
