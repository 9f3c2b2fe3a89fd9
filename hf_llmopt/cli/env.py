"""`hf-llmopt env`: what a bug report needs, and what works here and what does not, and why."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from . import ui
from .command import Json

# Those of pyproject.toml without which a command says no, and what they bring.
EXTRAS = {"bench": ("matplotlib",), "serve": ("fastapi", "llguidance", "prometheus_client", "pydantic", "uvicorn")}

QUALITY = {"quantization": "lossy", "kv_cache": "exact, unless its dtype is int8, fp8 or int4"}  # else exact


def env(json: Json = False) -> None:
    """Show versions, devices, and what is available and what is not and why."""
    report = collect()
    if json:
        ui.emit(report)
        return
    versions = report["versions"]
    ui.table("versions", ["package", "version"], [[name, found or "-"] for name, found in versions.items()], 2)
    ui.say()
    rows = [
        ["processor", report["cpu"]],
        ["cores", f"{report['cores']} usable, {report['threads']} threads of torch, {report['cpu_capability']}"],
        ["memory", f"{report['memory_bytes'] / 2**30:.1f} GiB, {report['free_bytes'] / 2**30:.1f} GiB free"],
        ["system", report["system"]],
        *([f"GPU {i}", f"{g['name']}, {g['memory_bytes'] / 2**30:.0f} GiB"] for i, g in enumerate(report["devices"])),
        ["source", report["git"] or "installed package"],
    ]
    ui.table("machine", ["", ""], rows, 2)
    ui.say()
    features = [[f["name"], "yes" if f["available"] else "no", f["why"]] for f in report["features"]]
    ui.table("available", ["feature", "", "why"], features, 3)


def collect() -> dict[str, Any]:
    """All that the command shows, ready for JSON."""
    import psutil
    import torch

    from hf_llmopt.bench import environment

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        devices.append({"name": found.name, "memory_bytes": found.total_memory, "capability": capability})
    report = environment()
    report["free_bytes"] = psutil.virtual_memory().available
    report["devices"] = devices
    report["features"] = [
        {"name": name, "available": available, "why": why} for name, available, why in _features(bool(devices))
    ]
    return report


def _features(gpu: bool) -> list[tuple[str, bool, str]]:
    from hf_llmopt import demo
    from hf_llmopt.attention.choice import BACKENDS
    from hf_llmopt.config import PARTS, PRESETS

    weights = (demo.path() / "config.json").is_file()
    return [
        ("keyword llmopt=", *_hooks()),
        *((f"llmopt={part!r}", True, QUALITY.get(home, "exact")) for part, (home, _) in PARTS.items()),
        *((f"llmopt={name!r}", True, _exactness(name)) for name in PRESETS),
        ("C kernels for the CPU", *_kernels()),
        *((f"attention backend {name!r}", *_backend(name)) for name in BACKENDS),
        ("CUDA", *_cuda()),
        ("Triton", *_triton(gpu)),
        ("Apple GPU (mps)", *_mps()),
        ("embedded model", weights, "package data" if weights else "no weights; run python -m hf_llmopt.demo.train"),
        *((f"extra {extra!r}", *_extra(extra, modules)) for extra, modules in EXTRAS.items()),
    ]


def _exactness(preset: str) -> str:
    from hf_llmopt import LLMOptConfig

    config = LLMOptConfig.parse(preset)
    return "exact" if config is not None and config.exact else "lossy"


def _hooks() -> tuple[bool, str]:
    from transformers import GenerationMixin

    if GenerationMixin.generate.__globals__["__name__"] == "hf_llmopt.hooks":
        return True, "installed by import hf_llmopt"
    if os.environ.get("HF_LLMOPT_INSTALL", "1") == "0":
        return False, "HF_LLMOPT_INSTALL=0 is set; call hf_llmopt.install() (hf-llmopt does)"
    return False, "uninstalled, or another library patched generate afterwards"


def _kernels() -> tuple[bool, str]:
    from hf_llmopt.kernels import cpu

    if not cpu.available():
        return False, cpu.why_not() or ""
    others = [level for level in cpu.levels() if level != cpu.used()]
    return True, f"level {cpu.used()}" + (f"; this machine also runs {', '.join(others)}" if others else "")


def _backend(name: str) -> tuple[bool, str]:
    import torch

    from hf_llmopt.attention import gpu
    from hf_llmopt.kernels import cpu

    if name == "cpu" and not cpu.available():
        return False, "needs the C kernels"
    if name == "triton":
        why_not = gpu.why_not(torch.device("cuda")) if torch.cuda.is_available() else "needs a CUDA device"
        return why_not is None, why_not or "Triton kernels that read pages where they lie"
    reasons = {
        "cpu": "C kernels that read pages where they lie",
        "sdpa": "torch's scaled dot product attention over pages",
        "reference": "plain torch, slow: the definition of correct",
    }
    return True, reasons.get(name, "")


def _cuda() -> tuple[bool, str]:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this torch was built without it"
    if not torch.cuda.is_available():
        return False, "torch finds no usable device or driver"
    return True, f"{torch.cuda.device_count()} device(s), CUDA {torch.version.cuda or torch.version.hip}"


def _triton(gpu: bool) -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "not installed"
    if not gpu:
        return False, "installed, but there is no GPU"
    from hf_llmopt.kernels.weight import triton_serves

    if not triton_serves():
        return False, "installed, but the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    return True, "installed; products with quantized weights use it"


def _mps() -> tuple[bool, str]:
    import torch

    if not torch.backends.mps.is_built():
        return False, "this torch was built without it"
    if not torch.backends.mps.is_available():
        return False, "no such device"
    return True, "found"


def _extra(name: str, modules: tuple[str, ...]) -> tuple[bool, str]:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        return False, f"{', '.join(missing)} not installed; pip install '.[{name}]' in the checkout"
    return True, ", ".join(modules)
