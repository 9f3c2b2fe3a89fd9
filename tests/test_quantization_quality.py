"""What quantization costs on real text: the embedded model, groups of 64, intervals from the same windows."""

import random

import pytest

import hf_llmopt
from hf_llmopt import QuantizationConfig, demo
from hf_llmopt.bench import quality
from hf_llmopt.bench.sample import Sample
from hf_llmopt.demo import corpus

GROUP = 64


def sample(tokens):
    model, tokenizer = demo.load()
    return Sample.cut(model, tokenizer, corpus.held_out_texts(), context=512, tokens=tokens)


@pytest.fixture(scope="module")
def held_out():
    return sample(16_000)


def perplexity(windows, method=None, **options) -> quality.Perplexity:
    model, _ = demo.load()
    if method is not None:
        options.setdefault("activations", "none")
        hf_llmopt.optimize(model, llmopt=QuantizationConfig(method, **options))
    return quality.perplexity(model, windows)


@pytest.fixture(scope="module")
def full(held_out):
    return perplexity(held_out)


@pytest.fixture(scope="module")
def few():
    """Fewer windows: the same ones are measured before and after, and the bound is for their ratio."""
    windows = sample(8_000)
    return windows, perplexity(windows)


@pytest.mark.parametrize("activations", ["none", "auto"])
def test_int8_costs_a_thousandth_at_most(few, activations):
    windows, full = few
    times = perplexity(windows, "int8", activations=activations).over(full)
    assert abs(times.value - 1) <= 0.001


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_beat_rounding_to_nearest(held_out, full, method):
    """At 4 bits and at 3, beyond the interval; at 4 bits with activations in int8 too."""
    for bits, symmetric in ((4, False), (3, False)):
        options = {"bits": bits, "group_size": GROUP, "symmetric": symmetric}
        nearest = perplexity(held_out, "int4", **options, clip=False)
        found = perplexity(held_out, method, **options)
        assert found.over(nearest).high < 1
        if bits == 4:
            assert found.over(full).value <= 1.02
            assert perplexity(held_out, method, **options, activations="auto").over(found).value <= 1.002


@pytest.mark.slow
def test_the_best_four_bits_cost_little(held_out, full):
    """Calibrated on what the model was trained on."""
    code = [document.text for document in corpus.documents("train")]
    random.Random(0).shuffle(code)
    found = perplexity(held_out, "gptq", group_size=GROUP, symmetric=False, calibration=code)
    assert found.over(full).value <= 1.015
