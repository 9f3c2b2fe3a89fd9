"""Packing keys and values for quantized pages by the kernel of their device."""

from __future__ import annotations

from torch import Tensor

from . import cpu, reference
from .arguments import PageFormat
from .weight import triton_serves


def pack_rows(x: Tensor, form: PageFormat, rotates: bool = False) -> Tensor:
    """See `reference.pack_rows`.

    Example:
        >>> import torch
        >>> from hf_llmopt.kernels.arguments import PAGE_FORMATS
        >>> pack_rows(torch.tensor([[[127.0, -2.0]]]), PAGE_FORMATS["int8"]).flatten()[:2].tolist()
        [127, 254]
    """
    if x.device.type == "cpu" and cpu.available() and x.shape[2] <= cpu.MAX_DIM and x.dtype in cpu.DTYPES:
        return cpu.pack_rows(x, form, rotates)
    if x.is_cuda and triton_serves():
        from .triton import pages

        if pages.serves(x, form):
            return pages.pack_rows(x, form, rotates)
    return reference.pack_rows(x, form, rotates)
