"""`hf-llmopt batch`: many requests from a file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import ui
from .command import Device, Dtype, MaxModelLen, ServedLlmopt, TensorParallel, UserError, keyword
from .service import end_if_lost, room

if TYPE_CHECKING:
    from hf_llmopt.serving.batch import Work
    from hf_llmopt.serving.recipe import Recipe

INTERRUPTED = 130  # as shells have it


def batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT.jsonl", help="Requests in OpenAI's batch format, one a line.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUTPUT.jsonl", help="Their results; if it is there, the run goes on.")
    ],
    model: Annotated[str, typer.Option(help="A folder, a name on the hub, or `demo` for the embedded model.")] = "demo",
    llmopt: ServedLlmopt = "true",
    served_name: Annotated[str | None, typer.Option(help="What requests call the model; by default MODEL.")] = None,
    max_model_len: MaxModelLen = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            metavar="hermes|llama3_json|mistral|none",
            help="How the model writes tool calls; by default its chat template tells.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Drop results that are errors, and run their requests again.")
    ] = False,
    tensor_parallel: TensorParallel = 1,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Answer the requests of a file. The same command again goes on after any end, kill -9 too.

    A request that fails has its error as its result; the others go on.

    Exit codes: 0 all requests of the file are answered, 1 some have an error as result or nothing could run, 2 usage,
    130 stopped by Ctrl-C.
    """
    wanted = keyword(llmopt)
    if wanted is False:
        raise UserError("--llmopt false is stock transformers, which serves no batches")
    if not source.is_file():
        raise UserError(f"there is no file {str(source)!r}")

    room()
    from hf_llmopt.serving import batch as batches
    from hf_llmopt.serving.recipe import Recipe
    from hf_llmopt.serving.service import check_parser

    check_parser(tool_parser)
    recipe = Recipe(
        model=model,
        llmopt=wanted,
        dtype=dtype,
        device=device,
        served_name=served_name,
        max_model_len=max_model_len,
        tool_parser=tool_parser,
        tensor_parallel=tensor_parallel,
    )
    try:
        with batches.begun(source, target, recipe.setting, retry_failed) as work:
            counts = work.counts
            if counts.before < counts.total:
                _answer(recipe, work)
    except KeyboardInterrupt:
        ui.talk("stopped; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    kept = f", {counts.before} were there" if counts.before else ""
    again = "; the same command with --retry-failed runs those again" if counts.failed else ""
    ui.talk(f"{counts.answered} of {counts.total} requests answered{kept}; {counts.failed} of all have an error{again}")
    if counts.failed:
        raise typer.Exit(1)


def _answer(recipe: Recipe, work: Work) -> None:
    """Answer the requests that have no result yet."""
    import asyncio

    from hf_llmopt.batching.generate_batch import room as places
    from hf_llmopt.serving import batch as batches

    service = recipe.service()
    try:
        with closing(service), ui.progress("requests", work.counts.total) as tick:

            def tell(counts: batches.Counts, new: int) -> None:
                tick(f"{counts.failed} failed", new)

            asyncio.run(batches.run(work, batches.answerer(service), places(service.engine), tell))
    finally:
        end_if_lost(service)
