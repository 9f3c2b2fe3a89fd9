"""Quantized pages: every format through the real `generate`, its memory, its quality, and what it cannot do."""

import copy

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt import LLMOptConfig, demo
from hf_llmopt.bench.sample import Sample
from hf_llmopt.config import KVCacheConfig
from hf_llmopt.demo.corpus import held_out_texts
from hf_llmopt.errors import InvalidOption, UnsupportedModel
from hf_llmopt.kernels import cpu, reference
from hf_llmopt.kernels.arguments import PAGE_FORMATS, PageFormat
from hf_llmopt.kv_cache import LayerSpec, PagedStore

every_format = pytest.mark.parametrize("dtype", PAGE_FORMATS)
# Of the largest logit of tiny random models: kernels round keys that lie at the edge of a step either way.
NEAR = {"int8": 0.02, "fp8": 0.1, "int4": 0.3}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def pair():
    return demo.load()


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 100, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_come_back(data):
    form = data.draw(st.sampled_from(list(PAGE_FORMATS.values())))
    heads, width = data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(1, 70))
    x = torch.randn(5, heads, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    x *= 10.0 ** data.draw(st.integers(-6, 6))
    for rotates in (False, True):
        rows = reference.pack_rows(x, form, rotates)
        assert rows.shape == (5, 1, form.row_bytes(heads, width))
        again = reference.unpack_rows(rows, form, heads, width, torch.float32, rotates)
        error = (again - x).norm(dim=-1) / x.norm(dim=-1)
        assert error.max() < {"int8": 0.012, "fp8": 0.05, "int4": 0.2}[form.name]


@pytest.mark.parametrize("width", [1, 2, 6, 64, 80])
def test_hadamard_is_its_own_inverse(width):
    x = torch.randn(3, width, dtype=torch.float32)
    turned = reference.hadamard(x)
    torch.testing.assert_close(reference.hadamard(turned), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned @ turned.T, x @ x.T, rtol=1e-4, atol=1e-4)


@every_format
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "phi3", "llama4_text"])
def test_backends_agree(name, dtype):
    """Softcaps, sinks, windows, chunks; joined layers, modules and torch alone, over prompts longer than a tile."""
    model, inputs = build(name), {**prompts(5, 75, 40), **GREEDY, **LOGITS}
    found = {}
    for backend in ("reference", "sdpa", *(["cpu"] if cpu.available() else [])):
        config = LLMOptConfig(kv_cache={"dtype": dtype, "page_size": 4}, attention=backend)
        found[backend] = model.generate(**inputs, llmopt=config)
        assert model.llmopt.stats.served_by == "llmopt"
    for backend, output in found.items():
        # After the first different token texts part; the first logits are comparable in any case.
        mine, theirs = output.logits[0], found["reference"].logits[0]
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error < NEAR[dtype], (backend, float(error))


@every_format
def test_less_memory(pair, dtype):
    model = copy.deepcopy(pair[0]).bfloat16()
    used = {}
    for kind in ("auto", dtype):
        model.generate(**prompts(40), **GREEDY, llmopt={"kv_cache": {"dtype": kind}})
        used[kind] = model.llmopt.stats.page_bytes
    assert used[dtype] / used["auto"] <= (0.29 if dtype == "int4" else 0.53)


@every_format
def test_cached_prompts_forks_and_continued_caches(pair, dtype):
    model, _ = pair
    config = LLMOptConfig(kv_cache={"dtype": dtype, "page_size": 4}, prompt_cache=True, attention="reference")
    inputs = prompts(30)
    first = model.generate(**inputs, **GREEDY, **LOGITS, llmopt=config)
    again = model.generate(**inputs, **GREEDY, **LOGITS, llmopt=config)
    assert model.llmopt.stats.cached_tokens > 20
    assert torch.equal(first.sequences, again.sequences)
    longer = torch.cat([again.sequences, torch.tensor([[7, 8]])], dim=1)
    went_on = model.generate(longer, past_key_values=again.past_key_values, **GREEDY, llmopt=config)
    assert model.llmopt.stats.served_by == "llmopt"
    assert torch.equal(went_on, model.generate(longer, **GREEDY, llmopt=config))
    torch.manual_seed(0)
    rows = model.generate(
        **inputs,
        **{**GREEDY, "do_sample": True},
        num_return_sequences=3,
        llmopt=LLMOptConfig(kv_cache={"dtype": dtype}),
    )
    assert model.llmopt.stats.served_by == "llmopt"
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_formats_do_not_share_prompts(pair):
    model, inputs = pair[0], prompts(33)
    for dtype in ("int8", "auto", "int4"):
        model.generate(**inputs, **GREEDY, llmopt=LLMOptConfig(kv_cache={"dtype": dtype}, prompt_cache=True))
        assert model.llmopt.stats.cached_tokens == 0


def perplexity(model, sample, dtype):
    """Of plain forwards over a returned cache, whose `update` stores quantized and gives back what is stored."""
    config = LLMOptConfig(kv_cache={"dtype": dtype})
    cache = model.generate(
        torch.tensor([[7]]), max_new_tokens=1, return_dict_in_generate=True, llmopt=config, eos_token_id=None
    ).past_key_values
    losses = []
    with torch.no_grad():
        for window in sample.windows:
            cache.reset()
            ids = window.ids
            logits = model(ids[None, :-1], past_key_values=cache).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[1:]))
    return float(torch.stack(losses).mean().exp())


@pytest.fixture(scope="module")
def read_exactly(pair):
    """A text, and its perplexity where pages lose nothing."""
    model, tokenizer = pair
    sample = Sample.cut(model, tokenizer, held_out_texts(), context=512, tokens=8192)
    return sample, perplexity(model, sample, "auto")


@every_format
def test_perplexity(pair, read_exactly, dtype):
    """Bounds of the issue for int8 and int4; fp8 keeps four bits of a number."""
    sample, exact = read_exactly
    ratio = perplexity(pair[0], sample, dtype) / exact
    assert 0.99 < ratio < {"int8": 1.001, "fp8": 1.005, "int4": 1.015}[dtype], ratio


def test_odd_widths_have_no_int4():
    odd = LayerSpec("full", 0, 2, 8, 9, torch.float32, torch.device("cpu"))
    PagedStore([odd], KVCacheConfig(dtype="int8"))
    with pytest.raises(UnsupportedModel, match=r"9 wide\. Use 'int8' or 'fp8'"):
        PagedStore([odd], KVCacheConfig(dtype="int4"))


def test_unknown_formats_are_named():
    with pytest.raises(InvalidOption, match=r"'int9'.*int8"):
        LLMOptConfig(kv_cache={"dtype": "int9"})


def test_a_string_names_the_format():
    assert LLMOptConfig.parse({"kv_cache": "int8"}).kv_cache == KVCacheConfig(dtype="int8")
    assert KVCacheConfig(page_size=32).page_size == 32


def test_formats_say_their_size():
    assert PageFormat("int8").row_bytes(2, 64) == 2 * 66
    assert PAGE_FORMATS["int4"].row_bytes(8, 128) == 8 * 68
