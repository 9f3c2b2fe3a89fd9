"""The same work on everything that is installed: stock transformers in all its modes, OpenVINO, llama.cpp, and ours.

All in one process, interleaved, with as many threads: the same prompts, the same number of tokens, greedy. Ways that
compute with the model's own numbers have its very weights, and their tokens are compared; llama.cpp has weights of the
same shape and format, whose codes are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from hf_llmopt import LLMOptConfig, PromptCacheConfig
from hf_llmopt.generation import handle_of

from . import llama_cpp, openvino
from .equality import worst
from .kv_cache import describe
from .measure import environment, generate, interleave, paired_ratio, summary
from .quantized import METHODS, quantize
from .report import Table, machine_text, model_text, ratio_text, same_text
from .requests import Job, batched

STOCK, OURS, LATENCY = "stock", "llmopt=True", "llmopt='latency'"
OPENVINO, LLAMA = "OpenVINO", "llama.cpp"
ELSEWHERE = {
    "optimum-intel": "it asks for transformers before 5.6, and ours is later; OpenVINO is measured directly",
    "vLLM": "it serves GPUs, in an environment of its own; docs/benchmarks.md has the command",
}
Answer = tuple[list[list[int]], float, "float | None"]  # new tokens by row, seconds, those to the first token
Call = Callable[[], Answer]


_RUNS = count()


@dataclass(frozen=True)
class Work:
    """Prompts of one length, and how many tokens each way has to give for each."""

    rows: int
    prompt: int = 128
    new_tokens: int = 33

    @property
    def name(self) -> str:
        """Says it in a table."""
        return f"{self.rows} x {self.prompt} + {self.new_tokens} tokens"


WORKS = (Work(1), Work(8))
QUICK = (Work(1, 8, 6), Work(2, 8, 6))


def bench(
    model: PreTrainedModel,
    draft: PreTrainedModel | None = None,
    works: Sequence[Work] = WORKS,
    *,
    repeats: int = 3,
    seed: int = 0,
    compiled: bool = False,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure every peer that is here.

    Args:
        model: On the CPU.
        draft: A smaller one of the same vocabulary, for stock's assisted decoding; `None` for none.
        works: What is generated.
        repeats: Timed runs of each way, interleaved, after one that is not timed.
        seed: Of the prompts.
        compiled: Also stock's static cache with torch.compile, which takes minutes to begin.
        on_run: Called with what has run.

    Returns:
        The report, ready for JSON; `report["passed"]` says whether our tokens were stock's. `report["missing"]` says
        which peers are not here, and `"refused"` of each group which did not run, and why.
    """
    missing = {**absent(model), **ELSEWHERE}
    cases = []
    with TemporaryDirectory() as folder:
        traced = None if OPENVINO in missing else openvino.Peer(model, torch.get_num_threads())
        for work in works:
            rng = torch.Generator().manual_seed(seed + work.rows)
            embeddings: Any = model.get_input_embeddings()
            ids = torch.randint(1, embeddings.weight.shape[0], (work.rows, work.prompt), generator=rng)
            say = partial(_say, on_run, work.name)
            ways = dict(_full(model, draft, traced, ids, work, compiled))
            case = {"name": work.name, **asdict(work), "groups": [_group(model, ids, work, ways, repeats, say)]}
            if LLAMA not in missing:
                for kind, method in llama_cpp.FORMATS.items():
                    case["groups"].append(_llama(model, kind, method, Path(folder), ids, work, repeats, say))
            cases.append(case)
    reasons = [f"{case['name']}: {reason}" for case in cases for group in case["groups"] for reason in group["reasons"]]
    return {
        "bench": "peers",
        "schema": 1,
        "seed": seed,
        "repeats": repeats,
        "environment": environment(),
        "peers": {name: version(package) for name, package in _packages().items() if name not in missing},
        "missing": missing,
        "model": describe(model),
        "cases": cases,
        "reasons": reasons,
        "passed": not reasons,
    }


def runs_of(
    model: PreTrainedModel, draft: PreTrainedModel | None, works: Sequence[Work], repeats: int, compiled: bool
) -> int:
    """How often `bench` calls `on_run`, where nobody refuses."""
    missing = absent(model)
    alone = 5 + compiled + (OPENVINO not in missing) + 2 * len(llama_cpp.FORMATS) * (LLAMA not in missing)
    return sum((alone + (1 + (draft is not None)) * (work.rows == 1)) * (repeats + 1) for work in works)


def absent(model: PreTrainedModel) -> dict[str, str]:
    """Which peers cannot run here, and why."""
    found = {}
    lacking = [name for name in llama_cpp.NEEDED if find_spec(name) is None]
    if lacking:
        found[LLAMA] = f"{', '.join(lacking)} not installed; pip install llama-cpp-python gguf"
    elif model.config.model_type not in llama_cpp.KNOWN:
        found[LLAMA] = f"its file is written for {' and '.join(llama_cpp.KNOWN)}, not for {model.config.model_type}"
    if find_spec("openvino") is None:
        found[OPENVINO] = "openvino not installed; pip install openvino"
    return found


def _packages() -> dict[str, str]:
    return {LLAMA: "llama-cpp-python", OPENVINO: "openvino"}


def _say(on_run: Callable[[str], None], where: str, what: str) -> None:
    on_run(f"{where}: {what}")


# ---------------------------------------------------------------------------------------------------------------- ways


def _full(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    traced: openvino.Peer | None,
    ids: Tensor,
    work: Work,
    compiled: bool,
) -> Iterator[tuple[str, Call]]:
    """What computes with the model's own numbers."""
    call = partial(_generate, model, ids, work)
    yield STOCK, call
    yield "stock, static cache", partial(call, cache_implementation="static")
    if compiled:
        config = CompileConfig()
        config._compile_all_devices = True  # type: ignore[assignment]  # else only on GPUs
        yield "stock, static cache, compiled", partial(call, cache_implementation="static", compile_config=config)
    yield "stock, continuous batching", partial(_batched, model, ids, work)
    if work.rows == 1:
        yield "stock, prompt lookup", partial(call, prompt_lookup_num_tokens=10)
        if draft is not None:
            yield "stock, assistant", partial(call, assistant_model=draft)
    if traced is not None:
        yield OPENVINO, partial(traced.generate, ids, work.new_tokens)
    yield OURS, partial(call, llmopt=True)
    yield LATENCY, partial(call, llmopt="latency")


def _generate(model: PreTrainedModel, ids: Tensor, work: Work, **arguments: Any) -> Answer:
    keyword = LLMOptConfig.parse(arguments.get("llmopt"))
    if keyword is not None:  # the prompt is the same in every run, and is to be computed in every run
        salt = PromptCacheConfig(salt=f"run {next(_RUNS)}")
        arguments["llmopt"] = replace(keyword, prompt_cache=salt)
    run = generate(model, _inputs(ids), **{**_greedy(work.new_tokens), **arguments})
    if keyword is not None and run.served_by != "llmopt":
        raise RuntimeError(f"transformers served the call: {run.stats.reason if run.stats else ''}")
    return run.output[:, run.prompt_length :].tolist(), run.seconds, run.time_to_first_token


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _batched(model: PreTrainedModel, ids: Tensor, work: Work) -> Answer:
    done = batched(model, [Job(row, work.new_tokens) for row in ids.tolist()])
    return done.tokens, done.seconds, None


def _llama(
    model: PreTrainedModel,
    kind: str,
    method: str,
    folder: Path,
    ids: Tensor,
    work: Work,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """llama.cpp and ours, both with quantized weights, the output head too."""
    path = folder / f"{kind}.gguf"
    if not path.exists():
        llama_cpp.write(path, model.config, kind)
    quantized = quantize(model, METHODS[method])
    with ExitStack() as stack:
        room = work.prompt + work.new_tokens
        peer = stack.enter_context(llama_cpp.Peer(path, work.rows, torch.get_num_threads(), room))
        ways: dict[str, Call] = {
            f"{LLAMA}, {kind}": partial(peer.generate, ids.numpy(), work.new_tokens),
            OURS: partial(_generate, quantized, ids, work, llmopt=True),
        }
        return _group(quantized, ids, work, ways, repeats, say, numbers=f"{kind}; {method}")


# --------------------------------------------------------------------------------------------------------- measurement


def _group(
    model: PreTrainedModel,
    ids: Tensor,
    work: Work,
    ways: Mapping[str, Call],
    repeats: int,
    say: Callable[[str], None],
    numbers: str | None = None,
) -> dict[str, Any]:
    """Ways that are compared with one another, interleaved."""
    refused, setup, ready = {}, {}, {}
    for name, way in ways.items():
        began = perf_counter()
        try:
            way()
        except Exception as error:  # whatever a peer says, the others go on
            if name in (STOCK, OURS):
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            setup[name], ready[name] = perf_counter() - began, way
        say(name)
    runs = interleave(ready, repeats, say)
    handle_of(model).release()
    equality, reasons = {}, []
    if STOCK in runs:
        expected = torch.cat([ids, torch.tensor(runs[STOCK][0][0])], 1)
        for name, found in runs.items():
            outputs = [torch.cat([ids, torch.tensor(tokens)], 1) for tokens, _, _ in found]
            equality[name] = worst(model, _inputs(ids), expected, outputs).to_dict()
        reasons = [f"{name}: other tokens than stock" for name in (OURS, LATENCY) if not equality[name]["same"]]
    reasons += [
        f"{name}: not {work.new_tokens} new tokens"
        for name, found in runs.items()
        if any(len(row) != work.new_tokens for tokens, _, _ in found for row in tokens)
    ]
    return {
        "numbers": numbers or str(model.dtype).removeprefix("torch."),
        "ways": {name: _figures(found, work, setup[name]) for name, found in runs.items()},
        "equality": equality,
        "refused": refused,
        "reasons": reasons,
        # How many times as fast ours is. Nothing is said about speed unless the tokens are the same.
        "ratios": {}
        if reasons
        else {
            name: asdict(paired_ratio([run[1] for run in found], [run[1] for run in runs[OURS]]))
            for name, found in runs.items()
            if name != OURS
        },
    }


def _figures(runs: Sequence[Answer], work: Work, setup: float) -> dict[str, Any]:
    steps = [1e3 * (seconds - first) / (work.new_tokens - 1) for _, seconds, first in runs if first is not None]
    return {
        "first_call_seconds": setup,
        "seconds": summary(seconds for _, seconds, _ in runs),
        "tokens_per_second": summary(work.rows * work.new_tokens / seconds for _, seconds, _ in runs),
        "time_to_first_token": summary(first for _, _, first in runs if first is not None) if steps else None,
        "ms_per_step": summary(steps) if steps else None,
    }


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of a report: every way, and who is missing.

    Args:
        report: As `bench` returned it, or as read back from JSON.
    """
    rows = []
    for case in report["cases"]:
        for group in case["groups"]:
            for name, way in group["ways"].items():
                first, step = way["time_to_first_token"], way["ms_per_step"]
                rows.append(
                    [
                        case["name"],
                        f"{name} ({group['numbers']})",
                        f"{way['tokens_per_second']['median']:.1f}",
                        f"{1e3 * first['median']:.0f}" if first else "",
                        f"{step['median']:.2f}" if step else "",
                        same_text(group["equality"][name]) if name in group["equality"] else "",
                        ratio_text(group["ratios"].get(name)),
                    ]
                )
            rows += [
                [case["name"], f"{name} ({group['numbers']})", "did not run", "", "", "", ""]
                for name in group["refused"]
            ]
    columns = ["work", "way", "tokens/s", "first token ms", "ms/step", "stock's tokens", "llmopt=True is × as fast"]
    refused = {
        name: why for case in report["cases"] for group in case["groups"] for name, why in group["refused"].items()
    }
    versions = ", ".join(f"{name} {number}" for name, number in report["peers"].items())
    caption = (
        f"{model_text(report['model'])}; {machine_text(report['environment'])}, {report['environment']['threads']} "
        f"threads; {versions + '; ' if versions else ''}greedy, the same prompts and lengths for all; medians of "
        f"{report['repeats']} interleaved runs; × is the geometric mean of paired ratios of whole calls, with its 95 % "
        "interval; llama.cpp has random codes of the same shape and format"
    )
    if report.get("quick"):
        caption = "few tokens of everything: no figure counts; " + caption
    absent = [[name, why] for name, why in {**report["missing"], **refused}.items()]
    return [
        Table("peers: the same work", columns, rows, 2, caption),
        Table("peers: not measured", ["peer", "why"], absent, 2),
    ]
