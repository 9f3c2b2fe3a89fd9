"""Every architecture against stock: tokens equal, logits within rounding."""

from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, build
from compare import SMALL_PAGES, assert_close, assert_equal, assert_falls_through, assert_same, prompts, served, stock
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from hf_llmopt import LLMOptConfig
from hf_llmopt.kernels import cpu

NEW = 10
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
# Outside the vocabulary: a row that ends at once would compare nothing.
NEVER = {"eos_token_id": 9999}

# Prompts longer than the windows and chunks (6 to 8), so that they bind in the prompt and while decoding.
CASES = {
    "greedy": {**prompts(9), **NEVER},
    "sampled": {**prompts(9), **SAMPLED, **NEVER},
    "left_padded": {**prompts(4, 11, 7), **NEVER},
    "left_padded_sampled": {**prompts(4, 11, 7), **SAMPLED, **NEVER},
    "return_sequences": {**prompts(9), **SAMPLED, **NEVER, "num_return_sequences": 3},
}

PAGES = {"pages of 4": SMALL_PAGES, "pages of 16": True}
# A prompt of 22 tokens in three rows takes five steps.
FEW_TOKENS = LLMOptConfig(kv_cache={"page_size": 4}, batching={"max_batch_tokens": 5})


@cache
def tiny(name: str):
    return build(name)


@cache
def stocks(name: str, case: str):
    """Stock's answer, computed once for all that is compared with it."""
    return stock(tiny(name), **CASES[case], **LOGITS, max_new_tokens=NEW)


def windows(name: str) -> list[int]:
    layers = DynamicCache(config=tiny(name).config).layers
    return [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("case", CASES)
@every_architecture
def test_equal(name, case, pages):
    ours = served(tiny(name), llmopt=PAGES[pages], **CASES[case], **LOGITS, max_new_tokens=NEW)
    assert_same(ours, stocks(name, case))


@every_architecture
def test_without_return_dict(name):
    """Nobody sees logits: the same tokens, by the path that may drop finished rows."""
    ours = served(tiny(name), **CASES["left_padded"], max_new_tokens=NEW)
    assert ours.tolist() == stocks(name, "left_padded").sequences.tolist()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@every_architecture
def test_attention_backends(name, backend):
    config = LLMOptConfig(kv_cache={"page_size": 4}, attention=backend)
    ours = served(tiny(name), llmopt=config, **CASES["left_padded"], **LOGITS, max_new_tokens=NEW)
    assert_same(ours, stocks(name, "left_padded"))


@every_architecture
def test_long_spans(name):
    """Prompts that attend tile by tile, whole and in pieces behind others."""
    model, case = tiny(name), {**prompts(5, 75, 40), **NEVER, **LOGITS, "max_new_tokens": 2}
    theirs = stock(model, **case)
    for config in (SMALL_PAGES, LLMOptConfig(kv_cache={"page_size": 4}, batching={"max_batch_tokens": 50})):
        assert_same(served(model, llmopt=config, **case), theirs)
        assert not cpu.available() or "flash" in model.llmopt.stats.attention


@every_architecture
def test_token_budget_splits_prompts(name):
    ours = served(tiny(name), llmopt=FEW_TOKENS, **CASES["left_padded"], **LOGITS, max_new_tokens=NEW)
    assert_same(ours, stocks(name, "left_padded"))
    assert tiny(name).llmopt.stats.steps > NEW + 3


@every_architecture
def test_prefill_chunk_size(name):
    """Chunks change stock's result by rounding only, so the unchunked one is the reference, and stock's own too."""
    arguments = {**CASES["greedy"], **LOGITS, "max_new_tokens": NEW, "prefill_chunk_size": 4}
    ours = assert_equal(tiny(name), arguments, llmopt=SMALL_PAGES)
    assert_same(ours, stocks(name, "greedy"))
    assert tiny(name).llmopt.stats.steps == NEW + 2


@every_architecture
def test_right_padded(name):
    """Windows and chunks count padded columns in stock, so these rows are served where no window can bind."""
    model = tiny(name)
    bound = min(windows(name), default=None)
    if bound is None:
        assert_equal(
            model, {**prompts(4, 9, 7, pad="right"), **NEVER, **LOGITS, "max_new_tokens": NEW}, llmopt=SMALL_PAGES
        )
        return
    arguments = {**prompts(4, 9, 7, pad="right"), "max_new_tokens": NEW}
    reason = f"window of {bound} tokens"
    assert_falls_through(model, arguments, reason)
    short = {**prompts(1, 3, 2, pad="right"), **NEVER, **LOGITS, "max_new_tokens": bound - 3}
    if name == "llama4_text":  # scales queries by their padded column
        assert_falls_through(model, short, "counts padded columns")
    else:
        assert_equal(model, short, llmopt=SMALL_PAGES)


@every_architecture
def test_early_eos(name):
    """Two rows end early: the third goes on, and finished rows are padded as stock pads them."""
    model, case = tiny(name), CASES["left_padded"]
    new = stocks(name, "left_padded").sequences[:, case["input_ids"].shape[1] :]
    case = {name: case[name] for name in ("input_ids", "attention_mask")}
    ends = {"eos_token_id": [int(new[0, 2]), int(new[2, 5])], "max_new_tokens": NEW}
    theirs = stock(model, **case, **ends, **LOGITS)
    assert_same(served(model, llmopt=SMALL_PAGES, **case, **ends, **LOGITS), theirs)
    assert served(model, llmopt=SMALL_PAGES, **case, **ends).tolist() == theirs.sequences.tolist()
    # Sampled: finished rows still consume noise.
    assert_equal(model, {**case, **ends, **SAMPLED}, llmopt=SMALL_PAGES)


@pytest.mark.parametrize("lengths", [(9,), (4, 11, 7)], ids=["one row", "left padded"])
@every_architecture
def test_continued_cache(name, lengths):
    """A returned cache, some new tokens: as if the whole text had been the prompt."""
    model = tiny(name)
    ids = prompts(*lengths)["input_ids"]
    # Given in any case: generate takes an id that happens to be the pad token for padding.
    mask = (ids != 0).long()
    first = served(
        model,
        llmopt=SMALL_PAGES,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        return_dict_in_generate=True,
        **NEVER,
    )
    ids = torch.cat([first.sequences, prompts(*[3] * len(ids), seed=7)["input_ids"]], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), 9)], dim=1)
    more = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, **LOGITS, **NEVER}
    theirs = stock(model, **more)
    ours = served(model, llmopt=SMALL_PAGES, **more, past_key_values=first.past_key_values)
    assert_same(ours, theirs)
    assert model.llmopt.stats.cached_tokens == mask.sum() - 4 * len(ids)
    assert ours.past_key_values is first.past_key_values  # updated in place, as stock does
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1


# DeepSeek's pages hold expanded keys, stock's cache compressed states.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("deepseek")])
def test_returned_keys(name):
    """The returned cache, read densely, holds what the next token sees in stock's."""
    model = tiny(name)
    ours = served(model, llmopt=SMALL_PAGES, **CASES["greedy"], **LOGITS, max_new_tokens=NEW).past_key_values
    for index, layer in enumerate(stocks(name, "greedy").past_key_values.layers):
        length = ours.get_seq_length()
        seen = length - ours.store.groups[ours.store.group_of[index]].first_visible(length)
        if not seen:  # a chunk has just ended
            continue
        for our, their in zip(ours.dense(index), (layer.keys, layer.values), strict=True):
            assert_close(our[:, :, -seen:], their[:, :, -seen:])
