"""What guesses of a known chance give on a model of random weights, where nothing real can be guessed.

On the CPU, where a pass can be asked to add in one order whatever it computes: so tokens are equal in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt import LLMOptConfig, SpeculativeConfig, Stats
from hf_llmopt.engine.proof import pass_seconds
from hf_llmopt.generation import handle_of

from .kv_cache import describe
from .measure import environment, interleave, paired_ratio, summary
from .oracle import Oracle
from .quantized import METHODS, quantize
from .report import Table, machine_text, model_text, ratio_text
from .workloads import Workload, build, ragged_prompts

PLAIN = "plain"
RIGHT = (0.7, 0.9)  # chances of the oracle
ROWS = (1, 8)
SPANS = (1, 2, 4, 8, 16)  # tokens of the passes that are timed by themselves
PROMPT = 64  # tokens


@dataclass(frozen=True)
class _Run:
    output: Tensor
    stats: Stats

    @property
    def ms_per_token(self) -> float:
        """Of each row, behind its first token."""
        new = self.stats.generated_tokens / len(self.output)
        return 1e3 * (self.stats.seconds - self.stats.time_to_first_token) / (new - 1)


def bench(
    shape: str,
    weights: str | None,
    *,
    rows: Sequence[int] = ROWS,
    rights: Sequence[float] = RIGHT,
    new_tokens: int = 64,
    repeats: int = 5,
    seed: int = 0,
    miniature: bool = False,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure plain decoding, and decoding with an oracle's guesses as many as pay; and what passes take.

    Args:
        shape: A name in `workloads.SHAPES`.
        weights: A name in `quantized.METHODS`, or `None` for bfloat16.
        rows: Numbers of prompts.
        rights: Chances of the oracle's guesses to be right.
        new_tokens: For each prompt.
        repeats: Timed runs of each way, interleaved.
        seed: Of weights and prompts.
        miniature: See that it works.
        on_run: Called after each run.

    Returns:
        The report, ready for JSON.
    """
    model = build(shape, torch.bfloat16, seed, miniature=miniature)
    config = LLMOptConfig(batch_invariant=True)
    if weights is not None:
        model, config = quantize(model, METHODS[weights]), replace(config, quantization=METHODS[weights])
    runner = handle_of(model).engine_for(model, config).runner
    with torch.no_grad():
        passes = interleave({str(span): partial(pass_seconds, runner, span) for span in SPANS}, repeats)
    single = [1e3 * seconds for seconds in passes["1"]]
    timed = {
        span: {"ms": summary(own := [1e3 * seconds for seconds in found]), "over": _over(own, single)}
        for span, found in passes.items()
    }
    cases = [_case(model, config, count, rights, new_tokens, repeats, seed, on_run) for count in rows]
    return {
        "bench": "speculative_oracle",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "environment": environment(),
        "shape": shape,
        "weights": weights or "bfloat16",
        "model": describe(model),
        "passes": timed,
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }


def _case(
    model: PreTrainedModel,
    config: LLMOptConfig,
    rows: int,
    rights: Sequence[float],
    new_tokens: int,
    repeats: int,
    seed: int,
    on_run: Callable[[str], None],
) -> dict[str, Any]:
    work, vocabulary = Workload(f"{rows} rows", rows, new_tokens, PROMPT, PROMPT), model.config.vocab_size
    inputs = {name: value.to(model.device) for name, value in ragged_prompts(work, vocabulary, None, seed).items()}
    plain = partial(_run, model, inputs, new_tokens, config, None)
    expected = plain().output
    ways, drafting = {PLAIN: plain}, replace(config, speculative=SpeculativeConfig())
    for right in rights:
        oracle = Oracle(expected.tolist(), right, vocabulary, seed=seed)
        ways[f"{right:.0%}"] = partial(_run, model, inputs, new_tokens, drafting, oracle)
    for name, way in ways.items():
        way()
        on_run(f"{rows} rows, {name}")
    runs = interleave(ways, repeats, lambda name: on_run(f"{rows} rows, {name}"))
    found: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        ms = [run.ms_per_token for run in each]
        same = all(torch.equal(run.output, expected) for run in each)
        found[name] = {
            "ms_per_token": summary(ms),
            "steps": sum(run.stats.steps for run in each),
            "drafted_tokens": sum(run.stats.drafted_tokens for run in each),
            "accepted_tokens": sum(run.stats.accepted_tokens for run in each),
            "same": same,
            "over": _over([run.ms_per_token for run in runs[PLAIN]], ms) if same and name != PLAIN else None,
        }
    passed = all(way["same"] for way in found.values())
    return {"rows": rows, "new_tokens": new_tokens, "ways": found, "passed": passed}


def _over(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float | None]:
    """How many times the one is the other."""
    ratio = paired_ratio(slow, fast)
    return {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}


def _run(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    new_tokens: int,
    config: LLMOptConfig,
    oracle: Oracle | None,
) -> _Run:
    if oracle is not None:
        speculator = handle_of(model).engine_for(model, config).speculator
        assert speculator is not None
        speculator.drafter = oracle
    call: Any = model.generate
    output = call(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, llmopt=config)
    stats = handle_of(model).stats
    assert stats is not None
    return _Run(output.cpu(), stats)


def tables(report: dict[str, Any]) -> list[Table]:
    """What passes take, and what guesses give."""
    where = f"{machine_text(report['environment'])}; {report['shape']}, {report['weights']} weights, random"
    passes = [
        [span, f"{each['ms']['median']:.1f}", ratio_text(each["over"])] for span, each in report["passes"].items()
    ]
    rows = []
    for case in report["cases"]:
        for name, way in case["ways"].items():
            tokens = case["new_tokens"] * report["repeats"]
            rows.append(
                [
                    str(case["rows"]),
                    name if name == PLAIN else f"guesses right {name}",
                    f"{way['ms_per_token']['median']:.1f}",
                    f"{tokens / way['steps']:.2f}",
                    f"{way['accepted_tokens']} of {way['drafted_tokens']}" if way["drafted_tokens"] else "",
                    "yes" if way["same"] else "NO",
                    ratio_text(way["over"]),
                ]
            )
    title = f"speculative, an oracle: {model_text(report['model'])}"
    columns = ["rows", "way", "ms/token", "tokens/step", "right", "same tokens", "× plain"]
    return [
        Table("a pass over so many tokens of a request", ["tokens", "ms", "× a single one"], passes, 1, where),
        Table(
            title, columns, rows, 2, f"{where}; greedy, behind the first token; {report['repeats']} interleaved runs"
        ),
    ]
