"""Presets of `llmopt=`: what each name sets, whether it is exact, and what is said of names that do not exist."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from architectures import build

import hf_llmopt
from hf_llmopt import (
    BatchingConfig,
    KVCacheConfig,
    LLMOptConfig,
    PromptCacheConfig,
    QuantizationConfig,
    SpeculativeConfig,
)
from hf_llmopt.cli.command import keyword
from hf_llmopt.cli.service import config_of
from hf_llmopt.config import PARTS, PRESETS
from hf_llmopt.config.llmopt import SECTIONS
from hf_llmopt.errors import InvalidOption

PAGE = Path(__file__).parent.parent / "docs" / "presets.md"
pytestmark = pytest.mark.usefixtures("cheap_guesses")


def test_what_presets_set() -> None:
    latency, throughput, memory = map(LLMOptConfig.parse, ("latency", "throughput", "memory"))
    assert latency == LLMOptConfig(prompt_cache=PromptCacheConfig(), speculative=SpeculativeConfig())
    assert throughput == LLMOptConfig(prompt_cache=PromptCacheConfig(), batching=BatchingConfig(continuous=True))
    assert memory == LLMOptConfig(kv_cache=KVCacheConfig(dtype="int8"))
    assert [config.exact for config in (latency, throughput, memory)] == [True, True, False]


@pytest.mark.parametrize("value", [True, "prompt_cache", "speculative", "continuous_batching", "kv_cache"])
def test_exact(value: object) -> None:
    assert LLMOptConfig.parse(value).exact


@pytest.mark.parametrize(
    "value",
    ["int8", "int4", "fp8", {"kv_cache": "fp8"}, {"kv_cache": {"eviction": "sink"}}, "memory,int4"],
)
def test_lossy(value: object) -> None:
    assert not LLMOptConfig.parse(value).exact


def test_parts_beside_a_preset() -> None:
    config = LLMOptConfig.parse("memory,int4")
    assert (config.kv_cache.dtype, config.quantization.method, config.prompt_cache) == ("int8", "int4", None)
    assert LLMOptConfig.parse(["latency", "latency"]) == LLMOptConfig.parse("latency")
    assert LLMOptConfig.parse("latency,continuous_batching").batching.continuous


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("latancy", "Did you mean 'latency'"),
        ("through-put", "Did you mean 'throughput'"),
        (["memroy"], "Did you mean 'memory'"),
        ("latency,throughput", "'latency' and 'throughput', which are for different ends"),
        (["memory", "int5"], "Did you mean 'int8'|Did you mean 'int4'"),
        (["kv_cache", {"attention": "sdpa"}], "Use one dict for sections"),
        ({"latency": True}, "'latency' is a name, and a dict takes sections: llmopt='latency'"),
        ({"int4": True}, "llmopt='int4' or {'quantization': {'method': 'int4'}}"),
        ({"continuous_batching": True}, "or {'batching': True}"),
        ("snapkv", "'snapkv' is no part's name; it belongs into a dict: llmopt={'kv_cache': {'eviction': 'snapkv'}}"),
        ("kv_cache,offload", "llmopt={'kv_cache': {'offload': ...}}"),
        ("graphs", "llmopt={'graphs': ...}"),
        ({"snapkv": 64}, "'snapkv' belongs to a section: {'kv_cache': {'eviction': 'snapkv'}}"),
        ({"keep_tokens": 64}, "'keep_tokens' belongs to a section: {'kv_cache': {'keep_tokens': ...}}"),
        ({"kv_cache": "sink"}, "'sink' is a value of eviction. Give {'eviction': 'sink'}"),
        ({"kv_cache": "offload"}, "'offload' is another option. Give {'offload': ...}"),
        ({"kv_cache": {"page_size": "int8"}}, "takes an int, got 'int8' .* a value of dtype: dtype='int8'"),
        ({"flash_attention": True}, "llmopt='flash_attention' or {'attention': True}"),
        ({"kv_cache": {"eviction": "SnapKV"}}, "Did you mean 'snapkv'"),
        (b"latency", "got b'latency'"),
        ("int4,int8", "two values of quantization.method: 'int4' and 'int8'. Choose one of them"),
        ({"kv_cache": {1: 2}}, "KVCacheConfig: option '1' does not exist"),
    ],
)
def test_near_misses(value: object, match: str) -> None:
    with pytest.raises(InvalidOption, match=match):
        LLMOptConfig.parse(value)


@pytest.mark.parametrize("section", [LLMOptConfig, *SECTIONS.values()])
def test_misspelt_keywords(section: type) -> None:
    names = [each.name for each in fields(section)]
    with pytest.raises(InvalidOption, match=f"{section.__name__}: option '{names[0]}s' .* Did you mean '{names[0]}'"):
        section(**{names[0] + "s": None})
    assert list(inspect.signature(section).parameters) == names
    assert pickle.loads(pickle.dumps(section())) == copy.deepcopy(section()) == section()


def test_bits_alone_name_a_method() -> None:
    assert [QuantizationConfig(bits=bits).effective_method for bits in (4, 8)] == ["int4", "int8"]


def test_a_calibration_set_does_not_fill_the_screen() -> None:
    asked = QuantizationConfig("gptq", calibration=["a text"] * 1000, samples=8)
    assert repr(asked) == "QuantizationConfig(method='gptq', calibration=<list of 1,000>, samples=8)"
    assert "calibration=<generator>" in repr(QuantizationConfig("gptq", calibration=(text for text in ["a"])))
    assert "draft_model='org/small'" in repr(LLMOptConfig(speculative={"draft_model": "org/small"}))


def test_on_the_command_line() -> None:
    assert keyword("latency") == "latency"
    with pytest.raises(InvalidOption, match="Did you mean 'throughput'"):
        keyword("throughputs")
    with pytest.raises(InvalidOption, match="different ends"):
        keyword("latency,memory")
    assert config_of("memory").prompt_cache is None  # pages that nobody holds are memory too
    assert config_of("throughput") == LLMOptConfig.parse("throughput")


@pytest.mark.parametrize("preset", ["latency", "throughput"])
@pytest.mark.parametrize(
    "arguments", [{"do_sample": False}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"]
)
def test_exact_presets_give_the_tokens_of_stock(model, preset: str, arguments: dict[str, object]) -> None:
    llama = model("llama")
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(1)).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    runs = {}
    for value in (False, preset):
        torch.manual_seed(4)
        runs[value] = llama.generate(**inputs, **arguments, max_new_tokens=12, pad_token_id=0, llmopt=value).tolist()
    assert runs[False] == runs[preset]
    assert llama.llmopt.stats.served_by == "llmopt"


def test_memory_holds_fewer_bytes_in_pages() -> None:
    llama = build("llama", dtype=torch.bfloat16)
    inputs = {"input_ids": torch.arange(3, 35)[None], "attention_mask": torch.ones(1, 32, dtype=torch.long)}
    held = {}
    for value in ("kv_cache", "memory"):
        llama.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, llmopt=value)
        assert llama.llmopt.stats.served_by == "llmopt"
        held[value] = llama.llmopt.stats.page_bytes
    assert held["memory"] < 0.8 * held["kv_cache"]  # of heads as narrow as these, scales are a large part


def test_memory_can_be_a_default_and_weights_only_where_they_are_loaded() -> None:
    llama = hf_llmopt.optimize(build("llama"), "memory")
    assert llama.llmopt.config == LLMOptConfig.parse("memory")
    with pytest.raises(InvalidOption, match="changes weights"):
        llama.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, llmopt="memory,int4")


def test_the_page_has_a_row_for_every_name() -> None:
    """What `docs/presets.md` says of each name is what the name means."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    found = {}
    for row in rows:
        name, config, exact, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        if config.startswith("`LLMOptConfig("):
            found[name.strip("`")] = (config.strip("`"), exact)
    expected = {}
    for value in (True, *PRESETS, *PARTS):
        config = LLMOptConfig.parse(value)
        expected[repr(value).replace("'", '"')] = (repr(config), "yes" if config.exact else "no")
    assert found == expected
