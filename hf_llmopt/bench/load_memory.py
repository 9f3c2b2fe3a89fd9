"""How much memory a model needs while it is quantized as it is loaded: measured in a process of its own.

Two kinds count apart. *Own* memory belongs to the process alone. Pages of *mapped* files are shared with every process
that reads them, and the system takes them back when it needs memory: the weights as the files have them pass through
such pages, and those that stay as they are, as an embedding, remain there. What is held against the result is own
memory on both sides.
"""

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
GOAL = 1.25  # times the own memory of the result, plus one layer


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
        found["over"] = (found["peak"] - largest) / (found["bytes"] - found["mapped"])
        found["goal"] = GOAL
    on_run(f"{shape}: memory while it is quantized")
    return found


def load(folder: str, config: QuantizationConfig) -> dict[str, Any]:
    """Load a model quantized, and watch the memory of this process.

    Returns:
        `bytes` of the result and how many of them are `mapped`; `peak` of own memory, and `peak_mapped`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import hf_llmopt

    from .quantized import held

    hf_llmopt.install()
    logging.disable_progress_bar()
    with watching() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", llmopt=LLMOptConfig(quantization=config))
    own, files = peak()
    return {"bytes": held(model), "mapped": mapped(model), "peak": own, "peak_mapped": files}


@contextmanager
def watching() -> Iterator[Callable[[], tuple[int | None, int | None]]]:
    """Watch this process; gives a function that says how far its own and its mapped memory rose.

    `None` for both where nothing can be seen.
    """
    before = resident()
    highest, done = before or (0, 0), Event()

    def look() -> None:
        nonlocal highest
        own, files = resident() or (0, 0)
        highest = max(highest[0], own), max(highest[1], files)

    def watch() -> None:
        while not done.wait(EVERY):
            look()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: (None, None) if before is None else (highest[0] - before[0], highest[1] - before[1])
    finally:
        done.set()
        thread.join()
        look()


def resident() -> tuple[int, int] | None:
    """Bytes of this process's own memory, and of mapped files in memory; `None` on systems other than Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = {
        name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return (found["RssAnon"], found["RssFile"]) if {"RssAnon", "RssFile"} <= found.keys() else None


def mapped(model: Any) -> int:
    """Bytes of a model's parameters and buffers that lie in files; 0 where that cannot be seen."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return 0
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1].endswith(".safetensors")]
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(size for at, size in tensors.items() if any(low <= at < high for low, high in ranges))
