"""Timing of `generate` calls: interleaved, paired, with an interval; and the record of what they ran on."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_llmopt
from hf_llmopt.engine.graphs import OFTEN
from hf_llmopt.generation import handle_of

T = TypeVar("T")

PACKAGES = ("torch", "transformers", "triton", "accelerate", "tokenizers", "safetensors", "numpy", "psutil")
NOT_SLOWER = 0.97  # least lower bound of a ratio that still counts as "not slower"


class Clock(BaseStreamer):
    """A streamer that notes when each step's tokens arrive, and hands them on.

    Args:
        inner: Gets everything the clock gets, or `None`.
    """

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.times: list[float] = []  # the first is the prompt's

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with every step's tokens."""
        self.times.append(perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """Called by `generate` after the last step."""
        if self.inner is not None:
            self.inner.end()


@dataclass(frozen=True)
class Run:
    """One timed `generate` call.

    Attributes:
        output: Prompt and new tokens `[rows, length]`, on the CPU.
        prompt_length: Columns of the prompt.
        seconds: Wall time of the call.
        time_to_first_token: Seconds from the call's start to the first sampled tokens.
        ms_per_step: Mean milliseconds between two steps' tokens, the first step left out; 0 for a single step.
        stats: What llmopt says about the call; `None` for a stock call.
    """

    output: Tensor
    prompt_length: int
    seconds: float
    time_to_first_token: float
    ms_per_step: float
    stats: hf_llmopt.Stats | None = None

    @property
    def new_tokens(self) -> int:
        """Sampled tokens of all rows, padding behind a finished row included."""
        return self.output.shape[0] * (self.output.shape[1] - self.prompt_length)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole call's wall time."""
        return self.new_tokens / self.seconds

    @property
    def served_by(self) -> str:
        """`"llmopt"` or `"transformers"`."""
        return self.stats.served_by if self.stats is not None else "transformers"


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    llmopt: Any = False,
    streamer: Any = None,
    **arguments: Any,
) -> Run:
    """Call `model.generate` and take the time.

    Args:
        model: The model.
        inputs: `input_ids` and `attention_mask`, `[rows, length]`.
        llmopt: As in `generate`; stock by default, whatever the model's own default is.
        streamer: Also gets the tokens; the time it takes counts.
        arguments: Further arguments of `generate`.
    """
    clock = Clock(streamer)
    began = perf_counter()
    output = model.generate(**inputs, llmopt=llmopt, streamer=clock, **arguments)  # type: ignore[operator]
    seconds = perf_counter() - began
    steps = clock.times[1:] or [began + seconds]
    first, last = steps[0], steps[-1]
    return Run(
        output=output.cpu(),
        prompt_length=inputs["input_ids"].shape[1],
        seconds=seconds,
        time_to_first_token=first - began,
        ms_per_step=1e3 * (last - first) / (len(steps) - 1) if len(steps) > 1 else 0.0,
        stats=handle_of(model).stats if llmopt else None,
    )


def meet(model: PreTrainedModel, inputs: Mapping[str, Tensor], **arguments: Any) -> None:
    """Compute a single prompt as often as a GPU's graphs want to meet its kind before they replay it.

    Args:
        model: The model.
        inputs: As for `generate`.
        arguments: Likewise.
    """
    if model.device.type == "cuda" and len(inputs["input_ids"]) == 1 and arguments.get("llmopt"):
        for _ in range(OFTEN + 2):
            generate(model, inputs, **{**arguments, "max_new_tokens": 1})


def interleave(
    ways: Mapping[str, Callable[[], T]], repeats: int, on_run: Callable[[str], None] = lambda name: None
) -> dict[str, list[T]]:
    """Run every way `repeats` times, one after the other, every second round in reverse order.

    What the machine does beside us then falls on all ways alike, and run i of one way pairs with run i of another.

    Args:
        ways: What to run, by name.
        repeats: Rounds.
        on_run: Called with the name after every run.

    Returns:
        The results of every way, in the order of the rounds.

    Example:
        >>> interleave({"a": lambda: 1, "b": lambda: 2}, repeats=2)
        {'a': [1, 1], 'b': [2, 2]}
    """
    results: dict[str, list[T]] = {name: [] for name in ways}
    gc.collect()
    gc.freeze()  # what there is now, torch's and transformers' modules above all, is not looked through each time
    try:
        for number in range(repeats):
            for name in ways if number % 2 == 0 else reversed(list(ways)):
                gc.collect()
                results[name].append(ways[name]())
                on_run(name)
    finally:
        gc.unfreeze()
    return results


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one way is as another.

    Attributes:
        ratio: Geometric mean of the paired ratios.
        low: Lower end of the 95 % confidence interval; `None` for a single pair, which has no interval.
        high: Its upper end.
    """

    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def not_slower(self) -> bool:
        """Whether the interval's lower end is at least 0.97."""
        return self.low is not None and self.low >= NOT_SLOWER

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.ratio:.2f}"
        low, high = (f"{end:.2f}" if end < 1000 else f"{end:.0e}" for end in (self.low, self.high))
        return f"{self.ratio:.2f} [{low}, {high}]"


def paired_ratio(baseline: Sequence[float], way: Sequence[float]) -> Ratio:
    """How many times as fast `way` is, from paired seconds: Student's t on the logarithms of the ratios.

    A bootstrap of five pairs is too narrow an interval; t is right if the logarithms are about normal.

    Args:
        baseline: Seconds of the way to compare with.
        way: Seconds of the way that is judged; entry i ran beside entry i of `baseline`.

    Example:
        >>> str(paired_ratio([2.0, 2.2, 1.8], [1.0, 1.0, 1.0]))
        '1.99 [1.55, 2.56]'
    """
    logs = np.log(np.asarray(baseline, dtype=float) / np.asarray(way, dtype=float))
    mean, freedom = float(logs.mean()), len(logs) - 1
    if freedom == 0:
        return Ratio(float(np.exp(mean)))
    half = t_quantile(freedom) * float(logs.std(ddof=1)) / len(logs) ** 0.5
    return Ratio(float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half)))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964  # Cornish-Fisher expansion around the normal quantile; right to four digits from here on
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + third


def summary(samples: Iterable[float]) -> dict[str, Any]:
    """A figure in a report: the median and every sample.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        {'median': 2.0, 'samples': [3.0, 1.0, 2.0]}
    """
    samples = list(samples)
    return {"median": float(np.median(samples)), "samples": samples}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step of a single row reads; an embedding that is no head does not count.

    Of a sharded model, those of this process.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    unread = None if head is not None and head.weight is embeddings.weight else embeddings.weight
    read = [weight for weight in model.parameters() if weight is not unread]
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in read)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache that `generate` returned; 0 if there is none."""
    tensors = [
        tensor
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Hardware:
    """What computes.

    Attributes:
        cpu: The processor's name.
        cores: Cores this process may use.
        memory: Bytes of main memory.
        gpus: Names of the CUDA devices.
    """

    cpu: str
    cores: int
    memory: int
    gpus: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join([f"{self.cores} cores of {self.cpu}", *self.gpus])


def hardware() -> Hardware:
    """Look at the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Hardware(
        _cpu_name(), cores, psutil.virtual_memory().total, [torch.cuda.get_device_name(device) for device in devices]
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and what it stands on; `None` for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "hf_llmopt": hf_llmopt.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """What a report says about where it was made: hardware, system, threads, versions, revision."""
    machine = hardware()
    return {
        "hardware": str(machine),
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_bytes": machine.memory,
        "gpus": machine.gpus,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The commit the package's source stands at, with `-dirty` if it was changed since; `None` outside a checkout."""
    package = Path(hf_llmopt.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not an installed copy inside somebody else's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
