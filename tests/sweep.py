"""Try every architecture that transformers can generate text with, and write what came of it: `make models`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "equality"))

import torch
from compare import counted_updates
from tiny_models import CAUSAL, IMAGES, architectures_of, build, with_images
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_llmopt.bench import environment
from hf_llmopt.bench.models import NOT_TRIED, Trial, tried

REPORT = Path(__file__).parent.parent / "docs" / "results" / "models.json"
TEXT = "Language models"
TEXT_TO_IMAGES = "Models that read images: prompts of text"
WITH_IMAGES = "Models that read images: prompts with an image"


def sweep(names: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """What came of each model type, the fields of `Trial` and its class, by title and model type.

    Args:
        names: Model types; all by default.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, Any]]] = {TEXT: {}, TEXT_TO_IMAGES: {}, WITH_IMAGES: {}}
    for kind in (CAUSAL, IMAGES):
        for name in architectures_of(kind):
            if names is None or name in names:
                for title, outcome in _outcomes(name, kind):
                    found[title][name] = outcome
    torch.set_num_threads(threads)
    return found


def _outcomes(name: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    titles = (TEXT,) if kind == CAUSAL else (TEXT_TO_IMAGES, WITH_IMAGES)
    try:
        model = build(name, kind)
    except Exception as error:  # whatever a config or a model raises, the reason is what is wanted
        yield from ((title, _told(_not_tried(error), None)) for title in titles)
        return
    text = tried(model, updates=counted_updates)
    yield titles[0], _told(text, model)
    if kind == IMAGES:
        try:
            images = tried(model, with_images(model))  # its own pass computes the prompt
        except ValueError as error:
            images = _not_tried(error)
        yield WITH_IMAGES, _told(images, model)


def _not_tried(error: Exception) -> Trial:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Trial(NOT_TRIED, reason=f"{type(error).__name__}: {lines[-1][:160]}")


def _told(trial: Trial, model: PreTrainedModel | None) -> dict[str, Any]:
    return {**asdict(trial), "limits": list(trial.limits), "class": "" if model is None else type(model).__name__}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    models = sweep(sys.argv[1:] or None)
    if sys.argv[1:]:
        print(json.dumps(models, indent=1))
    else:
        report = {"bench": "models", "passed": True, "models": models, "environment": environment()}
        REPORT.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", "utf-8")
