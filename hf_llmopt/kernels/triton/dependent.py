"""Launches that begin before the launch ahead of them has ended: programmatic dependent launch, from Hopper on.

A decoder layer is ten launches of a few microseconds, and between two of them a GPU stands still for one or two. A
kernel that begins early finds its place and waits: what it waits for is the whole launch before, which has waited
likewise. So a kernel that begins with `ready` is ordered as any other, wherever it says `launch_next`.

Before `ready` a kernel may read what no kernel of ours writes in this pass: weights, the tables of a pass, which copies
and torch's kernels have written, and keys of earlier passes. What torch launches never lets the next launch begin
early, so that none begins before it has ended, and a pass begins with such launches. A program may return without
having waited, a whole launch may not: what waits for it would wait for nothing before it.

Programs that begin early take what room there is, and the rest of their launch is spread unevenly. So only kernels
whose programs are small and short say it at their beginning, others at their end. Attention that reads keys ahead says
it once it has waited, which was 0.5 % of a layer shorter, and other attention over long contexts does not begin early
at all: on an H100 it took 5 % longer. Asking for weights while waiting (prefetch into L2) cost more than it saved.

Source: PTX ISA, "griddepcontrol".
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch on a device: whether the kernel, and Triton, let it begin early."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def launch_next(EARLY: tl.constexpr):
    """What comes behind may begin once every program got here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def ready(EARLY: tl.constexpr):
    """Wait until all that was launched before has ended and can be read."""
    if EARLY:
        gdc_wait()
