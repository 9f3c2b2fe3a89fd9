"""How much memory a model needs while it is quantized as it is loaded: measured in a process of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

from hf_llmopt.config import LLMOptConfig, QuantizationConfig

EVERY = 0.002  # seconds between two looks
GOAL = 1.25  # times the result, plus one layer


def measure(
    shape: str, config: QuantizationConfig, quick: bool = False, on_run: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """The peak of memory while a model of a known shape is quantized from its files.

    Args:
        shape: A name in `workloads.SHAPES`; its weights are random, bfloat16.
        config: How it is quantized.
        quick: A miniature.
        on_run: Called once.
    """
    import torch

    from .workloads import build

    with TemporaryDirectory() as folder:
        model = build(shape, torch.bfloat16, miniature=quick)
        full = sum(p.numel() * p.element_size() for p in model.parameters())
        products = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        tied = model.get_input_embeddings()
        largest = max(w.numel() * w.element_size() for w in products if w is not getattr(tied, "weight", None))
        model.save_pretrained(folder)
        del model, products
        gc.collect()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(load, folder, config).result()
    found |= {"shape": shape, "method": config.method, "bytes_before": full, "largest_product": largest}
    if found["peak"] is not None:
        found["over"] = (found["peak"] - largest) / found["bytes"]
        found["goal"] = GOAL
    on_run(f"{shape}: memory while it is quantized")
    return found


def load(folder: str, config: QuantizationConfig) -> dict[str, Any]:
    """Load a model quantized, and watch the memory of this process; not its files, which are mapped."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import hf_llmopt

    from .quantized import held

    hf_llmopt.install()
    logging.disable_progress_bar()
    with watching() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", llmopt=LLMOptConfig(quantization=config))
    return {"bytes": held(model), "peak": peak()}


@contextmanager
def watching() -> Iterator[Callable[[], int | None]]:
    """Watch this process; gives a function that says how far its memory rose, `None` where nothing can be seen."""
    before = anonymous()
    highest, done = before or 0, Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(EVERY):
            highest = max(highest, anonymous() or 0)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: None if before is None else highest - before
    finally:
        done.set()
        thread.join()
        highest = max(highest, anonymous() or 0)


def anonymous() -> int | None:
    """Bytes of memory of this process that belong to no file; `None` on systems other than Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)
