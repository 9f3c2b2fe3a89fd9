"""`hf-llmopt check`: whether a model is served exactly, by trying it."""

from __future__ import annotations

from dataclasses import asdict

import typer

from . import ui
from .command import Device, Json, Model


def check(model: Model, device: Device = None, json: Json = False) -> None:
    """Generate with a model in both ways and say how it is served. Weights are loaded in float32, without quantization.

    Ends with exit code 1 unless llmopt serves the model with the tokens of transformers.
    """
    from transformers.utils import logging

    from hf_llmopt.bench.models import EXACTLY, LIMITED, tried

    from .models import load_model, place

    loaded = place(load_model(model, "float32"), device)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns of padding on the right, which is tried on purpose
    try:
        trial = tried(loaded)
    finally:
        logging.set_verbosity(verbosity)
    if json:
        ui.emit({"model": model, **asdict(trial)})
    else:
        ui.say(f"{model}: served {trial.served}")
        for line in trial.limits or filter(None, [trial.reason]):
            ui.say(f"  {line}")
    if trial.served not in (EXACTLY, LIMITED):
        raise typer.Exit(1)
