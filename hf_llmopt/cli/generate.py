"""`hf-llmopt generate`: complete one prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from . import ui
from .command import (
    Device,
    Dtype,
    Json,
    Llmopt,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    UserError,
    keyword,
    sampling,
)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to complete; - reads it from stdin.")],
    llmopt: Llmopt = "true",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Complete a prompt; the text is streamed to stdout, the figures go to stderr."""
    wanted = keyword(llmopt)
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()

    import torch

    from hf_llmopt import bench

    from .figures import figures, line
    from .models import load
    from .streams import Writer

    loaded, tokenizer = load(model, dtype, device, wanted)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise UserError("the prompt is empty; give at least one character")
    arguments = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_k, top_p)}
    if stop:
        arguments |= {"stop_strings": stop, "tokenizer": tokenizer}
    if seed is not None:
        torch.manual_seed(seed)
    streamer = Writer(tokenizer, (lambda piece: None) if json else ui.write)
    run = bench.generate(loaded, inputs.to(loaded.device), llmopt=wanted, streamer=streamer, **arguments)
    if json:
        ui.emit(
            {
                "model": model,
                "prompt": prompt,
                "text": streamer.text,
                "tokens": run.output[0, run.prompt_length :].tolist(),
                **figures(run),
            }
        )
    else:
        ui.say()
        ui.talk(line(run))
