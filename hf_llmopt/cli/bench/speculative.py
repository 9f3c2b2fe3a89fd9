"""`hf-llmopt bench speculative`: guesses that are confirmed, against plain and assisted decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import ui
from ..command import Device, Dtype, UserError
from ..texts import read_text
from .options import Plots, Repeat, Seed, chosen, require_known
from .shown import Ending, ends


@ends
def speculative(
    model: Annotated[str, typer.Option(help="A folder, a name on the hub, or `demo`, the embedded model.")] = "demo",
    draft: Annotated[
        str | None, typer.Option(help="A smaller model of the same tokenizer; the embedded one's by default.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Cut prompts from this text file.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help='"code, 1", "code, 8", "editing, 1", "random, 8", ...; may be repeated.'),
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Instead: a model of this shape, 0.5b say, with random weights, and guesses of a known chance.",
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="With --oracle: int8, int4, fp8 or bfloat16.")] = "int8",
    repeat: Repeat = 5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    plots: Plots = None,
    *,
    ending: Ending,
) -> None:
    """Measure drafts from the text and from a draft model, greedily, on code, on editing and on random tokens.

    Every way interleaved with the others, tokens compared in the same runs. Says nothing about speed and exits with 1
    if tokens differ.
    """
    from hf_llmopt.bench import plots as drawings
    from hf_llmopt.bench import speculative as bench
    from hf_llmopt.bench.workloads import held_out_ids

    if oracle is not None:
        if draft or prompts or workload or plots or model != "demo":
            raise typer.BadParameter("--oracle takes a shape, and no model, prompts or pictures", param_hint="--oracle")
        return _oracle(oracle, weights, repeat, seed, ending)

    from ..models import load as load_model

    ending.require_folders(plots)
    known = {item.name: item for item in (bench.QUICK if ending.quick else bench.WORKLOADS)}
    workloads = chosen("workload", workload, known)
    loaded, tokenizer = load_model(model, dtype, device)
    second = None
    if draft is not None:
        second, _ = load_model(draft, dtype, device)
    elif model == "demo":
        from hf_llmopt import demo

        small: Any = demo.load(draft=True, dtype=loaded.dtype)[0]
        second = small.to(loaded.device)
    if prompts is None:
        texts = held_out_ids(tokenizer)
    else:
        ids = tokenizer(read_text(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(item.tokens for item in workloads)
        texts = [ids[start : start + longest] for start in range(0, len(ids) - longest + 1, longest)]
        if not texts:
            raise UserError(f"{prompts} has {len(ids)} tokens, and a prompt has {longest}")
    runs = sum(len(bench.ways_of(item, second)) for item in workloads) * (repeat + 1)
    with ui.progress("speculative", runs) as on_run:
        report = bench.bench(
            loaded,
            second,
            workloads,
            texts=texts,
            repeats=repeat,
            seed=seed,
            on_run=lambda name, way: on_run(f"{name}, {way}"),
        )
    report["model"]["name"] = model
    ending.record(report)
    if plots is not None:
        (plots / "speculative.svg").write_text(drawings.speculation(report), "utf-8")
    failures = [f"{item['name']}: {reason}" for item in report["workloads"] for reason in item["reasons"]]
    ending.show(report, [bench.table(report)], failures)


def _oracle(
    shape: str,
    weights: str,
    repeat: int,
    seed: int,
    ending: Ending,
) -> None:
    from hf_llmopt.bench import speculative_oracle as bench
    from hf_llmopt.bench.quantized import METHODS
    from hf_llmopt.bench.workloads import SHAPES

    ending.require_folders()
    require_known("shape", [shape], SHAPES)
    require_known("weights", [weights], ["bfloat16", *METHODS])
    with ui.progress("speculative", len(bench.ROWS) * (1 + len(bench.RIGHT)) * (repeat + 1)) as on_run:
        report = bench.bench(
            shape,
            None if weights == "bfloat16" else weights,
            new_tokens=8 if ending.quick else 64,
            repeats=repeat,
            seed=seed,
            miniature=ending.quick,
            on_run=on_run,
        )
    ending.record(report)
    failures = [
        f"{case['rows']} rows: other tokens than plain decoding" for case in report["cases"] if not case["passed"]
    ]
    ending.show(report, bench.tables(report), failures)
