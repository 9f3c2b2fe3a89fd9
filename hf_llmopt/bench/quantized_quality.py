"""What quantization costs: perplexity of the embedded model by method, and whether kernels compute what weights say."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_llmopt import LLMOptConfig
from hf_llmopt.config import CALIBRATED, QuantizationConfig

from . import quality
from .equality import worst
from .measure import generate
from .quantized import dequantized, held, memory, quantize, round_activations
from .sample import Sample
from .workloads import Workload, held_out_ids, ragged_prompts

GROUP = 64
TOKENS = 65_536
BASELINE, RTN = "bfloat16", "rtn"
PROMPTS = Workload("4 prompts", rows=4, new_tokens=48, shortest=8, longest=64)
# Of logits, against the dequantized weights' own, in units of the logits' standard deviation; held by the report.
INT8_ACTIVATIONS_ERROR = 0.05


@dataclass(frozen=True)
class Case:
    """A method and how it is called in a table.

    Attributes:
        name: Says it, with the bits: "gptq, 4 bits".
        config: What is asked for.
        family: Cases of one family are compared with its RTN.
        own_texts: Calibrate on what the model was trained on, code, instead of the bundled documentation.
    """

    name: str
    config: QuantizationConfig
    family: str
    own_texts: bool = False


def _grouped(bits: int) -> tuple[Case, ...]:
    ways = {
        RTN: QuantizationConfig("int4", bits=bits, group_size=GROUP, clip=False),
        "int4": QuantizationConfig("int4", bits=bits, group_size=GROUP),
        "int4, zeros": QuantizationConfig("int4", bits=bits, group_size=GROUP, symmetric=False),
        "gptq": QuantizationConfig("gptq", bits=bits, group_size=GROUP),
        "gptq, zeros": QuantizationConfig("gptq", bits=bits, group_size=GROUP, symmetric=False),
        "awq": QuantizationConfig("awq", bits=bits, group_size=GROUP),
    }
    return tuple(Case(f"{name}, {bits} bits", config, f"{bits} bits") for name, config in ways.items())


CASES = (
    Case("int8", QuantizationConfig("int8"), "8 bits"),
    Case("int8, head too", QuantizationConfig("int8", head_bits=8), "8 bits"),
    Case("smoothquant", QuantizationConfig("smoothquant"), "8 bits"),
    Case("fp8", QuantizationConfig("fp8"), "8 bits"),
    *_grouped(4),
    Case(
        "gptq, zeros, 4 bits, on code",
        QuantizationConfig("gptq", bits=4, group_size=GROUP, symmetric=False),
        "4 bits",
        own_texts=True,
    ),
    Case("gptq, 4 bits, head 8", QuantizationConfig("gptq", bits=4, group_size=GROUP, head_bits=8), "4 bits"),
    Case("gptq, 4 bits, head 4", QuantizationConfig("gptq", bits=4, group_size=GROUP, head_bits=4), "4 bits"),
    *_grouped(3),
)


def measure(quick: bool = False, on_run: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """The quality of every case on held-out text, and the equality of its results.

    Perplexities are compared window by window with those of the model as it comes, whose bfloat16 weights are computed
    with in float32, and with those of rounding to nearest (RTN).

    Args:
        quick: Few tokens, to calibrate on as well: no figure counts.
        on_run: Called after each case.
    """
    from hf_llmopt.demo import load
    from hf_llmopt.demo.corpus import documents, fingerprint, held_out_texts

    full, tokenizer = load()
    sample = Sample.cut(
        full, tokenizer, held_out_texts(), context=128 if quick else None, tokens=512 if quick else TOKENS
    )
    texts = held_out_ids(tokenizer)
    own = [document.text for document in documents("train")]
    random.Random(0).shuffle(own)  # files of one package lie together, and calibration takes the first texts
    inputs = ragged_prompts(PROMPTS, full.config.vocab_size, texts)
    baseline = quality.perplexity(full, sample)
    on_run(BASELINE)
    rtn: dict[str, quality.Perplexity] = {}
    cases = []
    for case in map(_small, CASES) if quick else CASES:
        began = perf_counter()
        model = quantize(full, replace(case.config, calibration=own) if case.own_texts else case.config)
        seconds = perf_counter() - began
        # Equality first: what it needs is small, and a kernel that is wrong makes every other figure worthless.
        found = _equality(case, model, full, inputs)
        rounded = (
            quality.divergence(*_logits_of(model, full, sample), sample) if case.config.head_bits is None else None
        )
        exact, usual = _perplexities(model, sample)
        if case.name.startswith(RTN):
            rtn[case.family] = exact
        base = rtn.get(case.family)
        reasons = found["reasons"]
        if rounded is not None and rounded.rms > INT8_ACTIVATIONS_ERROR * rounded.spread:
            reasons.append(f"logits differ by {rounded.rms:.3f} from those of the dequantized weights")
        cases.append(
            {
                "name": case.name,
                "family": case.family,
                "config": _asked(case.config),
                "quantize_seconds": seconds,
                **memory(model),
                "perplexity": exact.to_dict(),
                "times": asdict(exact.over(baseline)),
                "over_rtn": None if base is None or base is exact else asdict(exact.over(base)),
                "with_int8_activations": {**usual.to_dict(), "times": asdict(usual.over(baseline))},
                "int8_activations_error": None if rounded is None else rounded.rms / rounded.spread,
                "equality": found["equality"],
                "reasons": reasons,
            }
        )
        on_run(case.name)
    return {
        "model": "the embedded model, float32",
        "text": fingerprint(),
        "context": max(len(window.ids) for window in sample.windows) - 1,
        "baseline": baseline.to_dict(),
        "bytes": held(full),
        "cases": cases,
    }


def _small(case: Case) -> Case:
    """The same with a calibration set that is just large enough."""
    if case.config.method not in CALIBRATED:
        return case
    return replace(case, config=replace(case.config, samples=8, length=128))


def _asked(config: QuantizationConfig) -> dict[str, Any]:
    default = asdict(QuantizationConfig())
    return {name: value for name, value in asdict(config).items() if value != default[name] or name == "method"}


def _perplexities(model: PreTrainedModel, sample: Sample) -> tuple[quality.Perplexity, quality.Perplexity]:
    """With the weights' exact products, and as the model runs by default."""
    round_activations(model, False)
    exact = quality.perplexity(model, sample)
    round_activations(model, True)
    return exact, quality.perplexity(model, sample)


def _logits_of(model: PreTrainedModel, full: PreTrainedModel, sample: Sample) -> tuple[Any, Any]:
    dense = dequantized(model, full)
    return quality.logits(model, sample), quality.logits(dense, sample)


def _equality(case: Case, model: PreTrainedModel, full: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Any:
    """Greedy tokens of the kernels, activations as they are, against stock `generate` with the dequantized weights."""
    if case.config.head_bits is not None:
        return {"equality": None, "reasons": []}  # the head's codes are not a weight that stock has
    arguments = {"max_new_tokens": PROMPTS.new_tokens, "do_sample": False, "eos_token_id": None}
    dense = dequantized(model, full)
    expected = generate(dense, inputs, **arguments)
    round_activations(model, False)
    run = generate(model, inputs, llmopt=LLMOptConfig(quantization=case.config), **arguments)
    round_activations(model, True)
    outcome = worst(dense, inputs, expected.output, [run.output])
    reasons = [] if outcome.same else ["other tokens than the dequantized weights"]
    if run.served_by != "llmopt":
        reasons.append(f"transformers served the call: {run.stats.reason if run.stats else ''}")
    return {"equality": outcome.to_dict(), "reasons": reasons}
