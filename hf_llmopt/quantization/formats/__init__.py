"""File formats of quantized weights, one file each: bytes on disk to a `Grid` and back, bit for bit.

`Recipe` says which modules of a checkpoint are quantized, `Scheme` how one of them is stored. docs/formats.md has every
byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from ...config import OWN
from ...errors import InvalidCheckpoint, UnsupportedQuantization
from ...kernels.arguments import Grid
from . import awq, compressed_tensors, fp8, gptq
from .checked import checked
from .recipe import Recipe
from .scheme import Format, Layout, Scheme, in_order

__all__ = ["Format", "Recipe", "Scheme", "obstacle", "pack", "stored_in", "tensors", "unpack"]

FORMATS: dict[str, Format] = {
    "gptq": gptq.FORMAT,
    "gptq_v2": gptq.FORMAT,
    "awq": awq.GEMM,
    "awq_gemv": awq.GEMV,
    "pack-quantized": compressed_tensors.PACKED,
    "int-quantized": compressed_tensors.PLAIN,
    "float-quantized": fp8.FLOAT,
    "fp8": fp8.BLOCKS,
}
OPTIONAL = {"g_idx", "weight_shape"}  # older files lack them
# Only a quantized weight has these.
CODED = {"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"}
EXACT = {"pack-quantized", "int-quantized", "float-quantized"}  # their configs name every weight


def _format(scheme: Scheme) -> Format:
    return FORMATS[scheme.format] if scheme.format in FORMATS else checked(scheme.format, OWN["format"][scheme.format])


def obstacle(scheme: Scheme, outputs: int, inputs: int) -> str | None:
    """Why the format cannot hold a weight of so many outputs and inputs, or `None`.

    Example:
        >>> obstacle(Scheme("awq", 4, 128, symmetric=False), 4096, 100)
        'its 100 inputs are no multiple of the group size 128'
    """
    return _format(scheme).obstacle(scheme, outputs, inputs)


def stored_in(names: Iterable[str], schemes: Mapping[str, Scheme], dense: Iterable[str] = ()) -> dict[str, Scheme]:
    """The weights that a checkpoint really holds quantized, before any is read.

    Configs of GPTQ, AWQ and fp8 do not always say what is quantized, above all in models with more than a language
    model: there, what stands in the files as `weight` alone is not.

    Args:
        names: Of all tensors in the files.
        schemes: How each module would be stored, by its name.
        dense: Modules that are not quantized.

    Raises:
        InvalidCheckpoint: A weight lacks some of its tensors, or all: files are missing, or mixed with others. Or a
            weight is quantized that should not be.

    Example:
        >>> names = ["layers.0.up.qweight", "layers.0.up.qzeros", "layers.0.up.scales", "vision.0.up.weight"]
        >>> scheme = Scheme("gptq", 4, 128, symmetric=True)
        >>> list(stored_in(names, {"layers.0.up": scheme, "vision.0.up": scheme}))
        ['layers.0.up']
    """
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in names:
        module, _, leaf = name.rpartition(".")
        leaves[module].add(leaf)
    found, wrong = {}, []
    odd = [f"{module} has {', '.join(sorted(leaves[module]))}" for module in dense if leaves[module] & CODED]
    if odd:
        raise InvalidCheckpoint(
            f"{len(odd)} weights are quantized in the files, and not by their quantization_config: {'; '.join(odd[:3])}"
            f"{'; …' if len(odd) > 3 else ''}. It is missing, leaves out too much, or belongs to another checkpoint."
        )
    for module, scheme in schemes.items():
        wanted = _format(scheme).layout(scheme, 1, 1, torch.float32).keys() - OPTIONAL
        if wanted <= leaves[module]:
            found[module] = scheme
        elif scheme.format in EXACT or "weight" not in leaves[module] or (wanted - {"weight"}) & leaves[module]:
            there = ", ".join(sorted(leaves[module])) or "nothing"
            wrong.append(f"{module} lacks {', '.join(sorted(wanted - leaves[module]))} and has {there}")
    if wrong:
        raise InvalidCheckpoint(
            f"{len(wrong)} of {len(schemes)} quantized weights are not complete: {'; '.join(wrong[:3])}"
            f"{'; …' if len(wrong) > 3 else ''}. Files are missing, or belong to another checkpoint."
        )
    return found


def tensors(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
    """What a linear layer stores, without its bias.

    Args:
        scheme: How it is stored.
        outputs: Of the layer.
        inputs: Of the layer.
        dtype: Of the model; compressed-tensors keeps scales in it.

    Returns:
        Shape and dtype of each tensor, by name.

    Raises:
        UnsupportedQuantization: The format cannot hold such a weight.

    Example:
        >>> import torch
        >>> tensors(Scheme("gptq", 4, 128, symmetric=True), 512, 256, torch.bfloat16)["qweight"]
        ((32, 512), torch.int32)
    """
    reason = obstacle(scheme, outputs, inputs)
    if reason:
        raise UnsupportedQuantization(f"{scheme.format} cannot hold a weight [{outputs}, {inputs}]: {reason}.")
    return _format(scheme).layout(scheme, outputs, inputs, scheme.scale_dtype(dtype))


def pack(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that a file has for a quantized weight.

    Args:
        grid: The weight.
        scheme: How it is to be stored.
        dtype: Of the model. Scales are rounded to `scheme.scale_dtype(dtype)`; the rest is stored bit for bit.

    Returns:
        As `tensors` describes them, on the grid's device.

    Raises:
        UnsupportedQuantization: The format cannot hold this weight, or a scale in its dtype.

    Example:
        >>> import torch
        >>> grid = Grid(torch.full((32, 64), 6, dtype=torch.uint8), torch.ones(32, 1))
        >>> stored = pack(grid, Scheme("gptq", 4, 64, symmetric=True), torch.float16)
        >>> hex(stored["qweight"][0, 0]), hex(stored["qzeros"][0, 0])
        ('0x66666666', '0x77777777')
    """
    outputs, inputs = grid.codes.shape
    tensors(scheme, outputs, inputs, dtype)
    _check(grid, scheme)
    scale_dtype = scheme.scale_dtype(dtype)
    scales = grid.scales.to(scale_dtype)
    if not bool(scales.isfinite().all()) or bool(((scales == 0) & (grid.scales != 0)).any()):
        raise UnsupportedQuantization(f"{scheme.format} stores scales as {scale_dtype}, and some are beyond its range.")
    return _format(scheme).pack(grid, scheme, scale_dtype)


def _check(grid: Grid, scheme: Scheme) -> None:
    """Whether a grid is what its scheme says."""
    (outputs, inputs), floating = grid.codes.shape, grid.codes.is_floating_point()
    wanted = torch.float8_e4m3fn if scheme.format in ("float-quantized", "fp8") else torch.uint8
    middle = 2 ** (scheme.bits - 1)
    keeps_zeros = scheme.format.startswith(("gptq", "awq")) or not scheme.symmetric
    keeps_index = scheme.format.startswith("gptq") or (scheme.act_order and not floating)
    reasons = {
        f"has codes of {grid.bits} bits, not {scheme.bits}": grid.bits != scheme.bits,
        f"has codes in {grid.codes.dtype}, not {wanted}": grid.codes.dtype != wanted,
        f"has scales {tuple(grid.scales.shape)}": grid.scales.shape != (outputs, scheme.groups(inputs)),
        f"has codes beyond {scheme.bits} bits": not floating and int(grid.codes.max()) >> scheme.bits != 0,
        f"has zeros beyond {scheme.bits} bits": grid.zeros is not None and int(grid.zeros.max()) >> scheme.bits != 0,
        "has zeros, which a symmetric one does not store": grid.zeros is not None
        and not keeps_zeros
        and not bool((grid.zeros == middle).all()),
        "has inputs in groups out of order, which it does not store": grid.index is not None
        and not keeps_index
        and not torch.equal(grid.index, in_order(scheme, inputs, grid.index.device)),
    }
    for reason, true in reasons.items():
        if true:
            raise UnsupportedQuantization(f"A weight [{outputs}, {inputs}] cannot be stored as {scheme}: it {reason}.")


def unpack(stored: Mapping[str, Tensor], scheme: Scheme, outputs: int, inputs: int) -> Grid:
    """The quantized weight that a file holds.

    Args:
        stored: Tensors by name, as `tensors` describes them; scales may be in any floating-point format.
        scheme: How they are stored. Version 1 and 2 of GPTQ are told apart by the zeros.
        outputs: Of the layer.
        inputs: Of the layer.

    Returns:
        The grid, on the tensors' device.

    Raises:
        InvalidCheckpoint: A tensor is missing, or its shape, dtype or content is not what the scheme says.
        UnsupportedQuantization: The format cannot hold such a weight.

    Example:
        >>> import torch
        >>> scheme = Scheme("awq", 4, 64, symmetric=False)
        >>> grid = Grid(torch.full((32, 64), 9, dtype=torch.uint8), torch.ones(32, 1, dtype=torch.float16))
        >>> bool((unpack(pack(grid, scheme, torch.float16), scheme, 32, 64).codes == grid.codes).all())
        True
    """
    layout = tensors(scheme, outputs, inputs, torch.float32)
    try:
        for name, (shape, dtype) in layout.items():
            if name in stored:
                _check_tensor(name, stored[name], shape, dtype)
            elif name not in OPTIONAL or (name == "g_idx" and scheme.act_order):
                raise InvalidCheckpoint(
                    f"there is no {name!r}, only {', '.join(sorted(stored)) or 'nothing'}; files are missing, or of "
                    "another format than their quantization_config says"
                )
        present = {name: stored[name] for name in layout if name in stored}
        return _format(scheme).unpack(present, scheme, outputs, inputs)
    except InvalidCheckpoint as error:
        groups = f", groups of {scheme.group_size}" if scheme.group_size != -1 else ""
        weight = f"A weight [{outputs}, {inputs}] stored as {scheme.format}, {scheme.bits} bits{groups}"
        raise InvalidCheckpoint(f"{weight}, cannot be read: {error}.") from None


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whether a stored tensor is what its scheme says; scales may be in any format of two bytes or more."""
    if tensor.shape != torch.Size(shape) and not (len(shape) < 2 and prod(shape) == tensor.numel() == 1):
        raise InvalidCheckpoint(
            f"{name!r} should be {list(shape)} and is {list(tensor.shape)}; the file is damaged, or its "
            "quantization_config is of another one"
        )
    if not dtype.is_floating_point or dtype.itemsize == 1:
        if tensor.dtype != dtype:
            raise InvalidCheckpoint(f"{name!r} should be in {dtype} and is in {tensor.dtype}")
    elif not tensor.is_floating_point() or tensor.element_size() == 1:
        raise InvalidCheckpoint(f"{name!r} should be in float16, bfloat16 or float32 and is in {tensor.dtype}")
    elif not bool(tensor.isfinite().all()):
        raise InvalidCheckpoint(f"{name!r} has values that are not finite")
