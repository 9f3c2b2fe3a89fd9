"""Launches that begin before the launch ahead of them has ended: programmatic dependent launch, from Hopper on.

A decoder layer is ten launches of a few microseconds, and between two of them a GPU stands still for one or two. A
kernel that begins early finds its place, asks for its weights, and waits: what it waits for is the whole launch before,
which has waited likewise. So a kernel that begins with `ready` is ordered as any other, wherever it says `launch_next`.
Programs that begin early take what room there is, and the rest of their launch is spread unevenly: attention over long
contexts took 8 % longer on an H100. So only kernels whose programs are small and short say it at their beginning.

Source: PTX ISA, "griddepcontrol".
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINES = tl.constexpr(32)  # of 128 bytes, which a program asks for of each row: all programs' fit into the L2 cache


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
def ahead(weight, rows, WIDTH, EARLY: tl.constexpr):
    """Ask for the beginning of rows of a weight `[outputs, WIDTH]`, which no kernel writes: into the L2 cache."""
    if EARLY:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        column = tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1)
        place = (weight + rows.to(tl.int64)[:, None] * WIDTH + column[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def ready(EARLY: tl.constexpr):
    """Wait until all that was launched before has ended and can be read."""
    if EARLY:
        gdc_wait()
