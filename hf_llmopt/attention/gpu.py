"""CUDA: our kernels over pages, torch's attention, what else is installed, and which is fastest for a pass.

A pass has up to two parts, each one launch or two: spans of up to 16 tokens, which are decoded, and longer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..kernels.arguments import Seen
from .dense import entrants
from .inputs import Call, StepInputs
from .paths import sdpa

WIDEST = 256  # head that our kernels are made for


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; `None` if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from ..kernels.triton.int_linear import INTERPRETED

    if device.type != "cuda":
        return None if INTERPRETED and device.type == "cpu" else f"the model's keys lie on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None


def triton_paged(step: StepInputs, call: Call) -> Tensor:
    """Our kernels, whatever is faster."""
    if not _serves(step, call):
        return sdpa(step, call)
    outputs = [_ours(step, call, spans) for spans in _parts(step)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def replayable(step: StepInputs, call: Call) -> Tensor:
    """Our kernel for short spans, whose launch depends on shapes alone.

    Raises:
        UnsupportedModel: It does not read these pages.
    """
    if not _serves(step, call):
        raise UnsupportedModel(
            f"no Triton kernel reads the pages of layer {call.layer} (heads wider than {WIDEST}, or quantized "
            "ones of odd width, with int4 of one that is no multiple of 8)"
        )
    return _ours(step, call, range(len(step.spans)))


def fastest_paged(step: StepInputs, call: Call) -> Tensor:
    """What was fastest when shapes like these were first met on this kind of device: ours, torch's, or others'."""
    if not call.is_plain or any(span.branches for span in step.spans):  # torch has no kernel for it
        return triton_paged(step, call)
    if not _serves(step, call):
        return sdpa(step, call)
    from ..kernels.triton import tuning

    outputs = []
    for spans in _parts(step):
        others = entrants(step, call, spans)
        ours, theirs = partial(_ours, step, call, spans), partial(sdpa, step, call, spans)
        ways: dict[str, Callable[[], Tensor]] = {"triton": ours, "sdpa": theirs, **others}
        note, step.note = step.note, lambda name: None  # what only takes part in a race is no news
        try:
            key = ", ".join([_class_of(step, call, spans), *others])  # what is installed later takes part as well
            name = tuning.raced(key, ways, call.query.device)
        finally:
            step.note = note
        outputs.append(ways[name]())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _serves(step: StepInputs, call: Call) -> bool:
    from ..kernels.triton.blocks import FORMATS, reads

    spec = step.store.layers[call.layer]
    if call.value.dtype not in FORMATS or max(spec.key_dim, spec.value_dim) > WIDEST:
        return False
    return all(reads(spec.form, width) for width in (spec.key_dim, spec.value_dim))


def _parts(step: StepInputs) -> list[range]:
    from ..kernels.triton.decode import TOKENS

    short = step.leading(TOKENS)
    return [part for part in (range(short), range(short, len(step.spans))) if part]


def _ours(step: StepInputs, call: Call, spans: range) -> Tensor:
    from ..kernels.triton import decode

    layer, query, *_ = call
    device = query.device
    seen = step.seen(layer, call.scaling, call.softcap, call.sinks, spans, device)
    offset = step.spans[spans.start].offset
    tokens = query[0, :, offset : offset + len(seen.items)].transpose(0, 1)
    longest = step.spans[spans.stop - 1].length
    windowed = step.group(layer).kind != "full"
    if longest <= decode.TOKENS:
        step.note("triton-decode")
        tiles = step.tiles(layer, device, spans, longest)
        return decode.decode(tokens, seen, tiles, longest, decode.plan(tokens, seen, len(tiles), longest))[None]
    found, name = prefill(
        tokens, seen, partial(step.tiles, layer, device, spans), windowed, partial(step.are_runs, layer, spans)
    )
    step.note(name)
    return found[None]


def prefill(
    query: Tensor,
    seen: Seen,
    tiles: Callable[[int], Tensor],
    windowed: bool,
    are_runs: Callable[[int], bool] = lambda size: True,
) -> tuple[Tensor, str]:
    """The kernel for long spans that this device and these heads have.

    Args:
        query: `[tokens, heads, key_dim]`.
        seen: What they attend to.
        tiles: The spans cut into tiles of at most so many tokens, as `extend.extend` takes them.
        windowed: Whether any query does not see its request's first token.
        are_runs: Whether aligned blocks of so many tokens of a request lie in neighbouring slots.

    Returns:
        `[tokens, heads, value_dim]`, and the kernel's name.
    """
    from ..kernels.triton import extend

    group = query.shape[1] // seen.shape.kv_heads
    if seen.tree is None and _hopper(query, seen, group):
        from ..kernels.triton import hopper

        if are_runs(hopper.KEYS):
            return hopper.extend(query, seen, tiles(hopper.ROWS // group), windowed), "hopper-extend"
    shape = extend.shape_for(query, seen)
    return extend.extend(query, seen, tiles(shape.rows // group), shape, windowed), "triton-extend"


def _hopper(query: Tensor, seen: Seen, group: int) -> bool:
    """Whether the kernel for Hopper serves these heads on this device."""
    if seen.keys.dtype not in (torch.bfloat16, torch.float16) or not query.is_cuda:
        return False
    if torch.cuda.get_device_capability(query.device) != (9, 0):
        return False
    from ..kernels.triton import hopper

    fits = group <= hopper.ROWS and {query.shape[2], seen.shape.value_dim} <= set(hopper.WIDTHS)
    return fits and hopper.reads(seen.keys) and hopper.reads(seen.values)


def _class_of(step: StepInputs, call: Call, spans: range) -> str:
    """What passes have in common that one choice serves: counts are rounded up to powers of two."""
    spec, heads = step.store.layers[call.layer], call.query.shape[1]
    key = spans, spec, heads
    if key not in step.classes:  # made once a step for layers that are alike
        chosen = step.spans[spans.start : spans.stop]
        group = step.store.group_of[call.layer]
        counts = (len(chosen), sum(span.length for span in chosen), max(span.end(group) for span in chosen))
        widths = f"{heads}/{spec.kv_heads} {spec.key_dim}/{spec.value_dim}"
        rounded = " ".join(str(1 << (count - 1).bit_length()) for count in counts)
        numbers = spec.dtype if spec.form is None else f"{spec.dtype} {spec.form.name}"
        step.classes[key] = f"attention {spec.kind} {numbers} heads {widths} spans, tokens, context {rounded}"
    return step.classes[key]
